"""Curves in TensorBoard, MLflow and Weights & Biases, read back with the tools' own readers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewright.cli.main import run as cli
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import parse_spec
from tunewright.jobs.loggers import LOGGERS
from tunewright.jobs.loggers.base import Point, feed, open_logger, parameters, points

JOB = "ftjob-abc"
CURVES = {"train_loss", "lr", "tokens_per_second", "trained_tokens"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def run(home: Home) -> Run:
    """A job whose first attempt was killed after step 6; the second went on from step 4 and ended at step 8."""
    made = Run(home.runs / JOB)
    made.folder.mkdir()
    spec = parse_spec({"model": "tiny", "training_file": "f", "tuner": {"name": "lora", "r": 4}})
    made.write_job(JobFile(id=JOB, created_at=time.time(), name="ft:tiny:me::abc", base="tiny", spec=spec, train="d"))
    made.write_plan({"batch_size": 4, "total_steps": 8, "versions": {"torch": "2"}})
    first = EventWriter(made.attempt(1) / "events.jsonl", 1)
    write_steps(first, range(1, 7), speed=100.0)
    second = EventWriter(made.attempt(2) / "events.jsonl", 2)
    second.write("resumed", "", {"step": 4})
    write_steps(second, range(5, 9), speed=200.0)
    second.write("end", "", {"status": "succeeded"})
    return made


def write_steps(events: EventWriter, steps: range, speed: float) -> None:
    for step in steps:
        data: dict[str, Any] = {"step": step, "total_steps": 8, "train_loss": loss(step), "lr": 1e-3, "eta_s": 1.0}
        data |= {"tokens_per_second": speed + step, "trained_tokens": 10 * step, "grad_norm": None}
        if step % 4 == 0:
            data["full_valid_loss"] = loss(step) + 1
        events.write("metrics", "", data)


def loss(step: int) -> float:
    return 3.0 / step


def want() -> dict[int, float]:
    return {step: loss(step) for step in range(1, 9)}


class Kept:
    """A logger that keeps points in a list, and says what it holds."""

    needs = "json"

    def __init__(self) -> None:
        self.held: list[Point] = []
        self.began = 0
        self.status: list[str | None] = []

    def begin(self, points: Any) -> int:
        self.began += 1
        self.held = []
        return 0

    def write(self, points: Any) -> None:
        self.held += points

    def close(self, status: str | None) -> None:
        self.status.append(status)

    def where(self) -> str:
        return "memory"


def test_points_are_the_lines_that_count(run: Run) -> None:
    found = points(run)
    assert [p.step for p in found] == list(range(1, 9))
    assert set(found[0].values) == CURVES and set(found[3].values) == {*CURVES, "full_valid_loss"}
    assert [p.values["tokens_per_second"] > 200 for p in found] == [False] * 4 + [True] * 4


def test_parameters_are_flat(run: Run) -> None:
    found = parameters(run)
    assert (found["spec.tuner.r"], found["plan.batch_size"], found["base"]) == (4, 4, "tiny")
    assert not any(isinstance(v, dict) for v in found.values())


def test_following_begins_again_when_steps_are_done_again(home: Home) -> None:
    """A job that is killed and resumed while it is watched."""
    run = Run(home.runs / "ftjob-live")
    run.folder.mkdir()
    first = EventWriter(run.attempt(1) / "events.jsonl", 1)
    write_steps(first, range(1, 3), 100.0)
    lines = iter([lambda: write_steps(first, range(3, 7), 100.0), lambda: resume(run)])
    logger = Kept()
    watched = Watched(run.folder, looks=3)
    n = feed(watched, logger, follow=True, wait=lambda _: next(lines)())
    assert n == len(logger.held) == 8 and logger.began == 2
    assert [p.step for p in logger.held] == list(range(1, 9))
    assert logger.status == ["succeeded"]


def resume(run: Run) -> None:
    events = EventWriter(run.attempt(2) / "events.jsonl", 2)
    events.write("resumed", "", {"step": 4})
    write_steps(events, range(5, 9), 200.0)
    events.write("end", "", {"status": "succeeded"})


class Watched(Run):
    """A run that looks active for the first looks."""

    def __init__(self, folder: Path, looks: int) -> None:
        super().__init__(folder)
        object.__setattr__(self, "looks", iter([True] * (looks - 1) + [False]))

    def is_active(self) -> bool:
        return next(self.looks)  # type: ignore[attr-defined]


def test_the_command_writes_tensorboard_files_once(run: Run, home: Home, tmp_path: Path, capsys: Any) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        assert cli(["log", JOB, "--to", "tensorboard", "--dir", str(tmp_path / "tb"), "--home", str(home.root)]) == 0
    assert "8 steps" in capsys.readouterr().out
    folder = tmp_path / "tb" / JOB
    assert len(list(folder.iterdir())) == 1
    read = reader.EventAccumulator(str(folder)).Reload()
    assert {s.step: s.value for s in read.Scalars("training/train_loss")} == pytest.approx(want())
    assert len(read.Scalars("training/train_loss")) == 8
    assert [s.step for s in read.Scalars("validation/full_valid_loss")] == [4, 8]
    assert [s.wall_time for s in read.Scalars("training/lr")] == pytest.approx([p.time for p in points(run)])
    (text,) = read.Tensors("job/text_summary") if "job/text_summary" in read.Tags()["tensors"] else read.Tensors("job")
    assert b"spec.tuner.r" in text.tensor_proto.string_val[0]


def test_tensorboard_shows_a_running_job(run: Run, tmp_path: Path) -> None:
    """Points are readable before the writer is closed, and a restart leaves nothing of the old ones."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = open_logger("tensorboard", run, tmp_path)
    found = points(run)
    logger.begin(found)
    logger.write(found[:3])
    assert len(reader.EventAccumulator(str(tmp_path / JOB)).Reload().Scalars("training/lr")) == 3
    logger.begin(found)
    logger.write(found[:2])
    assert len(reader.EventAccumulator(str(tmp_path / JOB)).Reload().Scalars("training/lr")) == 2
    logger.close(None)


