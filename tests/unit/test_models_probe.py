"""What a model must show before it is run: in half precision rounding is told from being wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright.core.errors import UserError
from tunewright.models import probe
from tunewright.models.layouts import PACKED, layout_of
from tunewright.models.loader import load_model


def test_what_is_only_rounded_runs_packed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights of which training has made that they grow each rounding: bfloat16 alone would refuse them."""
    seen: list[torch.dtype] = []
    ours = probe._ours

    def watched(model: Any, *rest: Any) -> Any:
        seen.append(model.dtype)
        return ours(model, *rest)

    monkeypatch.setattr(probe, "_LOOSE", 1e-6)
    monkeypatch.setattr(probe, "_ours", watched)
    model: Any = load_model(tiny_model_dir, torch.bfloat16)
    assert layout_of(model) == PACKED and model.dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_what_is_wrong_in_float32_too_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = probe._ours

    def swapped(*given: Any) -> Any:
        hidden, answers = ours(*given)
        return [h.roll(1, 0) for h in hidden], answers

    monkeypatch.setattr(probe, "_ours", swapped)
    with pytest.raises(UserError, match="a row's hidden states are not those that it has alone"):
        load_model(tiny_model_dir, torch.bfloat16)
