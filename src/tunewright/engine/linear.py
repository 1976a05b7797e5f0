"""A linear layer as it is served: bfloat16 weights packed once for the CPU's matrix unit, and many LoRA adapters.

Packing (what oneDNN would otherwise do at every product) makes a step of 17 to 128 tokens about four times as fast.
Adapters stay apart from the base: each changes only the rows of the requests that asked for it, in one forward.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tunewright.core.durable import read_json
from tunewright.core.errors import CheckpointError
from tunewright.ops.runtime import fast_bfloat16


@dataclass
class Routing:
    """Which rows of the step use which adapter. Shared by all layers of a model; rows None means the whole step."""

    parts: list[tuple[str, Tensor | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """One adapter's part of a layer: x @ a @ b is added to the output. a: [in, r], b: [r, out] with its scale."""

    a: Tensor
    b: Tensor


class ServeLinear(nn.Linear):
    """An nn.Linear whose product may be packed and which adds the adapters' parts. Inference only."""

    def __init__(self, linear: nn.Linear, routing: Routing, pack: bool, twin: ServeLinear | None = None) -> None:
        """twin: a layer with the same weight, already packed as this one would be."""
        nn.Module.__init__(self)  # the weights are taken over, not made
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.routing = routing
        self.pairs: dict[str, Pair] = {}
        if twin is not None:
            self.packed = twin.packed
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16) if pack else None
        if not pack:
            self.weight = linear.weight if twin is None else twin.weight

    def forward(self, input: Tensor) -> Tensor:
        """input: [1, T, in]. Returns [1, T, out]."""
        if self.packed is None:
            out = F.linear(input, self.weight, self.bias)
        else:
            out = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        for name, rows in self.routing.parts:
            pair = self.pairs.get(name)
            if pair is None:
                continue
            # in float32, as the adapter was trained; products this small are also faster so than in bfloat16
            if rows is None:
                out[0].add_((input[0].float() @ pair.a) @ pair.b)
            else:
                changed = out[0, rows] + (input[0, rows].float() @ pair.a) @ pair.b
                out[0].index_copy_(0, rows, changed.to(out.dtype))
        return out


# transformers' classes that compute x / rms(x) * weight, nothing else, in several small operations
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class ServeNorm(nn.Module):
    """x / rms(x) * weight in one operation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def can_pack(weight: Tensor) -> bool:
    """Whether packing helps: bfloat16 on a CPU with instructions for it."""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and fast_bfloat16()
    )


def prepare(
    model: nn.Module, kin: Sequence[tuple[nn.Module, Collection[str]]] = (), own: Collection[str] = ()
) -> Routing:
    """Replace the model's linear layers and norms, in place, by their serving forms; returns the layers' routing.

    kin: prepared models of the same base in the same dtype, each with the names of the tensors that are its own; what
    neither has of its own is shared. own: this model's.
    """
    routing = Routing()
    layers = {
        path: m
        for net, differs in kin
        for path, m in net.named_modules()
        if isinstance(m, ServeLinear) and not {f"{path}.weight"} & {*differs, *own}
    }
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                twin = layers.get(f"{path}.{name}".lstrip("."))
                setattr(parent, name, ServeLinear(child, routing, can_pack(child.weight), twin))
            elif type(child).__name__ in _NORMS:
                setattr(parent, name, ServeNorm(child))
    tensors = {n: p for net, differs in kin for n, p in net.named_parameters() if n not in differs and n not in own}
    for name, p in model.named_parameters():
        if name in tensors:
            p.data = tensors[name].data
    return routing


# options of peft's LoRA under which it is more than x @ A @ B: such an adapter is merged into a copy of its own
_BEYOND_PLAIN = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "trainable_token_indices")
_BEYOND_PLAIN += ("layer_replication", "megatron_config", "target_parameters", "alora_invocation_tokens")
_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")


def is_plain_lora(folder: Path) -> bool:
    """Whether the adapter is LoRA on linear layers of the body and nothing else."""
    config = _config(folder)
    return (
        config.get("peft_type") == "LORA"
        and not any(config.get(name) for name in _BEYOND_PLAIN)
        and config.get("bias", "none") == "none"
        and all(_KEY.match(k) and ".lm_head." not in k for k in _tensors(folder))
    )


def load_adapter(model: nn.Module, name: str, folder: Path) -> int:
    """Add the plain LoRA adapter of a peft folder to the model's layers as `name`; returns its bytes.

    Raises CheckpointError if it does not fit the model (then nothing was added).
    """
    config, tensors = _config(folder), _tensors(folder)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, ServeLinear)}
    found = {m["path"]: m.string for key in tensors if (m := _KEY.match(key)) and m["side"] == "A"}
    pairs = {}
    for path, key in found.items():
        a, b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
        layer = layers.get(path)
        if layer is None or (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise CheckpointError(
                f"The adapter '{folder.name}' does not fit its base model: the layer {path} is "
                + ("missing there." if layer is None else "of another size there."),
                code="adapter_does_not_fit",
            )
        scale = _alpha(config, path) / _divisor(config, a.shape[0])
        pairs[path] = Pair(a.t().contiguous(), (b.t() * scale).contiguous())
    for path, pair in pairs.items():
        layers[path].pairs[name] = pair
    return sum(4 * (p.a.numel() + p.b.numel()) for p in pairs.values())


def drop_adapter(model: nn.Module, name: str) -> None:
    for layer in _layers(model):
        layer.pairs.pop(name, None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "adapter_config.json")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"The adapter '{folder.name}' has no readable adapter_config.json.") from e


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors; the file is mapped, so only what is used is read."""
    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"The adapter '{folder.name}' has no readable adapter_model.safetensors.") from e


def _layers(model: nn.Module) -> Iterator[ServeLinear]:
    return (m for m in model.modules() if isinstance(m, ServeLinear))


def _alpha(config: dict[str, Any], path: str) -> float:
    """lora_alpha of a layer: alpha_pattern's keys are the ends of module paths, or regular expressions of them."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(config["lora_alpha"])


def _divisor(config: dict[str, Any], r: int) -> float:
    return r**0.5 if config.get("use_rslora") else float(r)
