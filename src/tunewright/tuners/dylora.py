"""DyLoRA: LoRA in which every step trains the first b ranks only, b drawn anew, so that the first k of them are a good
adapter of rank k for every k up to r (Valipour et al. 2022, arXiv 2210.07558, algorithm 1). The file is peft's LoRA.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import SpecError
from tunewright.ops.runtime import derive_seed
from tunewright.tuners import base
from tunewright.tuners.adapter_files import CONFIG, WEIGHTS, saved_shape
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import read_tensors
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Targets, lora_config


class DyLoRA(PeftTuner):
    """Forward of a step: W x + (alpha / b) B[:, :b] A[:b] x with b uniform from lowest..r, a function of (seed, step).

    The ranks above b are zero for the step (so any product of A and B serves, the fast path's too), and stay exactly as
    they were: neither momentum nor weight decay moves them. frozen: only rank b itself moves, the ranks below stay too.
    """

    class Options(base.Options):
        r: int = Field(16, ge=1, le=1024, description="the highest rank")
        lowest: int = Field(1, ge=1, le=1024, description="the lowest rank that is trained")
        alpha: int = Field(16, ge=1, le=65536, description="the update's scale at rank b is alpha / b")
        frozen: bool = Field(
            False, description="a step at rank b trains the b-th rank only, not all up to it: the paper's cheaper form"
        )
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"

        @model_validator(mode="after")
        def _fits(self) -> DyLoRA.Options:
            if self.lowest > self.r:
                raise ValueError(f"lowest is {self.lowest}, above r {self.r}")
            return self

    card: ClassVar[TunerCard] = TunerCard(
        title="DyLoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )

    def config(self, model: nn.Module, seed: int) -> LoraConfig:
        self.seed = seed
        return lora_config(self.options, model, "dylora")

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        wrapped = super().attach(model, seed)
        self.layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")]
        self.kept: list[Tensor] = []
        self.still: list[Tensor] = []
        return wrapped

    def rank(self, step: int) -> int:
        """The rank of a step."""
        return random.Random(derive_seed("dylora", self.seed, step)).randint(self.options.lowest, self.options.r)

    def before_step(self, step: int) -> None:
        """Put the ranks above this step's aside and zeros in their place."""
        self._put_back()
        b = self.rank(step)
        above = self._ranks(b, self.options.r)
        self.kept = [t.clone() for t in above]
        for t in above:
            t.zero_()
        self._scale(b)

    def on_gradients(self, step: int) -> None:
        """All ranks are there again; what this step must not change is remembered until the update is over."""
        self._put_back()
        b = self.rank(step)
        self.still = [t.clone() for t in self._still(b)]
        if self.options.frozen:
            for layer in self.layers:
                layer.lora_A["default"].weight.grad[: b - 1] = 0  # type: ignore[index,union-attr]
                layer.lora_B["default"].weight.grad[:, : b - 1] = 0  # type: ignore[index,union-attr]

    def after_step(self, step: int) -> None:
        if self.still:
            _copy(self._still(self.rank(step)), self.still)
        self.still = []

    def _still(self, b: int) -> list[Tensor]:
        """What a step at rank b leaves alone."""
        above = self._ranks(b, self.options.r)
        return above + self._ranks(0, b - 1) if self.options.frozen else above

    def _ranks(self, first: int, end: int) -> list[Tensor]:
        """Views of A's rows and B's columns first..end of every layer."""
        views = []
        for layer in self.layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index,union-attr]
            views += [a.detach()[first:end], b.detach()[:, first:end]]
        return views

    def _put_back(self) -> None:
        if self.kept:
            above = self._ranks(self.options.r - self.kept[0].shape[0], self.options.r)
            _copy(above, self.kept)
            self.kept = []
            self._scale(self.options.r)

    def _scale(self, b: int) -> None:
        for layer in self.layers:
            layer.scaling["default"] = self.options.alpha / b  # type: ignore[operator,index]


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for t, value in zip(to, values, strict=True):
        t.copy_(value)


def truncate(source: Path, target: Path, rank: int) -> None:
    """Write the first `rank` ranks of a saved LoRA adapter as an adapter of that rank: peft's two files in `target`.

    A DyLoRA adapter is good at every rank; one that was trained plainly is not. Raises SpecError for a rank that it
    has not or an adapter that is not LoRA, CheckpointError if the files cannot be read.
    """
    shape, tensors = saved_shape(source), read_tensors(source / WEIGHTS)
    if "experts" in shape:
        raise SpecError(f"'{source.name}' adapts the experts of a mixture, whose ranks cannot be cut here.")
    if shape["method"] != "lora":
        raise SpecError(f"'{source.name}' is an adapter of the method {shape['method']}; only LoRA can be cut by rank.")
    if not 1 <= rank <= shape["r"]:
        text = f"The rank is {rank}; '{source.name}' can be cut to ranks from 1 to {shape['r']}."
        raise SpecError(text, param="rank")
    cut = {k: t[:rank] if ".lora_A." in k else t[:, :rank] if ".lora_B." in k else t for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in cut.items()}, target / WEIGHTS, {"format": "pt"})
    write_json(target / CONFIG, {**read_json(source / CONFIG), "r": rank})
