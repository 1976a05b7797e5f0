"""Our preference losses are TRL's: against values that TRL 1.16 gave, and, in `make nightly`, against TRL itself.

The values are in trl_preferences.json. They belong to the tiny models of tests/tiny.py; the nightly test says when they
are out of date, and writes new ones with TUNEWRIGHT_WRITE=1.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import instance
from test_preferences import Given, pairs, step
from torch import nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.packing import collate
from tunewright.train.reference import Reference

VALUES = Path(__file__).with_name("trl_preferences.json")
SCRIPT = Path(__file__).with_name("trl_preferences.py")
PYTHON = Path(__file__).parents[2] / "benchmarks" / ".venv-trl" / "bin" / "python"
LOGPS = [[-0.7, -1.9], [-2.5, -0.2], [-12.0, -11.5], [-0.01, -6.0]]
OBJECTIVE = {"ipo": ("dpo", {"loss": "ipo"})}


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy and the reference."""
    return tiny_model_dir, tiny.build_tiny_model(tmp_path_factory.mktemp("reference"), seed=1)


def marked() -> list[Group]:
    """The answers of the pairs, one by one, every third a bad one."""
    examples = [e for g in pairs(6) for e in g.examples]
    return [Group((Example(e.ids, e.weights, i, wanted=i % 3 > 0),)) for i, e in enumerate(examples, 1)]


def prompt(example: Example) -> int:
    return example.weights.index(1.0)


def task(folders: tuple[Path, Path]) -> dict[str, Any]:
    """The same for TRL."""
    of_pairs = []
    for group in pairs(6):
        chosen, rejected = group.examples
        answers = {"chosen_ids": chosen.ids[group.prefix :], "rejected_ids": rejected.ids[group.prefix :]}
        of_pairs.append({"prompt_ids": chosen.ids[: group.prefix], **answers})
    of_marked = []
    rows = [g.examples[0] for g in marked()]
    longest = max(len(e.ids) for e in rows)
    for own, other in zip(rows, rows[1:] + rows[:1], strict=True):
        asked, others = own.ids[: prompt(own)], other.ids[prompt(other) :]
        of_marked.append(
            {"prompt_ids": asked, "completion_ids": own.ids[prompt(own) :], "label": own.wanted,
             "KL_completion_ids": others[: longest - len(asked)]}
        )  # fmt: skip
    policy, reference = map(str, folders)
    return {"policy": policy, "reference": reference, "pairs": of_pairs, "marked": of_marked, "logps": LOGPS}


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return json.loads(VALUES.read_text())


@pytest.mark.parametrize("case", ["dpo", "ipo", "kto"])
def test_loss_and_gradient_are_those_of_trl(case: str, folders: tuple[Path, Path], known: dict[str, Any]) -> None:
    name, options = OBJECTIVE.get(case, (case, {}))
    policy, reference = folders[::-1] if case == "kto" else folders
    model: nn.Module = load_model(policy)
    objective = instance(OBJECTIVES, name, **options)
    objective.reference = Reference(Policy(load_model(reference)))
    loss, means = step(objective, model, marked() if case == "kto" else pairs(6), 60)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert loss.item() == pytest.approx(known[case]["loss"], rel=1e-5)
    assert norm.item() == pytest.approx(known[case]["grad_norm"], rel=1e-4)
    assert case != "kto" or means["kl"] > 0


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_functions_of_log_probabilities_are_those_of_trl(name: str, known: dict[str, Any]) -> None:
    """Answers of one token, so that sums are means. CPO's and ORPO's supervised part is ours to add."""
    for (chosen, rejected), want in zip(LOGPS, known[name], strict=True):
        examples = tuple(Example((1, 2), (0.0, 1.0), source=1) for _ in range(2))
        batch = collate([Group(examples)])
        given = Given(torch.tensor([chosen, 0.0, rejected, 0.0]))
        supervised = 0.0 if name == "simpo" else -chosen
        loss = instance(OBJECTIVES, name)(given, batch)["loss"].total.item()
        assert loss - supervised == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_values_are_what_trl_says(folders: tuple[Path, Path], tmp_path: Path, known: dict[str, Any]) -> None:
    if not PYTHON.exists():
        pytest.skip("the environment with TRL is not there: run `python -m benchmarks.venv`")
    given, out = tmp_path / "task.json", tmp_path / "out.json"
    given.write_text(json.dumps(task(folders)))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(SCRIPT), str(given), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    if os.environ.get("TUNEWRIGHT_WRITE"):
        VALUES.write_text(out.read_text())
    found = json.loads(out.read_text())
    assert set(found) == set(known)
    for case, values in found.items():
        assert values == pytest.approx(known[case], rel=1e-5), case
