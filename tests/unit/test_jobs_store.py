"""The store: rows that come back, an index that can be rebuilt, one writer, keys that are never stored."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs_kit import add_base, dump, get, make_job, make_run, messages, open_store, row_of

from tunewright.core.durable import write_json
from tunewright.core.errors import Busy, NotFound, StateError, UserError
from tunewright.core.events import Event, current
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import parse_spec
from tunewright.jobs import journal
from tunewright.jobs.journal import Line
from tunewright.jobs.prepare import create_run
from tunewright.jobs.rows import STATUSES, TERMINAL, TRANSITIONS, FileRow, schema
from tunewright.jobs.store import Store

KIT = str(Path(__file__).parent)


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    opened = open_store(home)
    yield opened
    opened.close()


def add_file(store: Store, n: int, content: bytes | None = None, **fields: Any) -> FileRow:
    raw = content if content is not None else f"content {n}".encode()
    digest = hashlib.sha256(raw).hexdigest()
    blob = store.home.blob(digest)
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(raw)
    row = FileRow(f"file-{n}", len(raw), 1000 + n, f"{n}.jsonl", "fine-tune", digest)
    row = replace(row, **fields)
    store.add_file(row)
    return row


# ---- files ----


def test_files_are_listed_in_pages_newest_first(store: Store) -> None:
    rows = [add_file(store, n, purpose="fine-tune" if n % 2 else "batch") for n in range(7)]
    assert store.list_files().data == rows[::-1]
    assert store.list_files(order="asc", limit=3).data == rows[:3]
    first = store.list_files(purpose="fine-tune", limit=2)
    assert ([f.id for f in first.data], first.has_more) == (["file-5", "file-3"], True)
    second = store.list_files(purpose="fine-tune", limit=2, after="file-3")
    assert ([f.id for f in second.data], second.has_more) == (["file-1"], False)
    with pytest.raises(NotFound, match="file-x"):
        store.list_files(after="file-x")
    assert store.get_file("file-3") == rows[3] and store.get_file("file-x") is None


def test_a_blob_goes_with_its_last_file(store: Store) -> None:
    a, b = add_file(store, 1, b"same"), add_file(store, 2, b"same")
    assert store.delete_file(a.id) and store.home.blob(a.sha256).exists()
    assert not store.delete_file(a.id)
    assert store.delete_file(b.id) and not store.home.blob(b.sha256).exists()
    assert store.list_files().data == []


def test_a_job_keeps_its_data_when_the_file_is_deleted(store: Store) -> None:
    row = add_file(store, 1, b"rows of the job")
    spec = parse_spec({"model": add_base(store.home), "training_file": row.id})
    run = create_run(store.home, spec, train_path=store.home.blob(row.sha256), names={"train": row.filename})
    assert (run.folder / run.job().train).stat().st_ino == store.home.blob(row.sha256).stat().st_ino
    store.delete_file(row.id)
    assert (run.folder / run.job().train).read_bytes() == b"rows of the job"


def test_a_file_can_be_marked(store: Store) -> None:
    row = add_file(store, 1)
    assert store.update_file(row.id, status="error", status_details="bad line")
    assert store.get_file(row.id) == replace(row, status="error", status_details="bad line")
    assert not store.update_file("file-x", status="error")


# ---- jobs ----


def test_jobs_come_back_as_they_were(store: Store) -> None:
    run = make_run(store.home)
    row = row_of(
        run,
        metadata={"k": "v"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
        integrations=[{"type": "wandb"}],
        tunewright={"tuner": {"name": "lora"}},
        suffix="s",
        validation_file="file-v",
    )
    store.add_job(row)
    assert store.get_job(run.id) == row
    assert store.get_job("ftjob-x") is None
    assert messages(store, run) == [f"Created fine-tuning job: {run.id}"]


def test_jobs_are_listed_newest_first_and_by_metadata(store: Store) -> None:
    tricky = 'a"b.c[0]$'
    kinds = [None, {"a": "1"}, {"a": "1", tricky: "é"}, {"a": "2"}, {}]
    ids = [make_job(store, metadata=kind).id for kind in kinds]
    page = store.list_jobs(limit=2)
    assert ([j.id for j in page.data], page.has_more) == ([ids[4], ids[3]], True)
    assert [j.id for j in store.list_jobs(after=ids[3], limit=10).data] == ids[:3][::-1]
    assert [j.id for j in store.list_jobs(metadata={"a": "1"}).data] == [ids[2], ids[1]]
    assert [j.id for j in store.list_jobs(metadata={"a": "1", tricky: "é"}).data] == [ids[2]]
    assert store.list_jobs(metadata={"a": "3"}).data == []
    for empty in ("null", {}):
        assert [j.id for j in store.list_jobs(metadata=empty).data] == [ids[4], ids[0]]
    with pytest.raises(NotFound, match="ftjob-x"):
        store.list_jobs(after="ftjob-x")


@pytest.mark.parametrize("old", STATUSES)
def test_only_the_transitions_of_the_table_happen(store: Store, old: str) -> None:
    for new in STATUSES:
        run = make_job(store, status=old)
        assert not store.update_job(run.id, set(STATUSES) - {old}, status=new)
        assert get(store, run).status == old
        if new == old or new in TRANSITIONS[old]:
            assert store.update_job(run.id, {old}, status=new)
            assert get(store, run).status == new
        else:
            with pytest.raises(ValueError, match=f"cannot go from {old} to {new}"):
                store.update_job(run.id, {old}, status=new)
            assert get(store, run).status == old


def test_every_job_can_end_and_ends_once() -> None:
    reach: dict[str, set[str]] = {s: set(after) for s, after in TRANSITIONS.items()}
    for _ in STATUSES:
        reach = {s: after | {x for a in after for x in reach[a]} for s, after in reach.items()}
    assert {"succeeded", "failed", "cancelled"} == TERMINAL
    for status in set(STATUSES) - TERMINAL:
        assert "cancelled" in reach[status], status
    assert set(STATUSES) - TERMINAL >= {"validating_files"} and reach["validating_files"] >= TERMINAL


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.sampled_from(STATUSES), st.sampled_from(STATUSES)), max_size=12))
def test_random_walks_stay_in_the_table_and_in_the_journal(store: Store, moves: list[tuple[str, str]]) -> None:
    run, status = make_job(store), "validating_files"
    for expected, new in moves:
        legal = new == expected or new in TRANSITIONS[expected]
        if expected == status and not legal:
            with pytest.raises(ValueError, match="cannot go"):
                store.update_job(run.id, {expected}, status=new)
        else:
            assert store.update_job(run.id, {expected}, status=new) == (expected == status)
            status = new if expected == status else status
        assert get(store, run).status == status
    told = [c["status"] for e in journal.read(run)[0] if (c := journal.changes_of(e)) and "status" in c]
    assert told[-1] == status
    assert all(b == a or b in TRANSITIONS[a] for a, b in itertools.pairwise(told))


def test_of_many_threads_one_wins(store: Store) -> None:
    run, won = make_job(store, status="queued"), []
    start = threading.Barrier(8)

    def race(n: int) -> None:
        start.wait()
        if store.update_job(run.id, {"queued"}, status="running", attempt=n):
            won.append(n)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(1, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1 and get(store, run).attempt == won[0]


# ---- events ----


def event(attempt: int, seq: int, type: str, step: int | None = None, **data: Any) -> Event:
    data = data if step is None else {"step": step, **data}
    return Event(seq, 1000.0 + attempt * 100 + seq, type, "info", f"{attempt}.{seq} {type}", data, attempt)


def history(rng: random.Random) -> list[Event]:
    """Attempts that each resume somewhere at or before the step that was reached."""
    lines, reached = [], 0
    for attempt in range(1, rng.randint(2, 5)):
        seq, start = 1, rng.randint(0, reached)
        lines.append(event(attempt, seq, "resumed", start) if attempt > 1 else event(attempt, seq, "message"))
        for step in range(start + 1, start + rng.randint(2, 7)):
            lines.append(event(attempt, seq := seq + 1, "metrics", step, train_loss=rng.random()))
            if rng.random() < 0.4:
                lines.append(event(attempt, seq := seq + 1, "checkpoint", step, kind="epoch", metrics={}))
            reached = step
    return lines


@pytest.mark.parametrize("seed", range(8))
def test_superseded_events_are_hidden_in_whatever_order_they_come(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    lines, run = history(rng), make_job(store)
    pieces = [lines[i : i + 3] for i in range(0, len(lines), 3)]
    rng.shuffle(pieces)
    for piece in [*pieces, *pieces[:2]]:  # some come twice
        for attempt in {e.attempt for e in piece}:
            store.ingest(run.id, [e for e in piece if e.attempt == attempt], 10)
    expected = [e.message for e in current(lines)]
    assert [m for m in messages(store, run) if "fine-tuning" not in m] == expected
    points = [(e.data["step"], e.data["train_loss"]) for e in current(lines) if e.type == "metrics"]
    assert [(p["step"], p["train_loss"]) for p in store.metric_points(run.id)] == sorted(points)
    after = points[len(points) // 2][0]
    assert [p["step"] for p in store.metric_points(run.id, after)] == [s for s, _ in sorted(points) if s > after]


def test_events_page_back_in_time_with_stable_ids(store: Store) -> None:
    run = make_job(store)
    store.ingest(run.id, [event(1, n, "metrics", n) for n in range(1, 26)], 100)
    seen, after = [], None
    while True:
        page = store.list_events(run.id, after, limit=7)
        seen += page.data
        if not page.has_more:
            break
        after = page.data[-1].id
        store.ingest(run.id, [event(1, 26, "metrics", 26)], 110)  # new ones do not disturb older pages
    assert [e.seq for e in seen if e.attempt == 1] == list(range(25, 0, -1))
    assert len({e.id for e in seen}) == len(seen)
    assert all(e.id.startswith("ftevent-") and len(e.id) == 32 for e in seen)
    with pytest.raises(NotFound, match="ftevent-x"):
        store.list_events(run.id, "ftevent-x")


def test_taking_over_events_twice_changes_nothing_and_a_torn_line_waits(store: Store) -> None:
    run = make_job(store)
    path = run.attempt(1) / "events.jsonl"
    path.parent.mkdir()
    line = {"time": 1.0, "type": "metrics", "level": "info"}
    lines = [json.dumps({**line, "seq": n, "message": f"m{n}", "data": {"step": n}}) for n in (1, 2)]
    path.write_text(lines[0] + "\n" + lines[1][:20])
    assert [e.seq for e in store.catch_up(run.id)] == [1]
    assert store.catch_up(run.id) == []
    path.write_text("\n".join(lines) + "\n")
    assert [e.seq for e in store.catch_up(run.id)] == [2]
    assert [m for m in messages(store, run) if m.startswith("m")] == ["m1", "m2"]
    assert store.offset(run.id, 1) == path.stat().st_size


def test_only_events_for_people_are_shown(store: Store) -> None:
    run = make_job(store)
    lines = [
        event(1, 1, "phase", name="loading", done=0, total=1),
        event(1, 2, "plan", n_epochs=3),
        event(1, 3, "checkpoint", 5, kind="recovery"),
        event(1, 4, "checkpoint", 10, kind="epoch"),
        event(1, 5, "end", status="succeeded"),
    ]
    store.ingest(run.id, lines, 10)
    assert messages(store, run) == ["1.2 plan", "1.4 checkpoint", f"Created fine-tuning job: {run.id}"]
    assert get(store, run).resolved == {"n_epochs": 3}


# ---- checkpoints and models ----


def put_artefact(folder: Path, name: str, step: int) -> None:
    folder.mkdir(parents=True)
    write_json(
        folder / "artefact.json",
        {"kind": "adapter", "name": name, "base": "b", "tuner": {"name": "lora"}, "step": step, "metrics": {"x": 1.0}},
    )


def finished(store: Store) -> Run:
    """A job with epoch checkpoints at 10, 20, 30 (the last is the result); that of 10 is no longer on the disk."""
    run = make_job(store, status="queued")
    name = get(store, run).name
    store.update_job(run.id, {"queued"}, status="running")
    saved = [event(1, n, "checkpoint", 10 * n, kind="epoch", metrics={"step": 10 * n}) for n in (1, 2, 3)]
    store.ingest(run.id, saved, 9)
    put_artefact(run.checkpoint(20) / "artefact", name, 20)
    put_artefact(run.checkpoint(30) / "artefact", name, 30)
    put_artefact(run.result, name, 30)
    return run


def test_checkpoints_are_those_on_the_disk_and_the_newest_is_the_model(store: Store) -> None:
    run = finished(store)
    name = get(store, run).name
    assert [c.name for c in store.list_checkpoints(run.id).data] == [f"{name}:ckpt-step-30", f"{name}:ckpt-step-20"]
    assert store.find_model(name) is None  # not before it has succeeded
    store.update_job(run.id, {"running"}, status="succeeded", finished_at=5000)
    page = store.list_checkpoints(run.id, limit=1)
    assert page.has_more
    final = page.data[0]
    assert (final.name, final.step, final.metrics, final.created_at) == (name, 30, {"step": 30}, 5000)
    assert final.id.startswith("ftckpt_")
    rest = store.list_checkpoints(run.id, after=final.id)
    assert [c.name for c in rest.data] == [f"{name}:ckpt-step-20"] and not rest.has_more
    assert [m.name for m in store.list_models()] == [name, f"{name}:ckpt-step-20"]
    found = store.find_model(f"{name}:ckpt-step-20")
    assert found is not None and found.folder == str(run.checkpoint(20) / "artefact") and found.step == 20
    for missing in (f"{name}:ckpt-step-10", f"{name}:ckpt-step-99", "ft:x:y:z:abcdefgh", "base-1b", ""):
        assert store.find_model(missing) is None
    with pytest.raises(NotFound):
        store.list_checkpoints(run.id, after="ftckpt_x")


def test_a_deleted_model_is_gone_and_the_others_stay(store: Store) -> None:
    run = finished(store)
    name = get(store, run).name
    with pytest.raises(StateError, match=r"while its job .* is running"):
        store.delete_model(f"{name}:ckpt-step-20")
    store.update_job(run.id, {"running"}, status="succeeded", finished_at=5000)
    assert store.delete_model(name) and not run.result.exists()
    assert store.find_model(name) is None and not store.delete_model(name)
    assert store.delete_model(f"{name}:ckpt-step-20") and not run.checkpoint(20).exists()
    store.rebuild()
    assert store.find_model(name) is None
    assert get(store, run).status == "succeeded"


# ---- keys ----


def test_keys_open_until_revoked_and_are_not_stored(store: Store) -> None:
    plain, row = store.add_key("laptop")
    assert plain.startswith("sk-tw-") and len(plain) == 46
    found = store.check_key(plain)
    assert found is not None and found.id == row.id
    assert store.check_key(plain[:-1]) is None and store.check_key("") is None and store.check_key("é" * 9) is None
    assert store.list_keys()[0].last_used is not None
    for path in store.home.root.glob("tunewright.db*"):
        assert plain.encode() not in path.read_bytes()
    assert stat.S_IMODE((store.home.root / "pepper").stat().st_mode) == 0o600
    assert store.revoke_key(row.id) and not store.revoke_key(row.id)
    assert store.check_key(plain) is None


def test_a_sign_in_token_works_once_and_for_a_while(home: Home) -> None:
    now = [1000.0]
    store = Store.open(home, clock=lambda: now[0])
    token = store.new_signin_token(ttl=900)
    session = store.redeem_signin_token(token)
    assert session is not None and store.redeem_signin_token(token) is None
    row = store.check_key(session)
    assert row is not None and row.kind == "session"
    late = store.new_signin_token(ttl=900)
    now[0] += 900
    assert store.redeem_signin_token(late) is None
    now[0] += 31 * 24 * 3600
    assert store.check_key(session) is None
    store.close()


# ---- the data folder ----


def test_a_second_server_is_refused(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from tunewright.core.home import Home\n"
        "from tunewright.core.errors import Busy; from tunewright.jobs.store import Store\n"
        "try: Store.open(Home(Path(sys.argv[1])))\n"
        "except Busy as e: print(e.message)"
    )
    command = [sys.executable, "-c", code, str(store.home.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"The data folder {store.home.root} is in use by another tunewright server (pid" in done.stdout
    with pytest.raises(Busy):
        Store.open(store.home)


def test_what_was_written_is_there_after_reopening(home: Home) -> None:
    store = Store.open(home)
    run = make_job(store)
    add_file(store, 1)
    before = dump(store)
    store.close()
    again = Store.open(home)
    assert dump(again) == before
    assert again.check()
    with again._db.read() as c:
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert c.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert c.exec_driver_sql("PRAGMA query_only").scalar() == 1
    with again._db.write() as c:
        assert c.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    assert run.id in again.job_ids()
    again.close()


@pytest.mark.parametrize("damage", ["missing", "scribbled", "not a database"])
def test_a_lost_or_damaged_database_is_rebuilt(home: Home, damage: str) -> None:
    store = Store.open(home)
    runs = [make_job(store) for _ in range(2)]
    add_file(store, 1)
    store.update_job(runs[0].id, {"validating_files"}, status="queued", say=[Line("said")])
    store.add_event(runs[1].id, "warn", "careful", data={"a": 1})
    before = dump(store)
    store.close()
    raw = bytearray(home.database.read_bytes())
    for path in home.root.glob("tunewright.db-*"):
        path.unlink()
    home.database.unlink()
    if damage == "scribbled":
        raw[4096 : len(raw)] = bytes(len(raw) - 4096)
        home.database.write_bytes(raw)
    elif damage == "not a database":
        home.database.write_bytes(b"hello" * 5000)
    again = Store.open(home)
    assert dump(again) == before
    assert len(list(home.root.glob("damaged-*"))) == (0 if damage == "missing" else 1)
    again.close()


def test_a_commit_that_did_not_happen_is_caught_up_from_the_journal(store: Store) -> None:
    run = make_job(store)
    journal.append(run, [journal.change({"status": "queued"}), Line("Files validated, moving job to queued state")])
    assert get(store, run).status == "validating_files"
    assert not store.update_job(run.id, {"validating_files"}, status="cancelled")  # the journal counts
    assert get(store, run).status == "queued"
    assert messages(store, run)[-1] == "Files validated, moving job to queued state"


def test_a_torn_journal_line_is_cut_off(store: Store) -> None:
    run = make_job(store)
    path = run.attempt(0) / "events.jsonl"
    with open(path, "ab") as f:
        f.write(b'{"seq": 3, "time": 1.0, "ty')
    store.add_event(run.id, "info", "after the power cut")
    events, end = journal.read(run)
    assert [e.seq for e in events] == [1, 2, 3] and end == path.stat().st_size
    assert messages(store, run)[-1] == "after the power cut"


def test_an_event_of_an_unknown_job_is_refused(store: Store) -> None:
    with pytest.raises(NotFound, match="ftjob-x"):
        store.add_event("ftjob-x", "info", "hello")
    assert not (store.home.runs / "ftjob-x").exists()


def test_the_migrations_make_the_tables_that_the_code_uses(store: Store) -> None:
    with store._db.write() as c:
        assert compare_metadata(MigrationContext.configure(c), schema) == []


def test_a_newer_database_is_refused(home: Home) -> None:
    store = Store.open(home)
    with store._db.write() as c:
        c.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    with pytest.raises(UserError, match="newer version of tunewright"):
        Store.open(home)
    with pytest.raises(UserError, match="newer version"):
        Store.open(home)  # and it was not locked by the attempt


FULL_DISK = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from jobs_kit import get, make_job
from tunewright.core.errors import DiskFull
from tunewright.core.home import Home
from tunewright.jobs.files import FileRow
from tunewright.jobs.store import Store
home = Home(Path(sys.argv[1]) / "home").ensure()
store = Store.open(home)
run = make_job(store)
blob = home.blob("ab" * 32)
blob.parent.mkdir()
blob.write_bytes(bytes(1 << 20))
store.add_file(FileRow("file-1", 1 << 20, 1, "a", "fine-tune", "ab" * 32))
with open(home.root / "filler", "wb", buffering=0) as f:
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                f.write(bytes(size))
        except OSError:
            pass
failures = 0
for n in range(20):
    try:
        store.add_event(run.id, "info", "x" * 4000)
    except DiskFull as e:
        failures += 1
        print("full:", e.message)
        break
assert failures == 1, "the disk was not full"
assert store.list_jobs().data[0].id == run.id
assert store.delete_file("file-1") and not blob.exists()
assert store.update_job(run.id, {"validating_files"}, status="cancelled")
store.close()
store = Store.open(home)
assert store._db.check() and get(store, run).status == "cancelled"
print("ok")
"""


def may_mount() -> bool:
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not may_mount(), reason="needs a small file system of its own")
def test_on_a_full_disk_reading_deleting_and_cancelling_still_work(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=32m t {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path} {KIT}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        env={**os.environ, "CODE": FULL_DISK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["ok"], done.stdout + done.stderr
    assert "Free some space" in done.stdout


def test_jobs_need_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, tunewright.jobs as j\n"
        "for m in pkgutil.walk_packages(j.__path__, 'tunewright.jobs.'):\n"
        "    if 'migrations' not in m.name: importlib.import_module(m.name)\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'peft'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
