"""Adapters combined into one: each way is its formula, what cannot be combined is told, the result is a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from tunewright.core.errors import SpecError
from tunewright.core.home import Home
from tunewright.models.loader import load_model
from tunewright.tuners import TUNERS
from tunewright.tuners.combine import combine

LAYER = "base_model.model.model.layers.0.mlp.down_proj"


def adapter(folder: Path, model: Path, seed: int, name: str = "lora", **options: Any) -> Path:
    """A saved adapter, away from where it starts."""
    part = TUNERS.load(name)
    tuner = part(part.Options(**{"r": 3, "alpha": 6, **options}))
    tuner.attach(load_model(model), seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    folder.mkdir()
    tuner.save(folder, "tiny")
    return folder


def update(folder: Path, scale: float) -> Tensor:
    """scale * B A of a layer, float64."""
    t = load_file(folder / "adapter_model.safetensors")
    return scale * t[f"{LAYER}.lora_B.weight"].double() @ t[f"{LAYER}.lora_A.weight"].double()


@pytest.fixture
def two(tmp_path: Path, tiny_model_dir: Path) -> list[Path]:
    """LoRA with scale 2 and rsLoRA with scale 6 / sqrt(3)."""
    return [adapter(tmp_path / "a", tiny_model_dir, 1), adapter(tmp_path / "b", tiny_model_dir, 2, "rslora")]


SCALES = (2.0, 6 / 3**0.5)


def combined(two: list[Path], model: Path, **options: Any) -> Path:
    target = two[0].parent / "made"
    target.mkdir()
    combine(load_model(model), two, target, base="tiny", **options)
    return target


@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("svd", 6)])
def test_cat_and_svd_are_the_weighted_sum(two: list[Path], tiny_model_dir: Path, how: str, rank: int | None) -> None:
    made = combined(two, tiny_model_dir, how=how, rank=rank, weights=[0.7, -0.4])
    wanted = 0.7 * update(two[0], SCALES[0]) - 0.4 * update(two[1], SCALES[1])
    torch.testing.assert_close(update(made, 1.0), wanted, atol=1e-5, rtol=1e-5)


def test_svd_at_a_rank_is_the_nearest_of_that_rank(two: list[Path], tiny_model_dir: Path) -> None:
    made = combined(two, tiny_model_dir, how="svd", rank=2)
    u, s, v = torch.linalg.svd((update(two[0], SCALES[0]) + update(two[1], SCALES[1])) / 2, full_matrices=False)
    torch.testing.assert_close(update(made, 1.0), u[:, :2] @ s[:2].diag() @ v[:2], atol=1e-5, rtol=1e-4)


def test_linear_sums_a_and_b_apart(two: list[Path], tiny_model_dir: Path) -> None:
    made = load_file(combined(two, tiny_model_dir, how="linear", weights=[0.5, 1.0]) / "adapter_model.safetensors")
    parts = [load_file(f / "adapter_model.safetensors") for f in two]
    for side in ("A", "B"):
        key = f"{LAYER}.lora_{side}.weight"
        factors = [(w * s) ** 0.5 for w, s in zip((0.5, 1.0), SCALES, strict=True)]
        torch.testing.assert_close(made[key], sum(f * p[key] for f, p in zip(factors, parts, strict=True)))


@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties"])
def test_pruning_keeps_a_share_and_all_of_it_is_linear_s(two: list[Path], tiny_model_dir: Path, how: str) -> None:
    made = load_file(combined(two, tiny_model_dir, how=how, density=0.3) / "adapter_model.safetensors")
    again = two[0].parent / "again"
    again.mkdir()
    combine(load_model(tiny_model_dir), two, again, how=how, density=0.3)
    same = load_file(again / "adapter_model.safetensors")
    a = made[f"{LAYER}.lora_A.weight"]
    assert 0.2 < (a != 0).float().mean() < 0.7  # of two, each kept with 0.3
    assert all(torch.equal(t, same[k]) for k, t in made.items())


def factors(weights: tuple[float, ...]) -> list[float]:
    """Of A and of B alike, so that their product has weight * scale."""
    return [(w * s) ** 0.5 for w, s in zip(weights, SCALES, strict=True)]


@pytest.mark.parametrize("side", ["A", "B"])
def test_ties_is_the_paper_s_formula_in_float64(two: list[Path], tiny_model_dir: Path, side: str) -> None:
    """Yadav et al. 2023, algorithm 1: trim to the largest entries, elect signs by mass, mean of those that agree."""
    weights, density, key = (0.5, 1.0), 0.4, f"{LAYER}.lora_{side}.weight"
    made = load_file(combined(two, tiny_model_dir, how="ties", density=density, weights=weights) / FILE)[key].double()
    trimmed = []
    for folder in two:
        t = load_file(folder / FILE)[key].double()
        least = t.abs().flatten().topk(int(density * t.numel())).values[-1]
        trimmed.append(torch.where(t.abs() >= least, t, 0.0))
    elected = torch.where(sum(trimmed) >= 0, 1.0, -1.0)
    agree = [(t.sign() == elected) for t in trimmed]
    total = sum(f * t * a for f, t, a in zip(factors(weights), trimmed, agree, strict=True))
    torch.testing.assert_close(made, total / sum(a.double() for a in agree).clamp_min(1), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_dare_keeps_an_entry_scaled_up_or_drops_it(two: list[Path], tiny_model_dir: Path) -> None:
    """Yu et al. 2023, equation 3: each entry is 0 or itself / density; the mean over draws is linear's."""
    key, draws = f"{LAYER}.lora_A.weight", 40
    original = load_file(two[0] / FILE)[key].double() * factors((1.0, 0.0))[0]
    mean = torch.zeros_like(original)
    for seed in range(draws):
        target = two[0].parent / f"draw{seed}"
        target.mkdir()
        combine(load_model(tiny_model_dir), two, target, how="dare", density=0.5, weights=[1.0, 1e-12], seed=seed)
        made = load_file(target / FILE)[key].double()
        kept = (made - original / 0.5).abs() < 1e-4
        assert (kept | (made.abs() < 1e-4)).all() and 0.35 < kept.double().mean() < 0.65
        mean += made / draws
    assert (mean - original).abs().mean() < 3 * original.abs().mean() / draws**0.5


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"how": "tie"}, "how is 'tie'; use one of: linear, cat, svd"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"density": 0.0, "how": "ties"}, "density is 0.0"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4, "how": "cat"}, "rank is 4; it is for svd"),
        ({"how": "first_ranks"}, "takes one adapter"),
    ],
)
def test_what_cannot_be_is_told(two: list[Path], tiny_model_dir: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        combined(two, tiny_model_dir, **options)


def test_adapters_that_do_not_go_together(two: list[Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    dora = adapter(tmp_path / "dora", tiny_model_dir, 3, "dora")
    wide = adapter(tmp_path / "wide", tiny_model_dir, 3, r=5)
    with pytest.raises(SpecError, match=r"method dora; only lora.*; their ranks are \[3, 3, 5\], and ties"):
        combined([two[0], dora, wide], tiny_model_dir, how="ties")


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_makes_a_model_like_any_other(
    tiny_home: Home, tiny_model_dir: Path, tmp_path: Path, capsys
) -> None:
    """Two jobs, their models merged: the new one has a name, is listed and its first answer is that of its files."""
    from tunewright.cli.main import run
    from tunewright.core.events import EventWriter
    from tunewright.core.run import find_artefact
    from tunewright.core.spec import parse_spec
    from tunewright.engine.engine import Engine
    from tunewright.jobs.prepare import create_run
    from tunewright.train.run import run_job

    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(12))
    names = []
    for seed in (1, 2):
        spec = {"model": "tiny", "training_file": str(rows), "tuner": {"name": "dylora", "r": 4}, "seed": seed}
        made = create_run(tiny_home, parse_spec({**spec, "n_epochs": 1, "threads": 1}), train_path=rows)
        run_job(made, tiny_home, EventWriter(made.attempt(1) / "events.jsonl", 1), lambda: False)
        names.append(made.job().name)
    capsys.readouterr()
    assert run(["merge", *names, "--how", "cat", "--suffix", "both", "--home", str(tiny_home.root)]) == 0
    name = capsys.readouterr().out.strip()
    assert name.startswith("ft:tiny:personal:both:")
    folder = find_artefact(tiny_home, name)
    sources = [find_artefact(tiny_home, n) for n in names]
    half = [update(f, 16 / 4) / 2 for f in sources]
    torch.testing.assert_close(update(folder, 1.0), half[0] + half[1], atol=1e-6, rtol=1e-5)
    assert run(["models", "--home", str(tiny_home.root)]) == 0
    assert name in capsys.readouterr().out
    engine = Engine(tiny_home, dtype="float32", threads=1)
    engine.load(None, str(folder))
    assert run(["merge", names[0], "--how", "first_ranks", "--rank", "2", "--home", str(tiny_home.root)]) == 0
    cut = find_artefact(tiny_home, capsys.readouterr().out.strip())
    assert load_file(cut / "adapter_model.safetensors")[f"{LAYER}.lora_A.weight"].shape[0] == 2
    assert run(["merge", *names, "--how", "first_ranks", "--home", str(tiny_home.root)]) != 0
    assert "takes one adapter" in capsys.readouterr().err
