"""Which modules of a model an adapter changes and which it trains whole, for every family that the loader opens."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunewright.core.errors import SpecError, did_you_mean

# of a mixture of experts: what chooses between them, and the names that peft takes for their matrices
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
LINEAR = (nn.Linear, Conv1D)  # GPT-2's layers are Conv1D: a linear layer with its weight transposed

# options that several tuners have
Targets = Annotated[
    Literal["all-linear"] | list[str],
    Field(description="names of linear layers, or all-linear: each one of the blocks, not the LM head"),
]
Experts = Annotated[
    bool,
    Field(description="of a mixture of experts, adapt each expert's matrices as well; the routers stay frozen"),
]
Dropout = Annotated[
    float,
    Field(ge=0, le=0.9, description="share of the adapter's inputs that is zero in a step; without the fast path"),
]


def task_type(model: Any) -> str:
    """peft's name for what the model is."""
    if model.get_output_embeddings() is None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def whole_modules(model: Any) -> list[str]:
    """Names of what is trained and saved whole: a head for rows and the pooler below it. [] for a language model."""
    if model.get_output_embeddings() is not None:
        return []
    prefix = model.base_model_prefix
    found = [name for name, m in model.named_children() if name != prefix and any(True for _ in m.parameters())]
    pooler = getattr(getattr(model, prefix), "pooler", None)
    return found + (["pooler"] if pooler is not None else [])


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer that can be adapted, by its full name: not the LM head, not within what is trained whole.

    Of a mixture of experts not what chooses between them, and nothing that is called as its experts' matrices once
    were (an expert for all tokens, a layer without experts): peft takes these names for the experts.
    """
    whole = whole_modules(model)
    head = model.get_output_embeddings()
    mixed = bool(expert_parameters(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR)
        and module is not head
        and not set(name.split(".")) & set(whole)
        and not (mixed and (ROUTER.search(name) or name.rpartition(".")[2] in EXPERT_NAMES))
    }


def expert_parameters(model: nn.Module) -> list[str]:
    """How peft's `target_parameters` name the experts' matrices, all of a layer in one tensor; [] without experts."""
    found = [n for n, p in model.named_parameters() if p.ndim == 3 and n.split(".")[-2:-1] == ["experts"]]
    return sorted({".".join(name.split(".")[-2:]) for name in found})


def target_fields(model: Any, wanted: str | list[str], tuner: str) -> dict[str, Any]:
    """The fields of peft's configs that depend on the model: targets, what is saved whole, the task.

    wanted: `all-linear` or names of layers. tuner: its name, for errors. Raises SpecError for an unknown layer.
    """
    layers = linear_layers(model)
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    for target in [] if wanted == "all-linear" else wanted:
        if not any(is_target(name, [target]) for name in layers):
            raise SpecError(
                f"tuner '{tuner}', option target_modules: the model has no linear layer '{target}' that can be adapted."
                f"{did_you_mean(target, leaves)} It has: {', '.join(leaves)}.",
                param="tuner",
            )
    targets = leaves if isinstance(wanted, str) else sorted(wanted)
    whole = whole_modules(model)
    within = sorted(
        name for name, m in model.named_modules() if isinstance(m, LINEAR) and set(name.split(".")) & set(whole)
    )
    return {
        "target_modules": targets,
        "modules_to_save": whole or None,
        "exclude_modules": within or None,
        "fan_in_fan_out": bool(targets)
        and all(isinstance(m, Conv1D) for name, m in layers.items() if is_target(name, targets)),
        "task_type": task_type(model),
    }


def lora_config(o: Any, model: nn.Module, tuner: str, **more: Any) -> LoraConfig:
    """peft's LoRA with a tuner's r, alpha, dropout, target_modules and, if it has it, experts. Raises SpecError for an
    unknown layer, and for experts where there are none."""
    fields = target_fields(model, o.target_modules, tuner)
    if getattr(o, "experts", False):
        more["target_parameters"] = _experts(o, model, tuner)
    elif not o.target_modules:
        raise SpecError(f"tuner '{tuner}', option target_modules: the list is empty, so nothing trains.", param="tuner")
    return LoraConfig(r=o.r, lora_alpha=o.alpha, lora_dropout=o.dropout, bias="none", **more, **fields)


def _experts(o: Any, model: nn.Module, tuner: str) -> list[str]:
    found = expert_parameters(model)
    if not found:
        text = f"a {type(model).__name__} has no experts whose matrices lie in one tensor. Set it to false."
        raise SpecError(f"tuner '{tuner}', option experts: {text}", param="tuner")
    if o.dropout:
        text = "an expert's update is added to its matrices, so it has no input of its own to drop. Set dropout to 0."
        raise SpecError(f"tuner '{tuner}', options experts and dropout: {text}", param="tuner")
    return found


def full_names(model: Any, targets: list[str]) -> list[str]:
    """The full names of the layers that the targets stand for."""
    return [name for name in linear_layers(model) if is_target(name, targets)]


def is_target(name: str, targets: list[str]) -> bool:
    """Whether a module's full name is one of the targets, or ends with one."""
    return any(name == t or name.endswith(f".{t}") for t in targets)
