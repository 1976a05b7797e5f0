"""Killed and resumed = uninterrupted: the same loss at every step and the same weights, with real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import STEPS, Machine, story

import tiny
from tunewright.core.home import Home
from tunewright.core.run import list_recipes, read_artefact
from tunewright.engine.recipes.base import read_rows
from tunewright.ops.kernels import Kernels

pytestmark = pytest.mark.slow
# found by looking: the tiny rows have about 40 to 110 tokens, so this leaves one or two of them in a micro-batch
OOM = [7, 130]


class Golden:
    """The uninterrupted runs: what they say, how often they came by each place, how long they took."""

    def __init__(self, machine: Machine, spec: dict[str, Any] | None = None, **faults: Any) -> None:
        self.machine = machine
        self.spec = spec or {}
        self.faults = faults
        run = machine.new_run(**self.spec)
        started = time.monotonic()
        machine.finish(run, **faults)
        self.seconds = time.monotonic() - started
        self.counts = machine.counts()
        self.story = story(run)
        self.plan = run.plan() or {}
        assert [s[0] for s in self.story[0]] == list(range(1, STEPS + 1))

    def check(self, *attempts: dict[str, Any]) -> None:
        """The same job, with these faults in its attempts, and then left alone."""
        run = self.machine.new_run(**self.spec)
        for faults in attempts:
            assert self.machine.attempt(run, **self.faults, **faults) in (-signal.SIGKILL, 0)
        self.machine.finish(run, **self.faults)
        assert story(run) == self.story
        if run.attempts()[1:]:
            assert any(e.type == "resumed" for e in run.events())
        assert (run.plan() or {})["halvings"] == self.plan["halvings"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("golden"), tiny_model_dir)
    yield made
    made.close()


@pytest.fixture(scope="module")
def golden(machine: Machine) -> Golden:
    return Golden(machine)


@pytest.fixture(scope="module")
def halved(machine: Machine) -> Golden:
    found = Golden(machine, oom=OOM)
    halvings = found.plan["halvings"]
    assert halvings and halvings[0]["step"] >= OOM[0] and halvings[-1]["micro_batch_tokens"] < 256
    return found


def killed(golden: Golden, place: str, moment: int) -> dict[str, Any]:
    """Killed before a drawn call in `place`, which the uninterrupted run came by so often."""
    return {"kill": [place, random.Random(f"{place}/{moment}").randint(1, golden.counts[place])]}


@pytest.mark.parametrize("moment", range(5))
def test_killed_inside_a_save(golden: Golden, moment: int) -> None:
    golden.check(killed(golden, "save", moment))


@pytest.mark.parametrize(("place", "moment"), [("pack", 0), ("pack", 1), ("pack", 2), ("validate", 0), ("validate", 1)])
def test_killed_while_packing_or_validating(golden: Golden, place: str, moment: int) -> None:
    golden.check(killed(golden, place, moment))


@pytest.mark.parametrize(("place", "moment"), [("save", 5), ("save", 6), ("pack", 5), ("pack", 6), ("validate", 5)])
def test_killed_after_memory_ran_out(halved: Golden, place: str, moment: int) -> None:
    """The later half of the calls, so that the halving came before; the resumed attempt obeys it."""
    n = halved.counts[place]
    at = random.Random(f"{place}/{moment}").randint(n // 2 + 1, n)
    halved.check({"kill": [place, at]})


@pytest.mark.parametrize("moment", range(5))
def test_killed_at_any_time(golden: Golden, moment: int) -> None:
    """From outside, after a drawn time; the last moment is killed twice."""
    draw = random.Random(f"any/{moment}")
    times = [draw.uniform(0.05, 0.95) for _ in range(2 if moment == 4 else 1)]
    golden.check(*({"kill_after": t * golden.seconds} for t in times))


def test_sigterm_saves_and_the_next_attempt_goes_on(golden: Golden) -> None:
    run = golden.machine.new_run()
    assert golden.machine.attempt(run, term_at=5) == 75
    end = run.end()
    assert end is not None and end.data["status"] == "interrupted"
    golden.machine.finish(run)
    assert story(run) == golden.story


def test_a_damaged_checkpoint_is_set_aside(golden: Golden) -> None:
    """A flipped bit in the newest checkpoint: the one before it is used, with a warning; the result is the same."""
    run = golden.machine.new_run()
    assert golden.machine.attempt(run, kill=["pack", golden.counts["pack"] * 3 // 4]) == -signal.SIGKILL
    newest = max(p for p in run.checkpoints.iterdir() if p.name.startswith("step-") and "." not in p.name)
    victim = newest / "artefact" / "adapter_model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-5] ^= 1
    victim.write_bytes(raw)
    golden.machine.finish(run)
    assert story(run) == golden.story
    assert any("damaged" in e.message and e.level == "warn" for e in run.events())
    assert newest.with_name(f"{newest.name}.damaged").exists()


@pytest.fixture(scope="module")
def on_tiles(tmp_path_factory: pytest.TempPathFactory, kernels: Kernels) -> Iterator[Machine]:
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    root = tmp_path_factory.mktemp("tiles")
    made = Machine(root / "home", tiny.build_tiny_model(root / "model", **tiny.TILED))
    yield made
    made.close()


def test_the_fast_path_on_tiles_is_as_exact(on_tiles: Machine) -> None:
    """In bfloat16, killed in saves, between micro-batches, and after memory ran out."""
    for faults in ({}, {"oom": OOM}):
        golden = Golden(on_tiles, {"dtype": "bfloat16", "threads": 2}, **faults)
        assert golden.plan["versions"]["kernels"] == "tiles"
        golden.check(killed(golden, "save", 0), killed(golden, "pack", 0))
        golden.check(killed(golden, "pack", 1))


@pytest.mark.nightly
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_over_a_quantised_base_is_as_exact(
    tmp_path: Path, tiny_model_dir: Path, bitsandbytes: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    paths = [str(bitsandbytes), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    machine = Machine(tmp_path, tiny_model_dir)
    try:
        golden = Golden(machine, {"quantization": quantization})
        assert golden.plan["quantization"] == quantization
        golden.check(killed(golden, "save", 0), killed(golden, "pack", 0))
    finally:
        machine.close()


CHOOSING = [{"name": "fishmask", "k": 400}, {"name": "half", "round_steps": 4}]


@pytest.mark.parametrize("tuner", CHOOSING, ids=[t["name"] for t in CHOOSING])
def test_deltas_and_whole_weights_are_as_exact(machine: Machine, tuner: dict[str, Any]) -> None:
    """Killed in the saves (the first is that of what was chosen) and between steps."""
    golden = Golden(machine, {"tuner": tuner, "optimizer": {"name": "adamw", "weight_decay": 0.1}})
    golden.check({"kill": ["save", 1]}, killed(golden, "save", 1), killed(golden, "pack", 1))


def test_answers_of_its_own_are_as_exact(machine: Machine) -> None:
    """Killed in saves, between steps and at any time, which is mostly while it samples answers."""
    grader = {
        "type": "text_similarity", "name": "alike", "evaluation_metric": "fuzzy_match",
        "input": "{{ sample.output_text }}", "reference": "{{ item.reference_answer }}",
    }  # fmt: skip
    part = {"name": "grpo", "grader": grader, "group_size": 4, "max_completion_tokens": 8}
    golden = Golden(machine, {"objective": part})
    for moment in range(3):
        later = {"kill_after": random.Random(f"answers/{moment}").uniform(0.2, 0.9) * golden.seconds}
        golden.check(killed(golden, ("save", "pack", "save")[moment], moment), later)


KILLED_RECIPE = """
import os, signal, sys

left = int(sys.argv.pop(1))

def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for name in ("fsync", "rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
from tunewright.cli.main import main
sys.exit(main())
"""


def test_a_recipe_is_there_whole_or_not_at_all(tiny_home: Home, sft_file: Any, tmp_path: Path) -> None:
    """Killed before every call that makes its files durable, then made to the end; what was there before stays."""
    data = sft_file(tmp_path, 12)
    command = ["recipe", "create", "few_shot", "--model", "tiny", "--data", str(data), "--home", str(tiny_home.root)]

    def make(n: int) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, "-c", KILLED_RECIPE, str(n), *command]
        return subprocess.run(script, capture_output=True, text=True, check=False)

    assert make(0).returncode == 0
    whole, killed = list_recipes(tiny_home), 0
    while (done := make(killed + 1)).returncode == -signal.SIGKILL:
        killed += 1
        found = list_recipes(tiny_home)
        assert set(whole) <= set(found) and len(found) <= len(whole) + 1
        whole = found
        assert all(read_artefact(f).kind == "recipe" and len(read_rows(f)) == 12 for f in whole)
    assert killed >= 5 and done.returncode == 0, done.stderr
    assert len(list_recipes(tiny_home)) == len(whole) + 1
