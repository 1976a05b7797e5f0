"""`models`, `jobs` and `keys`: what there is, read from the data folder."""

from __future__ import annotations

import pytest

from tunewright.cli import main
from tunewright.core.durable import Lock, write_json
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Artefact, JobFile, Run
from tunewright.core.spec import parse_spec

NAME = "ft:tiny:personal::AbCd1234"


def make_run(home: Home, job_id: str, *, steps: int = 0, end: str | None = None, attempts: int = 1) -> Run:
    run = Run(home.runs / job_id)
    (run.folder / "attempts").mkdir(parents=True)
    spec = parse_spec({"model": "tiny", "training_file": "t"})
    job = JobFile(id=job_id, created_at=1.8e9, name=NAME, base="tiny", spec=spec, train="data/t")
    write_json(run.folder / "job.json", job.model_dump(mode="json"))
    for n in range(1, attempts + 1):
        run.attempt(n).mkdir()
    if attempts:
        events = EventWriter(run.attempt(attempts) / "events.jsonl", attempts)
        for step in range(1, steps + 1):
            events.write("metrics", "", {"step": step, "total_steps": 9, "train_loss": 0.5})
            events.write("checkpoint", "", {"step": step, "kind": "epoch" if step % 2 else "recovery"})
        if end:
            events.write("end", end, {"status": end})
        events.close()
    return run


def put_artefact(run: Run, folder: object, step: int) -> None:
    folder.mkdir(parents=True)  # type: ignore[attr-defined]
    made = Artefact(kind="adapter", name=NAME, base="tiny", tuner={"name": "lora"}, step=step)
    write_json(folder / "artefact.json", made.model_dump(mode="json"))  # type: ignore[operator]


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_jobs_say_what_became_of_each(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(home, "ftjob-queued", attempts=0)
    make_run(home, "ftjob-done", steps=3, end="succeeded")
    make_run(home, "ftjob-dead", steps=2)
    running = make_run(home, "ftjob-busy", steps=1)
    with Lock(running.lock):
        assert main.run(["jobs", "--home", str(home.root)]) == 0
    found = {r[0]: r for r in rows(capsys)}
    assert found["ftjob-queued"][1:4] == ["queued", "", ""]
    assert found["ftjob-done"][1:4] == ["succeeded", "3/9", "0.5000"]
    assert found["ftjob-dead"][1:3] == ["killed", "2/9"]
    assert found["ftjob-busy"][1:3] == ["running", "1/9"]


def test_a_job_of_the_server_has_the_servers_status(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    from tunewright.jobs import journal

    run = make_run(home, "ftjob-served", steps=2, end="interrupted")
    journal.append(run, [journal.change({"status": "queued"}), journal.change({"status": "cancelled"})])
    main.run(["jobs", "--home", str(home.root)])
    assert rows(capsys)[1][:2] == ["ftjob-served", "cancelled"]


def test_no_jobs_say_how_to_make_one(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["jobs", "--home", str(home.root)]) == 0
    assert "tunewright demo" in capsys.readouterr().out


def test_models_are_bases_results_and_epoch_checkpoints(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(home, "ftjob-done", steps=5, end="succeeded")
    for step in (1, 2, 3, 5):
        put_artefact(run, run.checkpoint(step) / "artefact", step)
    put_artefact(run, run.result, 5)
    assert main.run(["models", "--home", str(home.root)]) == 0
    found = [r[:2] for r in rows(capsys)]
    assert ["smollm2-135m-instruct", "base"] in found
    # step 2 is a recovery checkpoint, step 4 is not there any more, step 5 is the model itself
    assert [r for r in found if r[0].startswith("ft:")] == [
        [f"{NAME}:ckpt-step-1", "checkpoint"], [f"{NAME}:ckpt-step-3", "checkpoint"], [NAME, "tuned"],
    ]  # fmt: skip


def test_a_key_is_made_listed_and_revoked(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--home", str(home.root)]
    assert main.run(["keys", "new", "my laptop", *place]) == 0
    plain = capsys.readouterr().out.strip()
    assert plain.startswith("sk-")
    main.run(["keys", "list", *place])
    (row,) = rows(capsys)
    assert row[2] == "key" and row[4] == "my laptop" and plain not in "".join(row)
    assert main.run(["keys", "revoke", row[0], *place]) == 0
    assert main.run(["keys", "revoke", row[0], *place]) == 65
    capsys.readouterr()
    main.run(["keys", "list", *place])
    assert rows(capsys)[0][2] == "revoked"


def test_keys_wait_for_the_server_to_stop(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(home.root / "server.lock"):
        assert main.run(["keys", "new", "--home", str(home.root)]) == 69
    assert "in use by another tunewright server" in capsys.readouterr().err