@pytest.mark.slow
def test_mlflow_goes_on_where_it_was(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    part = open_logger("mlflow", run, tmp_path)
    part.write(points(run)[part.begin(points(run)) : 3])  # what a call that was killed had written
    for _ in range(2):
        assert feed(run, open_logger("mlflow", run, tmp_path), follow=False) == 8
    client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("tunewright").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == list(want().items())
    assert [m.timestamp / 1000 for m in history] == pytest.approx([p.time for p in points(run)], abs=0.01)
    assert (found.data.params["spec.tuner.r"], found.info.status) == ("4", "FINISHED")


@pytest.mark.slow
def test_mlflow_drops_steps_that_were_done_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = [Point(p.step, p.time, {**p.values, "tokens_per_second": 1.0, "train_loss": 9.0}) for p in points(run)[:6]]
    earlier = open_logger("mlflow", run, tmp_path)
    earlier.write(old[earlier.begin(old) :])
    feed(run, open_logger("mlflow", run, tmp_path), follow=False)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("tunewright").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert {m.step: m.value for m in history} == want() and len(history) == 8


@pytest.mark.slow
def test_wandb_offline_holds_each_step_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        feed(run, open_logger("wandb", run, tmp_path), follow=False)
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{JOB}/run-{JOB}.wandb")
    rows, config = read_wandb(file)
    assert {row["_step"]: row["train_loss"] for row in rows if "train_loss" in row} == pytest.approx(want())
    assert len(rows) == 8
    assert [row["_timestamp"] for row in rows] == pytest.approx([p.time for p in points(run)])
    assert config["spec.tuner.r"] == 4


def read_wandb(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(history rows, config) of an offline run's file: W&B's records in LevelDB's log format, after 7 bytes of head."""
    from wandb.proto import wandb_internal_pb2

    rows, config = [], {}
    for data in leveldb_log(path.read_bytes(), at=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    return rows, config


def leveldb_log(raw: bytes, at: int) -> Iterator[bytes]:
    """The records of a log: blocks of 32 KiB with pieces of crc (4), length (2), type (1: whole, 2 to 4: parts)."""
    parts = b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_missing_package_is_one_clear_error(
    name: str, run: Run, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    code = cli(["log", str(run.folder), "--to", name, "--home", str(home.root)])
    assert code != 0
    assert "is not installed. Install it with: pip install" in capsys.readouterr().err
    assert not (home.root / name).exists()


def test_an_unknown_job_or_tool_names_the_nearest(run: Run, home: Home, capsys: Any) -> None:
    assert cli(["log", "ftjob-abd", "--to", "tensorboard", "--home", str(home.root)]) != 0
    assert f"Did you mean '{JOB}'?" in capsys.readouterr().err
    assert cli(["log", JOB, "--to", "tensorbord", "--home", str(home.root)]) != 0
    assert "Did you mean 'tensorboard'?" in capsys.readouterr().err
