"""A job's run folder stands on its own: data, seed, name, and what it continues from."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from pathlib import Path

import pytest
from jobs_kit import add_base

from tunewright.core.durable import discard, write_json
from tunewright.core.errors import DiskFull, ModelNotFound, NotFound, SpecError, StateError
from tunewright.core.home import Home
from tunewright.core.ids import parse_model_name
from tunewright.core.run import BASE_IS_START, Artefact, Run, list_runs
from tunewright.core.spec import JobSpec, parse_spec
from tunewright.jobs import prepare
from tunewright.jobs.prepare import create_run, sweep_unfinished

ROWS = b'{"messages": [{"role": "user", "content": "x"}]}\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "My Data.JSONL"
    path.write_bytes(ROWS)
    return path


def spec(model: str = "base-1b", **fields: object) -> JobSpec:
    return parse_spec({"model": model, "training_file": "t", **fields})


def put_artefact(run: Run, folder: Path, kind: str, base: str | None) -> None:
    folder.mkdir(parents=True)
    artefact = Artefact(kind=kind, name=run.job().name, base=base, tuner={"name": "lora"}, step=10)
    write_json(folder / "artefact.json", artefact.model_dump())
    (folder / "adapter_model.safetensors").write_bytes(b"weights of " + run.id.encode())


def test_a_run_has_its_own_copy_of_the_data(home: Home, data: Path) -> None:
    add_base(home)
    run = create_run(home, spec(suffix="mine"), train_path=data, validation_path=data, names={"train": "a.csv"})
    job = run.job()
    digest = hashlib.sha256(ROWS).hexdigest()
    assert (job.train, job.validation) == (f"data/{digest}.csv", f"data/{digest}.jsonl")
    assert job.sources["train"] == {"name": "a.csv", "sha256": digest, "bytes": len(ROWS)}
    assert job.sources["validation"]["name"] == "My Data.JSONL"
    data.write_bytes(b"changed afterwards")
    assert (run.folder / job.train).read_bytes() == ROWS
    name = parse_model_name(job.name)
    assert name is not None and (name.base, name.org, name.suffix) == ("base-1b", "personal", "mine")
    assert (job.id, job.base, job.start) == (run.id, "base-1b", None)
    assert [r.id for r in list_runs(home)] == [run.id]
    assert sorted(p.name for p in (run.folder / "data").iterdir()) == [f"{digest}.csv", f"{digest}.jsonl"]


def test_the_seed_is_drawn_once_and_written_down(home: Home, data: Path) -> None:
    add_base(home)
    seeds = [create_run(home, spec(), train_path=data).job().spec.seed for _ in range(3)]
    assert len(set(seeds)) == 3 and all(s is not None and 0 <= s < 1 << 31 for s in seeds)
    assert create_run(home, spec(seed=0), train_path=data).job().spec.seed == 0


def test_bases_are_named_shortly(home: Home, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my model:v1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    gguf = tmp_path / "small.Q4.gguf"
    gguf.write_bytes(b"")
    for model, short, base in (
        (str(folder), "my-model-v1", str(folder)),
        (str(gguf), "small.Q4", str(gguf)),
        ("org/Model-1B", "org--Model-1B", "org/Model-1B"),
    ):
        job = create_run(home, spec(model), train_path=data).job()
        assert re.fullmatch(f"ft:{re.escape(short)}:personal::[A-Za-z0-9]{{8}}", job.name), job.name
        assert job.base == base


def test_continuing_keeps_the_base_and_takes_the_parent_along(home: Home, data: Path) -> None:
    add_base(home)
    parent = create_run(home, spec(), train_path=data)
    put_artefact(parent, parent.result, "adapter", "base-1b")
    put_artefact(parent, parent.checkpoint(7) / "artefact", "adapter", "base-1b")
    for model in (parent.job().name, f"{parent.job().name}:ckpt-step-7"):
        child = create_run(home, spec(model, suffix="two"), train_path=data)
        job = child.job()
        assert (job.base, job.start, job.spec.model) == ("base-1b", "start", model)
        assert job.name.startswith("ft:base-1b:personal:two:")
    discard(parent.folder)
    kept = child.folder / "start" / "adapter_model.safetensors"
    assert kept.read_bytes() == b"weights of " + parent.id.encode()
    with pytest.raises(ModelNotFound):
        create_run(home, spec(parent.job().name if parent.folder.exists() else "ft:a:b::abcdefgh"), train_path=data)


def test_a_base_that_lies_in_another_run_comes_along_too(home: Home, data: Path) -> None:
    add_base(home)
    first = create_run(home, spec(), train_path=data)
    put_artefact(first, first.result, "weights", None)
    second = create_run(home, spec(first.job().name), train_path=data)
    assert second.job().base == "base-1b"
    put_artefact(second, second.result, "adapter", BASE_IS_START)
    third = create_run(home, spec(second.job().name), train_path=data)
    discard(first.folder)
    discard(second.folder)
    base = Path(third.job().base)
    assert base == third.folder / "base"
    assert (base / "adapter_model.safetensors").read_bytes() == b"weights of " + first.id.encode()
    assert third.job().name.startswith("ft:base-1b:")


def test_what_is_missing_is_said_and_nothing_is_left(home: Home, data: Path, tmp_path: Path) -> None:
    add_base(home)
    with pytest.raises(NotFound, match=r"There is no file '.*nothing.jsonl'") as missing:
        create_run(home, spec(), train_path=data, validation_path=tmp_path / "nothing.jsonl")
    assert missing.value.param == "validation_file"
    with pytest.raises(ModelNotFound, match="Did you mean 'base-1b'"):
        create_run(home, spec("base-2b"), train_path=data)
    assert list(home.runs.iterdir()) == []


def test_a_full_disk_leaves_nothing(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_base(home)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare.shutil, "copyfile", full)
    with pytest.raises(DiskFull, match="The disk is full"):
        create_run(home, spec(), train_path=data)
    assert list(home.runs.iterdir()) == []


def test_a_job_that_nobody_heard_of_gives_way_but_never_one_that_began(home: Home, data: Path) -> None:
    add_base(home)
    first = create_run(home, spec(), job_id="ftjob-same", train_path=data)
    name = first.job().name
    again = create_run(home, spec(), job_id="ftjob-same", train_path=data)
    assert again.job().name != name
    again.attempt(1).mkdir(parents=True)
    with pytest.raises(StateError, match="exists already"):
        create_run(home, spec(), job_id="ftjob-same", train_path=data)


def test_only_old_unfinished_folders_are_swept(home: Home, data: Path) -> None:
    add_base(home)
    run = create_run(home, spec(), train_path=data)
    for name in ("ftjob-old", "ftjob-new", ".trash-x"):
        (home.runs / name / "data").mkdir(parents=True)
    before = time.time() - 25 * 3600
    for path in (run.folder, home.runs / "ftjob-old", home.runs / ".trash-x"):
        os.utime(path, (before, before))
    sweep_unfinished(home)
    assert {p.name for p in home.runs.iterdir()} == {run.id, "ftjob-new"}


def test_files_of_other_roles_come_along(home: Home, data: Path, tmp_path: Path) -> None:
    add_base(home)
    old = tmp_path / "old.jsonl"
    old.write_bytes(ROWS * 2)
    fields = {"retain": {"name": "replay", "file": "file-1"}, "mix": ["file-2"]}
    more = {"retain-1": old, "mix-1": data}
    job = create_run(home, spec(**fields), train_path=data, more=more, names={"retain-1": "old rows.jsonl"}).job()
    assert job.more.keys() == more.keys() and job.file("mix-1") == job.file("train") == job.train
    digest = hashlib.sha256(ROWS * 2).hexdigest()
    assert job.more["retain-1"] == f"data/{digest}.jsonl" and job.sources["retain-1"]["name"] == "old rows.jsonl"
    assert job.spec.retain[0].options["file"] == "file-1"
    with pytest.raises(NotFound) as caught:
        create_run(home, spec(**fields), train_path=data, more={**more, "retain-1": tmp_path / "none"})
    assert caught.value.param == "retain"
    with pytest.raises(SpecError, match="mix-1 were not given"):
        create_run(home, spec(**fields), train_path=data, more={"retain-1": old})
