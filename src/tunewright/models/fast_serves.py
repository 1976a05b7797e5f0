"""Which models and tuners the fast path serves, and what it needs besides the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftType
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft import OFTLayer
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from tunewright.models.fast_rotations import unusual_oft
from tunewright.models.layouts import causal_lm, decoder_of
from tunewright.ops.lora import BLOCK
from tunewright.ops.quant import is_quantised

# model type -> the sliding window that transformers applies (Llama ignores one in its config), or None
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "llama": lambda decoder: None,
    "mistral": lambda decoder: decoder.config.sliding_window,
    "qwen2": lambda decoder: decoder.layers[0].self_attn.sliding_window,
}

# parts of the names of what may be trained
_TRAINED = ("lora_", "vera_lambda_", "oft_R.", "ia3_l", "adapter_", "prompt_encoder.", "score.")
_TRAINED += ("_proj.weight", "_proj.bias", "norm.weight", "embed_tokens.weight", "lm_head.weight")


def why_not(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why this model cannot take the fast path, or None if it can."""
    config: Any = causal_lm(model).config
    names = {name.replace(".base_layer", "") for name, _ in decoder_of(model).named_parameters()}
    found = {
        "a window slides over its prefix of keys and values": _has_prefix(model) and _window(model) is not None,
        "its base is quantised, and the fast path reads plain weights": is_quantised(model),
        f"models of type '{config.model_type}' have no fast path": config.model_type not in WINDOWS,
        "its MLP is not a SwiGLU": getattr(config, "hidden_act", "silu") != "silu",
        "its MLP has biases beside factors of outputs": _has_gains(model)
        and any(f"{p}.bias" in name for name in names for p in ("gate_proj", "up_proj")),
        "its layers differ in their attention": len(set(getattr(config, "layer_types", None) or [""])) > 1,
        "only a part of each head is rotated": getattr(config, "partial_rotary_factor", None) not in (None, 1.0),
        "it is not on the CPU": next(model.parameters()).device.type != "cpu",
        "it computes in float16": dtype == torch.float16,
    }
    reason = next((text for text, is_so in found.items() if is_so), None)
    if reason is None and (config.intermediate_size % 16 or head_dim(config) % 2):
        reason = "its sizes are not multiples of 16"
    if reason is not None:
        return reason
    for name, module in decoder_of(model).named_modules():
        reason = next((what(name, module) for kind, what in _UNUSUAL.items() if isinstance(module, kind)), None)
        if reason:
            return f"{name} has {reason}"
    odd = [n for n, p in model.named_parameters() if p.requires_grad and not any(k in n for k in _TRAINED)]
    return f"{odd[0]} is trained" if odd else None


def _window(model: nn.Module) -> int | None:
    config: Any = causal_lm(model).config
    kind: str = config.model_type
    return WINDOWS[kind](decoder_of(model)) if kind in WINDOWS else None


def _has_prefix(model: Any) -> bool:
    encoder = getattr(model, "prompt_encoder", None)
    return encoder is not None and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def _has_gains(model: nn.Module) -> bool:
    """Whether DoRA's or IA3's numbers multiply what layers say."""
    return any(isinstance(m, IA3Layer) or bool(getattr(m, "lora_magnitude_vector", None)) for m in model.modules())


def _unusual_lora(name: str, layer: LoraLayer) -> str | None:
    lengths = bool(getattr(layer, "lora_magnitude_vector", None))
    found = {
        "more than one adapter": len(layer.active_adapters) > 1,
        "a variant of LoRA other than DoRA": any(
            v and not isinstance(v, DoraLinearVariant) for v in (layer.lora_variant or {}).values()
        ),
        "dropout": any(not isinstance(d, nn.Identity) for d in layer.lora_dropout.values()),
        "a bias in its update": any(layer.lora_bias.values()),
        "an embedding's update": bool(layer.lora_embedding_A),
        "merged weights": layer.merged,
        "lengths over weights that are trained, too": lengths and _base_is_trained(layer),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _unusual_ia3(name: str, layer: IA3Layer) -> str | None:
    found = {
        "more than one adapter": len(layer.active_adapters) > 1,
        "scaled inputs that are not the MLP's inner side": layer.is_feedforward and not name.endswith("down_proj"),
        "a bias that is scaled": not layer.is_feedforward and layer.get_base_layer().bias is not None,
        "merged weights": layer.merged,
        "factors over weights that are trained, too": _base_is_trained(layer),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _unusual_vera(name: str, layer: VeraLayer) -> str | None:
    found = {
        "more than one adapter": len(layer.active_adapters) > 1,
        "dropout": any(not isinstance(d, nn.Identity) for d in layer.vera_dropout.values()),
        "merged weights": layer.merged,
    }
    return next((what for what, is_so in found.items() if is_so), None)


_UNUSUAL: dict[type, Callable[[str, Any], str | None]] = {
    LoraLayer: _unusual_lora,
    IA3Layer: _unusual_ia3,
    VeraLayer: _unusual_vera,
    OFTLayer: unusual_oft,
}


def _base_is_trained(layer: Any) -> bool:
    return any(p.requires_grad for p in layer.get_base_layer().parameters())


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def copied_bytes(model: nn.Module, dtype: torch.dtype, tiles: bool) -> int:
    """What the fast path keeps beside the model: tiles read the model's own weights where those have `dtype`; else, and
    always without tiles, there is a copy."""
    weights = [m.weight for m in causal_lm(model).modules() if isinstance(m, nn.Linear)]
    return dtype.itemsize * sum(w.numel() for w in weights if not tiles or w.dtype != dtype)


def tiles_fit(config: Any) -> bool:
    """Whether every width is a multiple of a tile."""
    return all(n % BLOCK == 0 for n in (config.hidden_size, config.intermediate_size, head_dim(config)))
