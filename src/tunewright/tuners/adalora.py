"""AdaLoRA: W x + (alpha / r0) B (E * A) x, where triplets (row of A, number of E, column of B) compete for a budget
over all layers that shrinks while training (Zhang et al. 2023, arXiv 2303.10512). peft's modules and file; the
allocation is ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunewright.core.errors import CheckpointError
from tunewright.tuners import base
from tunewright.tuners.adapter_files import WEIGHTS, check_same_shape, read_config, write_adapter
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import copy_into, read_tensors
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Targets, target_fields

SMOOTHING = 0.85  # beta_1 and beta_2 of the paper, in all its experiments


class AdaLoRA(PeftTuner):
    """Starts with initial_r triplets in every layer and ends with r on average, where they matter most.

    Importance of a weight: smoothed |w * gradient| times its smoothed deviation (equations 9 to 11). Of a triplet: that
    of its number, plus the means over its row and its column (equation 8). Taken after the update, as peft does.
    """

    class Options(base.Options):
        r: int = Field(8, ge=1, le=1024, description="triplets that a layer has in the end, on average")
        initial_r: int = Field(12, ge=1, le=1536, description="triplets that each layer has at the start")
        alpha: int = Field(32, ge=1, le=65536, description="the update's scale is alpha / initial_r")
        warmup: float = Field(0.1, ge=0, le=0.9, description="share of the steps before the budget shrinks")
        final: float = Field(0.3, ge=0, le=0.9, description="share of the steps after it has shrunk, for what is left")
        every: int = Field(1, ge=1, le=10_000, description="steps between two allocations of the budget")
        orthogonality: float = Field(
            0.5, ge=0, le=100, description="weight of the penalty on rows of A, columns of B that are not orthonormal"
        )
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"

        @model_validator(mode="after")
        def _fits(self) -> AdaLoRA.Options:
            if self.r > self.initial_r:
                raise ValueError(f"r is {self.r}, above initial_r {self.initial_r}: the budget shrinks, it never grows")
            if self.warmup + self.final >= 1:
                raise ValueError(f"warmup {self.warmup} and final {self.final} leave no steps in which to shrink")
            return self

    card: ClassVar[TunerCard] = TunerCard(
        title="AdaLoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=5e-3,
    )
    first, last = 0, 1  # the budget is whole up to `first` and at its end from `last` on (steps)

    def config(self, model: nn.Module, seed: int) -> AdaLoraConfig:
        o = self.options
        return AdaLoraConfig(
            init_r=o.initial_r,
            target_r=o.r,
            lora_alpha=o.alpha,
            lora_dropout=o.dropout,
            deltaT=o.every,
            beta1=SMOOTHING,
            beta2=SMOOTHING,
            orth_reg_weight=o.orthogonality,
            total_step=1 << 30,  # begin() says how many; peft wants to know now
            **target_fields(model, o.target_modules, "adalora"),
        )

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        wrapped = super().attach(model, seed)
        self.layers = {name: m for name, m in wrapped.named_modules() if hasattr(m, "lora_E")}
        for layer in self.layers.values():  # peft lets the number of ranks be trained where the base is not float32
            layer.ranknum["default"].requires_grad_(False)  # type: ignore[index,union-attr,operator]
        self.scores = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.triplets().items()}
        self.pruned, self.on = False, dict[str, Tensor]()
        return wrapped

    def begin(self, total_steps: int, steps_per_epoch: int) -> None:
        o: Any = self.options
        self.first = int(o.warmup * total_steps)
        self.last = max(self.first + 1, total_steps - math.ceil(o.final * total_steps))
        config: Any = self.model.peft_config["default"]
        config.total_step, config.tinit, config.tfinal = total_steps + 1, self.first, total_steps - self.last

    def triplets(self) -> dict[str, nn.Parameter]:
        """Every A, E and B."""
        return {name: p for name, p in self.trainable().items() if ".lora_" in name}

    def budget(self, step: int) -> int:
        """Triplets that may be on after a step, over all layers: cubic from all to r a layer (equation 12)."""
        n, o = len(self.layers), self.options
        left = min(1.0, max(0.0, 1 - (step - self.first) / (self.last - self.first)))
        return int(n * (o.initial_r - o.r) * left**3 + n * o.r)

    def penalty(self) -> Tensor | None:
        """orthogonality * the mean over all A and B of ||A A^T - I|| or ||B^T B - I||, Frobenius (equation 4; like peft
        the norm, not its square)."""
        if not self.options.orthogonality:
            return None
        grams = [a @ a.T for _, a, _ in self._parts()] + [b.T @ b for _, _, b in self._parts()]
        return self.options.orthogonality * torch.stack([_off_identity(g) for g in grams]).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Smooth the importances, and turn off the least important triplets when it is time."""
        if step < self.last:
            for name, p in self.triplets().items():
                self._smooth(name, p)
        if step > self.first and (step >= self.last or step % self.options.every == 0):
            self._allocate(self.budget(step), is_last=step > self.last)

    def _smooth(self, name: str, p: nn.Parameter) -> None:
        if p.grad is None:
            return
        mean, deviation = self.scores[name]
        now = (p * p.grad).abs()
        mean.lerp_(now, 1 - SMOOTHING)
        deviation.lerp_((now - mean).abs(), 1 - SMOOTHING)

    def _allocate(self, budget: int, is_last: bool) -> None:
        """Set E of all but `budget` triplets to zero. is_last: a choice that fits the budget is not made anew."""
        if not (is_last and self.on and sum(int(on.sum()) for on in self.on.values()) <= budget):
            kept = torch.cat(self._importances()).argsort(descending=True, stable=True)[:budget]
            on = torch.zeros(len(self.layers) * self.options.initial_r, dtype=torch.bool, device=kept.device)
            on[kept] = True
            self.on = dict(zip(self.layers, on.split(self.options.initial_r), strict=True))
        for (e, _, _), on in zip(self._parts(), self.on.values(), strict=True):
            e.masked_fill_(~on[:, None], 0.0)
        self.pruned = True

    def _importances(self) -> list[Tensor]:
        """[initial_r] of each layer."""
        scores = {name: mean * deviation for name, (mean, deviation) in self.scores.items()}
        return [
            scores[f"{name}.lora_E.default"][:, 0]
            + scores[f"{name}.lora_A.default"].mean(1)
            + scores[f"{name}.lora_B.default"].mean(0)
            for name in self.layers
        ]

    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(E [r, 1], A [r, in], B [out, r]) of each layer."""
        return [tuple(getattr(m, f"lora_{x}")["default"] for x in "EAB") for m in self.layers.values()]  # type: ignore

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer has at present."""
        return {name: int(on.sum()) for name, on in self._kept().items()}

    def _kept(self) -> dict[str, Tensor]:
        """[initial_r] bool of each layer: whether a triplet is in the file. All until the first allocation."""
        return {
            name: (e[:, 0] != 0) if self.pruned else torch.ones(len(e), dtype=torch.bool)
            for name, (e, _, _) in zip(self.layers, self._parts(), strict=True)
        }

    def save(self, folder: Path, base: str) -> None:
        """peft's two files. Triplets that are off are left out, and rank_pattern says which these were."""
        config: Any = self.model.peft_config["default"]
        kept = self._kept()
        prefix = "base_model.model."
        pattern = {f"{name.removeprefix(prefix)}.lora_E": on.tolist() for name, on in kept.items()}
        config.rank_pattern = pattern if self.pruned else None
        tensors = {
            key: _cut(key, t, kept[key.rpartition(".lora_")[0]]) if ".lora_" in key else t
            for key, t in self.in_file().items()
        }
        write_adapter(folder, config.to_dict(), base, tensors)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Triplets that the file has not are off. Raises as PeftTuner.load."""
        check_same_shape(self.model.peft_config["default"].to_dict(), folder)
        tensors, pattern = read_tensors(folder / WEIGHTS), read_config(folder).get("rank_pattern") or {}
        mine = self.in_file()
        for key in [k for k in tensors if ".lora_" in k and k in mine and pattern]:
            on = pattern.get(f"{key.rpartition('.lora_')[0].removeprefix('base_model.model.')}.lora_E")
            tensors[key] = _uncut(key, tensors[key], mine[key], on)
        copy_into(mine, tensors, "the adapter")
        self.pruned = bool(pattern)

    def state(self) -> dict[str, Any]:
        on = {name: on.tolist() for name, on in self.on.items()} if self.pruned else {}
        return {"on": on}

    def load_state(self, state: dict[str, Any]) -> None:
        self.pruned = bool(state["on"])
        self.on = {name: torch.tensor(on, dtype=torch.bool) for name, on in state["on"].items()}

    def tensors(self) -> dict[str, Tensor]:
        """The importances, and A, E and B whole: triplets that are off now may come back."""
        found = {f"weight|{name}": p.detach() for name, p in self.triplets().items()}
        for name, (mean, deviation) in self.scores.items():
            found |= {f"mean|{name}": mean, f"deviation|{name}": deviation}
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        copy_into(self.tensors(), tensors, "the tuner's state")


def _off_identity(gram: Tensor) -> Tensor:
    return torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))


def _cut(key: str, tensor: Tensor, on: Tensor) -> Tensor:
    return tensor[:, on] if ".lora_B" in key else tensor[on]


def _uncut(key: str, cut: Tensor, like: Tensor, on: list[bool] | None) -> Tensor:
    """The tensor with its missing rows or columns as they are in `like`, and a missing E as zero."""
    if on is None or sum(on) != cut.shape[1 if ".lora_B" in key else 0] or len(on) != like.shape[".lora_B" in key]:
        raise CheckpointError(f"The adapter's rank_pattern does not fit its tensor {key}.")
    whole = torch.zeros_like(like) if ".lora_E" in key else like.detach().clone()
    (whole.T if ".lora_B" in key else whole)[torch.tensor(on)] = cut.T if ".lora_B" in key else cut
    return whole
