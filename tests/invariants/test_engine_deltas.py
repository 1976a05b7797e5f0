"""Deltas as the engine serves them: the same tokens as transformers with the delta set, beside the base and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine_kit as kit
from tunewright.core.errors import CheckpointError
from tunewright.core.home import Home
from tunewright.engine.engine import Engine
from tunewright.engine.linear import ServeLinear
from tunewright.engine.scheduler import Limits
from tunewright.tuners.delta import ADDED, CONFIG, SPARSE, WHOLE, Delta, Piece, merge_delta, save_delta

EMBEDDING, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """Random deltas of each kind, strong enough to change the answers, and a LoRA adapter."""
    g = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in kit.hf_model(model_dir).named_parameters()}
    at = torch.randperm(shapes[EMBEDDING].numel(), generator=g)[:3000].sort().values.int()
    layer = f"{UP}.weight".replace("layers.0", "layers.1")
    kinds: dict[str, Delta] = {
        "sparse": {EMBEDDING: Piece(SPARSE, tuple(shapes[EMBEDDING]), torch.randn(3000, generator=g), at)},
        "biases": {f"{UP}.bias": Piece(ADDED, (shapes[f"{UP}.weight"][0],), torch.randn(128, generator=g))},
        "whole": {
            layer: Piece(WHOLE, tuple(shapes[layer]), torch.randn(shapes[layer], generator=g)),
            NORM: Piece(WHOLE, tuple(shapes[NORM]), torch.rand(shapes[NORM], generator=g)),
        },
    }
    made = {}
    for name, delta in kinds.items():
        made[name] = tmp_path_factory.mktemp(name)
        save_delta(made[name], kit.BASE, delta)
        kit.write_artefact(made[name], "delta", kit.BASE)
    return {**made, "lora": kit.make_adapter(tmp_path_factory.mktemp("lora"), model_dir, 3)}


def reference(model_dir: Path, artefact: Path | None, prompt: list[int]) -> list[int]:
    model = kit.hf_model(model_dir)
    if artefact is not None:
        delta = (artefact / CONFIG).exists()
        model = merge_delta(model, artefact) if delta else kit.hf_adapted(model_dir, artefact)
    return kit.reference(model, prompt, 16)


def test_deltas_base_and_adapters_answer_side_by_side(
    lively_home: Home, model_dir: Path, artefacts: dict[str, Path]
) -> None:
    engine = Engine(lively_home, dtype="float32", threads=1)
    prompts = [kit.random_prompt(9, seed) for seed in range(2)]
    asked = [(p, a) for p in prompts for a in (None, *artefacts.values())]
    requests = [kit.ask(p, 16, **({} if a is None else {"artefact": str(a)})) for p, a in asked]
    answers = [kit.tokens(log) for log in kit.run_all(engine, requests, spread=1)]
    wanted = [reference(model_dir, a, p) for p, a in asked]
    assert answers == wanted
    assert len({tuple(a) for a in answers}) == len(answers)


def held(net: Any) -> dict[str, int]:
    """Where each weight lies in memory."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, ServeLinear)}
    packed = {f"{n}.packed": id(m.packed) for n, m in layers.items() if m.packed is not None}
    return {**{n: p.data_ptr() for n, p in net.named_parameters(remove_duplicate=False)}, **packed}


@pytest.mark.parametrize("first", ["base", "delta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_delta_does_not_change_lies_in_memory_once(
    lively_home: Home, artefacts: dict[str, Path], first: str, dtype: str
) -> None:
    engine = Engine(lively_home, dtype=dtype, threads=1, limits=Limits(max_models=8))
    requests = [{}, *({"artefact": str(artefacts[name])} for name in ("biases", "whole", "sparse"))]
    for extra in requests if first == "base" else requests[::-1]:
        kit.answer(engine, kit.ask([5, 6, 7], 2, **extra))
    models = {
        next((n for n in artefacts if str(artefacts[n]) in key), "base"): held(m.net)
        for key, m in engine.artefacts.models.items()
    }
    assert len(models) == 4
    base = models["base"]
    own = {
        name: {key.rpartition(".")[0] for key, where in found.items() if base.get(key) != where}
        for name, found in models.items()
    }
    assert own["base"] == set()
    assert own["biases"] == {UP}  # the added bias
    assert own["whole"] == {UP.replace("layers.0", "layers.1"), "model.norm"}
    assert own["sparse"] == {"model.embed_tokens", "lm_head"}


def test_a_damaged_delta_is_one_clear_error(lively_home: Home, artefacts: dict[str, Path], tmp_path: Path) -> None:
    engine = Engine(lively_home, dtype="float32", threads=1)
    save_delta(tmp_path, kit.BASE, {"model.nothing": Piece(WHOLE, (3,), torch.zeros(3))})
    kit.write_artefact(tmp_path, "delta", kit.BASE)
    log = kit.run_all(engine, [kit.ask([5], 2, artefact=str(tmp_path))])[0]
    assert "does not fit its base model" in str(log[-1])
    assert kit.answer(engine, kit.ask([5, 6], 2))


def test_the_base_is_as_it_was(model_dir: Path, artefacts: dict[str, Path]) -> None:
    model: nn.Module = kit.hf_model(model_dir)
    with pytest.raises(CheckpointError):
        merge_delta(model, artefacts["lora"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kit.hf_model(model_dir).parameters(), strict=True))
