"""The memory that a job predicts before step 1 is what it then takes, with every tuner and what goes beside it.

A process takes some 360 MB before it does anything, which would hide an error of a small model. So what is compared is
what a job takes above that: weights, gradients, optimizer, activations, copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import SPEC, Machine

import tiny
from tunewright.core.spec import extra_files, parse_spec
from tunewright.jobs.prepare import create_run
from tunewright.train.optim import OPTIMIZERS
from tunewright.train.retain import RETAIN
from tunewright.tuners import TUNERS

pytestmark = [pytest.mark.slow]
# 15 million parameters; a micro-batch of four rows of some 350 tokens takes 0.4 to 1 GB
MODEL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096}
MODEL |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 1024}
JOB = {"n_epochs": 1, "batch_size": 4, "micro_batch_tokens": 2048, "save_every_steps": 100, "path": "plain"}
OPTIONS: dict[str, dict[str, Any]] = {"bitfit": {"add_biases": True}}
OLD = "old.jsonl"


def tuner(name: str) -> dict[str, Any]:
    return {"tuner": {"name": name, **OPTIONS.get(name, {})}}


def jobs() -> Iterator[dict[str, Any]]:
    yield from (tuner(name) for name in TUNERS)
    for name in RETAIN:
        rows = {"file": OLD} if RETAIN.load(name).card.rows == "required" else {}
        yield from ({**tuner(t), "retain": [{"name": name, **rows}]} for t in ("lora", "full", "fishmask"))
    yield from ({**tuner("full"), "optimizer": name} for name in OPTIMIZERS if name != "adamw")
    for held in ("nf4", "int8"):
        yield from ({**tuner(t), "quantization": held} for t in TUNERS if TUNERS.load(t).card.works_on_nf4)


def marked(job: dict[str, Any]) -> Any:
    words = [str(v if isinstance(v, str) else (v[0] if isinstance(v, list) else v)["name"]) for v in job.values()]
    return pytest.param(job, id="-".join(words), marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, bitsandbytes: Path) -> Iterator[Machine]:
    root = tmp_path_factory.mktemp("memory")
    paths = [str(bitsandbytes), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        made = Machine(root / "home", tiny.build_tiny_model(root / "model", **MODEL))
    asked, answer = "count " * 60, "on " * 40
    rows = [
        {"messages": [{"role": "user", "content": f"{i} {asked}"}, {"role": "assistant", "content": answer}]}
        for i in range(12)
    ]
    made.train = tiny.write_rows(made.train, rows)
    yield made
    made.close()


def error_of(machine: Machine, job: dict[str, Any]) -> float:
    """Predicted over measured bytes, both above what the process had before, minus 1."""
    spec = parse_spec({**SPEC, **JOB, **job})
    more = dict.fromkeys(extra_files(spec), machine.train)
    run = create_run(machine.home, spec, train_path=machine.train, validation_path=machine.valid, more=more)
    machine.finish(run)
    end, before = run.end(), machine.counts()["bytes at the start"]
    assert end is not None
    predicted, measured = (end.data[k] - before for k in ("predicted_peak_memory_bytes", "peak_memory_bytes"))
    assert measured > 300e6, "too small to say anything"
    return predicted / measured - 1


@pytest.mark.parametrize("job", [pytest.param(tuner("lora"), id="one"), *map(marked, jobs())])
def test_predicted_is_measured_within_15_percent(machine: Machine, job: dict[str, Any]) -> None:
    assert abs(error_of(machine, job)) < 0.15
