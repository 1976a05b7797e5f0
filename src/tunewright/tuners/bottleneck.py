"""Bottleneck adapters: y + up(f(down(y))) after a sublayer, or beside it with its input; before the residual is added.

Houlsby et al. 2019 (arXiv 1902.00751, figure 2): after attention and after the MLP. Pfeiffer et al. 2020 (arXiv
2005.00247): after the MLP only. Parallel: He et al. 2021 (arXiv 2110.04366, section 4.6): beside the MLP, scaled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.adapter_files import WEIGHTS, check_same_shape, read_config, write_adapter
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import copy_into, read_tensors
from tunewright.tuners.targets import task_type, whole_modules

METHOD = "BOTTLENECK"  # peft_type in the file; peft itself has no such method
# the last linear layer of an attention and of an MLP, and a whole MLP, by the names that transformers gives them
_ATTENTION = r"(self_attn|attn|attention|self_attention|SelfAttention|EncDecAttention|encoder_attn)"
_MLP = r"\.(mlp|DenseReluDense|feed_forward|ffn)"
AFTER_ATTENTION = re.compile(rf"\.{_ATTENTION}\.(output\.dense|o_proj|out_proj|out_lin|c_proj|o|dense|wo)$")
AFTER_MLP = re.compile(
    rf"{_MLP}\.(down_proj|c_proj|wo|dense_4h_to_h|fc2|lin2)$|\.layers?\.\d+\.fc2$|\.layer\.\d+\.output\.dense$"
)
MLP = re.compile(rf"{_MLP}$")
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
# form -> what it is put around, each with a name for errors
PLACES = {
    "houlsby": {"attention output": AFTER_ATTENTION, "MLP output": AFTER_MLP},
    "pfeiffer": {"MLP output": AFTER_MLP},
    "parallel": {"MLP": MLP},
}


class Around(nn.Module):
    """A module of the model with a bottleneck after it, or (parallel) beside it. on: whether the bottleneck counts."""

    def __init__(self, inner: nn.Module, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer = inner
        device = next(chain(inner.parameters(), inner.buffers())).device  # a quantised layer has no parameters
        self.adapter_down = nn.Linear(width, config["size"], device=device)
        self.adapter_up = nn.Linear(config["size"], width, device=device)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)
        self.f = ACTIVATIONS[config["activation"]]
        self.scale = config["scale"]
        self.beside = config["form"] == "parallel"
        self.on = True
        self.cast_input_dtype_enabled = True  # a Policy with autocast sets it to False, as in peft's layers

    @property
    def weight(self) -> Tensor:
        """The inner layer's: some models look at its dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """x: [..., in]; returns [..., width]. rest: what else the module takes (in Bloom the residual)."""
        y = self.base_layer(x, *rest)
        if not self.on:
            return y
        z = x if self.beside else y
        z = z.to(self.adapter_down.weight.dtype) if self.cast_input_dtype_enabled else z
        return y + (self.scale * self.adapter_up(self.f(self.adapter_down(z)))).to(y.dtype)


