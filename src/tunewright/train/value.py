"""PPO's value head beside the model: trained and resumed with the job, no part of what the job leaves."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tunewright.models.policy import Policy, head_of
from tunewright.tuners.base import Tuner

PREFIX = "value_head."


class ValueHead(nn.Module):
    """[N, D] hidden states -> [N] what is still to come. It begins at 0."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h_ND: Tensor) -> Tensor:
        with torch.autocast(h_ND.device.type, enabled=False):
            return self.linear(h_ND.float())[:, 0]


class WithValueHead:
    """A tuner that also trains the head; everything else is the tuner's."""

    def __init__(self, tuner: Tuner, head: ValueHead) -> None:
        self._tuner, self._head = tuner, head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self._tuner.trainable(), **self._own()}

    def at_once(self) -> dict[str, nn.Parameter]:
        return {**self._tuner.at_once(), **self._own()}

    def tensors(self) -> dict[str, Tensor]:
        return {**self._tuner.tensors(), **{name: p.detach().cpu().clone() for name, p in self._own().items()}}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self._own().items():
            p.copy_(tensors[name])
        self._tuner.load_tensors({k: v for k, v in tensors.items() if not k.startswith(PREFIX)})

    def _own(self) -> dict[str, nn.Parameter]:
        return {f"{PREFIX}{name}": p for name, p in self._head.named_parameters()}


def with_value_head(objective: Any, policy: Policy, tuner: Tuner) -> Tuner:
    """Give an objective that asks for one its value head; the tuner that trains it, too, or else the tuner itself."""
    if not hasattr(objective, "value_head"):
        return tuner
    objective.value_head = ValueHead(head_of(policy.model).weight.shape[1], policy.device)
    return cast(Tuner, WithValueHead(tuner, objective.value_head))
