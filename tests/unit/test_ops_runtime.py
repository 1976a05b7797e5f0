"""Seeds, threads, dtype: the same on every run."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunewright.ops import runtime


def test_step_seed_depends_on_seed_step_and_rank_only() -> None:
    def draw(*parts: int) -> tuple[float, float]:
        runtime.seed_step(*parts)
        return torch.rand(1).item(), random.random()

    with torch.random.fork_rng(devices=[]):
        state = random.getstate()
        first = draw(1, 5)
        assert draw(1, 5, 0) == first
        assert len({draw(1, 5), draw(1, 6), draw(2, 5), draw(1, 5, 1)}) == 4
        random.setstate(state)


@pytest.mark.slow
def test_derived_seed_is_the_same_in_another_process() -> None:
    code = "from tunewright.ops.runtime import derive_seed; print(derive_seed('lora', 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == runtime.derive_seed("lora", 3)
    assert runtime.derive_seed("a", "bc") != runtime.derive_seed("ab", "c")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2 avx512f", torch.float32)],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA decides first")
def test_auto_dtype_follows_the_processor(flags: str, dtype: torch.dtype, tmp_path, monkeypatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags: fpu {flags}\n")
    monkeypatch.setattr(runtime, "_CPUINFO", tmp_path / "cpuinfo")
    assert runtime.choose_dtype() == dtype


def test_a_dtype_by_name_and_an_unknown_one() -> None:
    assert runtime.choose_dtype("float32") == torch.float32
    with pytest.raises(ValueError, match=r"float8.*use one of: auto, .*float32"):
        runtime.choose_dtype("float8")


def test_quiet_restores_what_it_changed() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with runtime.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_was_read_of_a_file_is_forgotten_and_what_others_wrote_is_not(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.safetensors", 1 << 22
    save_file({"w": torch.arange(numbers, dtype=torch.float32)}, path)
    with safe_open(path, "pt") as ours, safe_open(path, "pt") as theirs:
        w, written = ours.get_slice("w")[...], theirs.get_slice("w")[...]
        written.fill_(1.0)
        total = w.sum().item()
        before = resident_files()
        runtime.forget_read([w])
        assert before - resident_files() > 3 * numbers
        assert w.sum().item() == total and written.sum().item() == numbers
        runtime.forget_read([torch.ones(5000)])


def resident_files() -> int:
    """Bytes of files in memory, as this process sees them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))