class Bottleneck(base.Tuner):
    """Down starts random (from the seed), up at zero: the model starts exactly as the base. A form names its places."""

    form: ClassVar[str]
    model: nn.Module

    def refuse(self, model: nn.Module) -> None:
        places(model, self.form)

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Put the bottlenecks in by name. Raises SpecError if the model's layers have other names."""
        self.model = model
        self.config = {
            **self.options.model_dump(),
            "peft_type": METHOD,
            "form": self.form,
            "scale": getattr(self.options, "scale", 1.0),
            "task_type": task_type(model),
            "target_modules": places(model, self.form),
            "modules_to_save": whole_modules(model) or None,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.around = insert(model, self.config)
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_(_is_trained(name, self.config))
        base.to_float32(self.trainable())
        self.whole = {n: p.detach().clone() for n, p in self.trainable().items() if ".adapter_" not in n}
        return model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def off(self) -> Iterator[None]:
        trained = {name: p for name, p in self.trainable().items() if name in self.whole}
        kept = {name: p.detach().clone() for name, p in trained.items()}
        self._switch(False, trained, self.whole)
        try:
            yield
        finally:
            self._switch(True, trained, kept)

    def _switch(self, on: bool, trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for module in self.around:
            module.on = on
        if trained:  # a head for rows
            copy_into(trained, values, "the head")

    def save(self, folder: Path, base: str) -> None:
        """adapter_config.json and adapter_model.safetensors, laid out like peft's."""
        write_adapter(folder, self.config, base, in_file(self.model, self.config))

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are unreadable, SpecError if they are of another method or shape."""
        check_same_shape(self.config, folder)
        copy_into(in_file(self.model, self.config), read_tensors(folder / WEIGHTS), "the adapter")

    def merge(self) -> nn.Module:
        """Raises SpecError: what is not linear cannot be folded into weights."""
        raise SpecError("A bottleneck adapter cannot be folded into the base's weights: it is not linear.")


class Width(base.Options):
    size: int = Field(64, ge=1, le=8192, description="width of the bottleneck")


Activation = Annotated[Literal["relu", "gelu", "silu"], Field(description="between down and up")]


def _card(form: str) -> TunerCard:
    return TunerCard(
        title=f"Bottleneck adapters ({form})",
        artefact="adapter",
        mergeable=False,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )


class Houlsby(Bottleneck):
    """Two bottlenecks a layer, after the attention and after the MLP."""

    class Options(Width):
        activation: Activation = "gelu"

    form, card = "houlsby", _card("Houlsby")


class Pfeiffer(Bottleneck):
    """One bottleneck a layer, after the MLP."""

    class Options(Width):
        activation: Activation = "relu"

    form, card = "pfeiffer", _card("Pfeiffer")


class Parallel(Bottleneck):
    """One bottleneck a layer, beside the MLP: it reads what the MLP reads."""

    class Options(Width):
        activation: Activation = "relu"
        scale: float = Field(4.0, gt=0, le=100, description="factor on what the bottleneck adds")

    form, card = "parallel", _card("parallel")


def places(model: Any, form: str) -> list[str]:
    """Names of the modules that a form is put around. Raises SpecError if there are none of a kind."""
    found: list[str] = []
    for what, pattern in PLACES[form].items():
        names = [name for name, _ in model.named_modules() if pattern.search(name)]
        if not names:
            raise SpecError(
                f"tuner '{form}': no {what} was found in a {type(model).__name__} by the names of its layers. "
                "Use a tuner that works on any linear layer: lora, dora or rslora.",
                param="tuner",
            )
        found += names
    return sorted(found)


def insert(model: Any, config: dict[str, Any]) -> list[Around]:
    """Put a bottleneck around each of the config's modules, in place. Raises SpecError for one that is not there."""
    modules = dict(model.named_modules())
    missing = [name for name in config["target_modules"] if name not in modules]
    if missing:
        raise SpecError(f"The model has no module {missing[0]}, around which the adapter was put. Is it another base?")
    put = []
    for name in config["target_modules"]:
        parent, _, leaf = name.rpartition(".")
        inner = modules[name]
        width = model.config.hidden_size if config["form"] == "parallel" else _outputs(inner)
        put.append(Around(inner, width, config))
        setattr(modules[parent], leaf, put[-1])
    return put


def _outputs(layer: Any) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def insert_saved(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved adapter's bottlenecks in it, in place. Raises CheckpointError, SpecError."""
    config = read_config(folder)
    insert(model, config)
    copy_into(in_file(model, config), read_tensors(folder / WEIGHTS), f"'{folder.name}'")
    return model


def is_bottleneck(folder: Path) -> bool:
    """Whether a saved adapter is one of these. Raises CheckpointError if it cannot be read."""
    return read_config(folder)["peft_type"] == METHOD


def in_file(model: nn.Module, config: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Name in the file -> parameter."""
    return {f"base_model.model.{name}": p for name, p in model.named_parameters() if _is_trained(name, config)}


def _is_trained(name: str, config: dict[str, Any]) -> bool:
    return ".adapter_" in name or bool(set(name.split(".")) & set(config["modules_to_save"] or ()))
