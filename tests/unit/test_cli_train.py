"""The job file and its overrides become a spec; whatever is wrong becomes one clear error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.cli import main
from tunewright.cli.commands import train
from tunewright.core.durable import write_json
from tunewright.core.errors import NotFound, SpecError, StateError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import parse_spec


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_in_a_job_file_are_relative_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ntraining_file: data/train.jsonl\nvalidation_file: /abs/valid.jsonl\n")
    spec = train.read_spec(path, [])
    assert spec.training_file == str(tmp_path / "data" / "train.jsonl")
    assert spec.validation_file == "/abs/valid.jsonl"


def test_overrides_are_yaml_values_and_reach_into_parts(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ntraining_file: t\ntuner: lora\nn_epochs: 9\n")
    overrides = ["n_epochs=2", "tuner.r=32", "tuner.alpha=64", "learning_rate=1e-3", "seed=null", "suffix=a.b"]
    spec = train.read_spec(path, overrides)
    assert (spec.n_epochs, spec.learning_rate, spec.seed, spec.suffix) == (2, 1e-3, None, "a.b")
    assert spec.tuner.name == "lora" and spec.tuner.options == {"r": 32, "alpha": 64}


def test_an_option_of_a_default_part_can_be_set_alone() -> None:
    spec = train.read_spec(None, ["model=m", "training_file=t", "tuner.r=4", "schedule.warmup=0"])
    assert (spec.tuner.name, spec.tuner.options) == ("lora", {"r": 4})
    assert (spec.schedule.name, spec.schedule.options) == ("linear", {"warmup": 0})
    spec = train.read_spec(None, ["model=m", "training_file=t", "decoding.temperature=0.5"])
    assert spec.decoding == {"temperature": 0.5}


def test_no_file_is_needed_when_fields_are_set() -> None:
    spec = train.read_spec(None, ["model=m", "training_file=t.jsonl"])
    assert (spec.model, spec.training_file) == ("m", "t.jsonl")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("model: m\ntraining_file: t\nn_epoch: 3", [], "unknown field 'n_epoch'. Did you mean 'n_epochs'?"),
        ("model: [", [], "is not valid YAML"),
        ("- a", [], "not list"),
        ("", [], "not NoneType"),
        ("model: m\ntraining_file: t", ["n_epochs"], "'--set n_epochs' is not KEY=VALUE"),
        ("model: m\ntraining_file: t", ["n_epochs=500"], "n_epochs is 500; allowed: 'auto' or 1 to 50"),
        ("model: m\ntraining_file: t", ["a.b.c=1"], "unknown field 'a'"),
        ("training_file: t", [], "the field 'model' is missing"),
    ],
)
def test_a_wrong_job_file_is_one_error(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        train.read_spec(write(tmp_path, text), overrides)
    assert expected in caught.value.message and "\n" not in caught.value.message


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml' cannot be read: No such file"):
        train.read_spec(tmp_path / "none.yaml", [])
    with pytest.raises(SpecError, match=r"tunewright train job\.yaml"):
        train.read_spec(None, [])


def make_run(home: Home, job_id: str, status: str | None) -> Run:
    run = Run(home.runs / job_id)
    run.attempt(1).mkdir(parents=True)
    spec = parse_spec({"model": "tiny", "training_file": "t"})
    name = "ft:tiny:personal::AbCd1234"
    write_json(
        run.folder / "job.json",
        JobFile(id=job_id, created_at=1.0, name=name, base="tiny", spec=spec, train="data/t").model_dump(mode="json"),
    )
    if status:
        events = EventWriter(run.attempt(1) / "events.jsonl", 1)
        events.write("end", status, {"status": status})
        events.close()
    return run


def test_resume_finds_the_run_and_refuses_a_finished_one(home: Home) -> None:
    stopped, done = make_run(home, "ftjob-stopped", "interrupted"), make_run(home, "ftjob-done", "succeeded")
    assert train.find_run(home, stopped.id) == stopped
    with pytest.raises(StateError, match="has finished; its model is ft:tiny:personal::AbCd1234"):
        train.find_run(home, done.id)
    with pytest.raises(NotFound, match="Did you mean 'ftjob-stopped'"):
        train.find_run(home, "ftjob-stoped")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"status": "interrupted"}, 75),
        ({"status": "paused", "reason": "disk_full"}, 73),
        ({"status": "failed", "code": "out_of_memory"}, 71),
        ({"status": "failed", "code": "diverged"}, 72),
        ({"status": "failed", "code": "invalid_training_file"}, 65),
        ({"status": "killed", "code": "worker_died"}, 70),
    ],
)
def test_the_exit_code_follows_the_table(end: dict[str, str], code: int) -> None:
    assert train.exit_code(end) == code


@pytest.fixture
def described_home(tiny_home: Home, described: Path) -> Home:
    shutil.copy(described, tiny_home.ensure().cache)
    return tiny_home


def command(home: Home, *items: str) -> int:
    sets = [part for item in items for part in ("--set", item)]
    return main.run(["train", "--home", str(home.root), *sets])


def test_a_wrong_model_name_is_said_first(tiny_home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tiny_home, "model=tinny", f"training_file={tmp_path}/none.jsonl") == 65
    err = capsys.readouterr().err
    assert "The model 'tinny' does not exist. Did you mean 'tiny'?" in err and err.count("\n") == 1
    assert not list(tiny_home.runs.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "file has 0 example(s), but must have at least 10"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9, "9 example"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n' * 12, "line 1"),
        (b"\x00\x01\x02 not text", "line 1"),
    ],
    ids=["empty", "9 rows", "no assistant", "binary"],
)
def test_bad_data_starts_nothing(
    described_home: Home, tmp_path: Path, content: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    assert command(described_home, "model=tiny", f"training_file={path}") == 65
    captured = capsys.readouterr()
    assert expected in captured.out and captured.err.count("\n") == 1
    assert not list(described_home.runs.iterdir())


def test_a_bad_validation_file_is_named_as_such(
    described_home: Home, tmp_path: Path, sft_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "valid.jsonl"
    bad.write_text("{oops\n")
    train_file = sft_file(tmp_path, 12)
    items = ("model=tiny", f"training_file={train_file}", f"validation_file={bad}")
    assert command(described_home, *items) == 65
    captured = capsys.readouterr()
    assert "valid.jsonl line 1" in captured.out and "validation file" in captured.err


GRADER = "{name: grpo, grader: {type: string_check, name: s, operation: eq, input: '{{ item.x }}', reference: a}}"


@pytest.mark.parametrize(
    ("fields", "code", "expected"),
    [
        (["objective=dpo"], 65, "Objectives for such rows: answers, distill, rlaif, sft."),
        ([f"objective={GRADER}"], 64, "no row has 'x'. Rows have: messages, reference_answer."),
        (["objective={name: ppo, reward_model: tiny}"], 64, "'tiny' is no reward model: it writes text."),
        (["objective=3"], 64, "expected a name, like lora, or an object of a name and options"),
        (["objective={name: dpo, options: x}"], 64, "its 'options' must be an object"),
    ],
)
def test_rows_and_models_that_an_objective_cannot_use_start_nothing(
    described_home: Home,
    tmp_path: Path,
    sft_file: Callable[..., Path],
    fields: list[str],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(described_home, "model=tiny", f"training_file={sft_file(tmp_path, 12)}", *fields) == code
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not list(described_home.runs.iterdir())


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command(Home(tmp_path / "file" / "home"), "model=tiny", "training_file=t") == 65
    err = capsys.readouterr().err
    assert "cannot be written" in err and "TUNEWRIGHT_HOME" in err and err.count("\n") == 1


def test_paths_of_retained_and_mixed_rows_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "model: m\ntraining_file: t\nretain:\n  - {name: replay, file: old.jsonl}\n  - l2sp\n"
    spec = train.read_spec(write(tmp_path, text + "mix: [b.jsonl, {file: /c.jsonl}]\n"), [])
    assert spec.retain[0].options["file"] == str(tmp_path / "old.jsonl") and spec.retain[1].name == "l2sp"
    assert spec.mix is not None and [f.file for f in spec.mix.files] == [str(tmp_path / "b.jsonl"), "/c.jsonl"]
    text = "model: m\ntraining_file: t\nretain: {name: kl, file: old.jsonl}\nmix: {files: [b], temperature: 2}\n"
    spec = train.read_spec(write(tmp_path, text), [])
    assert spec.retain[0].options["file"] == str(tmp_path / "old.jsonl")
    assert spec.mix is not None and spec.mix.files[0].file == str(tmp_path / "b") and spec.mix.temperature == 2
