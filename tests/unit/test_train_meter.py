"""What a process holds, held and may hold; what layers recompute; what an optimizer takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tunewright.core.example import Example, Group
from tunewright.core.spec import parse_bytes, parse_spec
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.models.recompute import set_checkpointing
from tunewright.ops.packing import collate
from tunewright.train import meter
from tunewright.train.fit import heaviest
from tunewright.train.optim.adamw import AdamW
from tunewright.train.preflight import probe_optimizer

MB = 1_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the mark")
def test_the_peak_is_seen_forgotten_and_kept_by_the_one_who_asked() -> None:
    """In a process of its own: what other tests did to the allocator decides whether memory is given back."""
    found = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=120, check=True)
    seen, forgotten, kept = (int(word) for word in found.stdout.split())
    assert seen > 90 * MB and kept > 90 * MB
    assert forgotten < 50 * MB


PEAKS = """
import numpy as np
from tunewright.train import meter

peak = meter.Peak()
meter.release()
before = meter.reset() and meter.resident()
block = np.ones(100_000_000, np.uint8)
del block
seen = meter.peak() - before
peak.restart()
print(seen, meter.peak() - before, peak.so_far() - before)
"""


def test_the_job_s_own_limit_counts_when_it_is_the_smallest() -> None:
    assert meter.limit(300 * MB) == 300 * MB
    assert meter.limit(1 << 60) == meter.limit(None) or meter.limit(1 << 60) < 1 << 60


@pytest.mark.parametrize(
    ("names", "most"), [(("memory.max", "memory.current", "inactive_file"), "500"),
                        (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), "500")]
)  # fmt: skip
def test_a_control_group_s_limit_counts_without_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], most: str
) -> None:
    (tmp_path / names[0]).write_text(f"{most}\n")
    (tmp_path / names[1]).write_text("400\n")
    (tmp_path / "memory.stat").write_text(f"anon 300\n{names[2]} 100\n")
    monkeypatch.setattr(meter, "_group_folders", lambda: [tmp_path, tmp_path / "none"])
    assert meter._group_room() == [200]
    (tmp_path / names[0]).write_text("max\n")
    assert meter._group_room() == []


@pytest.mark.parametrize(
    ("text", "expected"), [("4GB", 4e9), ("1.5 GiB", 1.5 * 2**30), ("512m", 512e6), ("1000", 1000), (7, 7)]
)
def test_amounts_of_memory_are_read(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


def test_a_wrong_amount_names_the_field_and_examples() -> None:
    with pytest.raises(Exception, match=r"max_memory: 'lots' is not an amount of memory; examples: 4GB"):
        parse_spec({"model": "m", "training_file": "f", "max_memory": "lots"})


def test_recomputed_layers_give_the_same_bits(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    policy = Policy(model)
    batch = collate([Group((Example(tuple(range(5, 45)), (1.0,) * 40),))])
    seen = []
    for choice, layers in (("none", 0), ("selective", 1), ("full", 2)):
        assert set_checkpointing(model, choice) == layers
        model.train()
        model.zero_grad()
        loss = policy.token_stats(batch, {"logp"})["logp"].sum()
        loss.backward()
        seen.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_heaviest_micro_batch_is_full_and_no_larger_than_a_step() -> None:
    groups = [Group((Example((1,) * n, (1.0,) * n, n),)) for n in (10, 90, 50, 40, 60)]
    assert [g.n_tokens for g in heaviest(groups, 150, 8)] == [90, 60]
    assert [g.n_tokens for g in heaviest(groups, 160, 8)] == [90, 60, 10]
    assert [g.n_tokens for g in heaviest(groups, 1000, 2)] == [90, 60]
    assert [g.n_tokens for g in heaviest(groups, 20, 8)] == [90]


def test_an_optimizer_s_memory_is_known_without_touching_the_weights() -> None:
    parameters = {str(i): nn.Parameter(torch.randn(64, 32)) for i in range(5)} | {"v": nn.Parameter(torch.randn(64))}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    options = AdamW.Options()
    found, seconds = probe_optimizer(lambda p: AdamW.build(p, 1e-3, options), parameters)
    real = AdamW.build(parameters, 1e-3, options)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in parameters.items())
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    real.step()
    held = sum(v.numel() * v.element_size() for s in real.state.values() for v in s.values())
    assert found == pytest.approx(held, rel=0.01) and seconds > 0
