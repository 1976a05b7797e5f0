"""The store: files, jobs, events, models and keys, for the one server process of a data folder.

The database is an index. A job's run folder (its journal and its workers' events) is the truth, and `rebuild` reads
everything back from there. Every method is synchronous and may be called from any thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, func, or_, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or

from tunewright.core.durable import Lock
from tunewright.core.errors import Busy, NotFound
from tunewright.core.events import Event, read_events
from tunewright.core.home import Home
from tunewright.core.run import Run, list_runs
from tunewright.jobs import journal, models, recipes
from tunewright.jobs.db import Database, one_page, open_database, rows_of
from tunewright.jobs.files import Files
from tunewright.jobs.journal import Line
from tunewright.jobs.keys import Keys, read_pepper
from tunewright.jobs.models import stable_id
from tunewright.jobs.rows import (
    TRANSITIONS,
    CheckpointRow,
    EventRow,
    FileRow,
    JobRow,
    KeyRow,
    ModelRow,
    Page,
    events,
    jobs,
    tails,
)

_UNJOURNALED = frozenset({"estimated_finish"})


class Store:
    """Open with Store.open(home); one server per data folder."""

    def __init__(self, home: Home, db: Database, lock: Lock, keys: Keys, clock: Callable[[], float]) -> None:
        self.home = home
        self._db = db
        self._lock = lock
        self._keys = keys
        self._files = Files(db, home)
        self._clock = clock

    @classmethod
    def open(cls, home: Home, clock: Callable[[], float] = time.time) -> Store:
        """Open the data folder's database, bring its schema up to date and catch up with the run folders.

        A missing or damaged database is rebuilt from the run folders (API keys must then be made again).
        Raises Busy if another server uses the folder, UserError if a newer version wrote it.
        """
        home.ensure()
        lock = _server_lock(home)
        try:
            db, fresh = open_database(home.database)
            store = cls(home, db, lock, Keys(db, read_pepper(home.root / "pepper")), clock)
            if fresh:
                store.rebuild()
            else:
                store._catch_up_all()
            return store
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def check(self) -> bool:
        """Whether the database can be read and written."""
        with self._db.write() as c:
            return c.exec_driver_sql("PRAGMA user_version").scalar() is not None

    def _now(self) -> int:
        return int(self._clock())

    def run(self, job_id: str) -> Run:
        """The job's run folder."""
        return Run(self.home.runs / job_id)

    # ---- files ----

    def add_file(self, row: FileRow) -> None:
        """Record a file whose bytes are already at home.blob(row.sha256). Doing it twice changes nothing."""
        self._files.add(row)

    def get_file(self, file_id: str) -> FileRow | None:
        return self._files.get(file_id)

    def update_file(self, file_id: str, **changes: Any) -> bool:
        """Change fields of a file's row (status, status_details …). False when there is no such file."""
        return self._files.update(file_id, changes)

    def list_files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Page[FileRow]:
        """Files of a purpose (None: all), newest first unless order is `asc`. Raises NotFound for a bad `after`."""
        return self._files.list(purpose, after, limit, order)

    def delete_file(self, file_id: str) -> bool:
        """Forget a file, and remove its bytes unless another file has the same. Jobs keep their own link to them."""
        return self._files.delete(file_id)

    # ---- jobs ----

    def add_job(self, row: JobRow) -> None:
        """Record a job whose run folder is complete. Doing it twice changes nothing."""
        first = [journal.change(asdict(row)), Line(f"Created fine-tuning job: {row.id}")]
        at = (lambda: float(row.created_at)) if row.started_by == "foreground" else self._clock
        with self._db.write() as c:
            self._catch_up(c, row.id)
            if c.execute(select(jobs.c.n).where(jobs.c.id == row.id)).first() is None:
                self._apply(c, row.id, *journal.append(self.run(row.id), first, at))

    def job_ids(self) -> set[str]:
        with self._db.read() as c:
            return set(c.execute(select(jobs.c.id)).scalars())

    def get_job(self, job_id: str) -> JobRow | None:
        with self._db.read() as c:
            found = c.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
        return None if found is None else rows_of(JobRow, [found])[0]

    def list_jobs(
        self, after: str | None = None, limit: int = 20, metadata: dict[str, str] | str | None = None
    ) -> Page[JobRow]:
        """Jobs, newest first. metadata: pairs a job must have; {} or "null" for jobs without any."""
        query = select(jobs)
        if metadata == "null" or metadata == {}:
            query = query.where(or_(jobs.c.metadata.is_(None), func.json(jobs.c.metadata) == "{}"))
        elif isinstance(metadata, dict):
            for key, value in metadata.items():
                pair = func.json_each(jobs.c.metadata).table_valued("key", "value")
                query = query.where(select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists())
        return one_page(self._db, JobRow, query, jobs, after, limit)

    def jobs_with(self, statuses: Iterable[str]) -> list[JobRow]:
        """All jobs in one of the statuses, oldest first."""
        with self._db.read() as c:
            found = c.execute(select(jobs).where(jobs.c.status.in_(list(statuses))).order_by(jobs.c.n))
            return rows_of(JobRow, found.mappings())

    def update_job(self, job_id: str, expect_status: set[str], *, say: Iterable[Line] = (), **changes: Any) -> bool:
        """Change a job in one step, if its status is one of `expect_status`; else change nothing and say False.

        say: journal lines to record together with the change, or not at all.
        Raises ValueError when the new status may not follow the old one.
        """
        with self._db.write() as c:
            self._catch_up(c, job_id)
            status = c.execute(select(jobs.c.status).where(jobs.c.id == job_id)).scalar()
            if status not in expect_status:
                return False
            new = changes.get("status", status)
            if new != status and new not in TRANSITIONS[status]:
                raise ValueError(f"a job cannot go from {status} to {new}")
            if changes.keys() <= _UNJOURNALED and not say:
                c.execute(update(jobs).where(jobs.c.id == job_id).values(**changes))
            else:
                self._write_journal(c, job_id, [journal.change(changes), *say])
        return True

    # ---- events ----

    def add_event(
        self, job_id: str, level: str, message: str, type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        """Add one of the server's own events. Raises NotFound when there is no such job."""
        with self._db.write() as c:
            self._catch_up(c, job_id)
            if c.execute(select(jobs.c.n).where(jobs.c.id == job_id)).first() is None:
                raise NotFound(f"Could not find fine tune: {job_id}")
            self._write_journal(c, job_id, [Line(message, level, type, data or {})])

    def ingest(self, job_id: str, new: list[Event], offset: int) -> None:
        """Take over lines of one attempt; `offset` is the byte after the last of them. Doing it twice changes nothing.

        What a later attempt did again is marked as superseded, in whatever order the attempts come in.
        """
        if not new:
            return
        with self._db.write() as c:
            self._apply(c, job_id, new, offset)

    def has_event(self, job_id: str, message: str) -> bool:
        """Whether the job has an event with exactly this message."""
        query = select(events.c.id).where(events.c.job_id == job_id, events.c.message == message)
        with self._db.read() as c:
            return c.execute(query.limit(1)).first() is not None

    def offset(self, job_id: str, attempt: int) -> int:
        """The byte up to which an attempt's events have been taken over."""
        with self._db.read() as c:
            return _offset(c, job_id, attempt)

    def catch_up(self, job_id: str) -> list[Event]:
        """Take over whatever the job's workers wrote since the last time; returns it."""
        run, taken = self.run(job_id), []
        for attempt in run.attempts():
            path = run.attempt(attempt) / "events.jsonl"
            start = self.offset(job_id, attempt)
            if attempt == journal.ATTEMPT or not path.exists() or path.stat().st_size <= start:
                continue
            new, end = read_events(path, attempt, start)
            self.ingest(job_id, new, end)
            taken += new
        return taken

    def list_events(self, job_id: str, after: str | None = None, limit: int = 20) -> Page[EventRow]:
        """A job's events, newest first, without superseded ones. Raises NotFound for a bad `after`."""
        query = select(events).where(events.c.job_id == job_id, events.c.shown, ~events.c.superseded)
        order = (events.c.time, events.c.attempt, events.c.seq)
        with self._db.read() as c:
            if after is not None:
                at = c.execute(select(*order).where(events.c.id == after, events.c.job_id == job_id)).first()
                if at is None:
                    raise NotFound(f"No such event: {after}", param="after")
                query = query.where(_before(order, at))
            found = c.execute(query.order_by(*(o.desc() for o in order)).limit(limit + 1)).mappings().all()
        rows = [_event_row(f) for f in found]
        return Page(rows[:limit], len(rows) > limit)

    def metric_points(self, job_id: str, after_step: int = 0) -> list[dict[str, Any]]:
        """The data of a job's metrics events with step > after_step, by step."""
        query = (
            select(events.c.data)
            .where(events.c.job_id == job_id, events.c.type == "metrics", ~events.c.superseded)
            .where(events.c.step > after_step)
            .order_by(events.c.step, events.c.attempt, events.c.seq)
        )
        with self._db.read() as c:
            return list(c.execute(query).scalars())

    # ---- checkpoints and models ----

    def list_checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Page[CheckpointRow]:
        """The callable checkpoints that are on the disk, newest first; a finished job's model is the first.

        A chain's are those of its stages' jobs, the last stage first.
        """
        found = [self.get_job(part) for part in self._parts(job_id)]
        left = [models.of_job(self.run(j.id), j, self._saved(j.id)) for j in found if j is not None]
        rows = [m.checkpoint for of_job in left for m in of_job]
        if after is not None:
            ids = [r.id for r in rows]
            if after not in ids:
                raise NotFound(f"No such checkpoint: {after}", param="after")
            rows = rows[ids.index(after) + 1 :]
        return Page(rows[:limit], len(rows) > limit)

    def _parts(self, job_id: str) -> list[str]:
        """The jobs whose results are the job's: itself, or those of a chain's stages."""
        job = self.get_job(job_id)
        if job is None or not job.is_chain:
            return [job_id]
        return [stage["id"] for stage in reversed((job.tunewright or {})["stages"]) if stage["id"] is not None]

    def list_models(self) -> list[ModelRow]:
        """Every recipe, then every model and checkpoint that jobs left, newest job first."""
        with self._db.read() as c:
            every = rows_of(JobRow, c.execute(select(jobs).order_by(jobs.c.n.desc())).mappings())
        saved: dict[str, list[EventRow]] = defaultdict(list)
        for event in self._saved():
            saved[event.job_id].append(event)
        left = [m.model for job in every for m in models.of_job(self.run(job.id), job, saved[job.id])]
        return [*recipes.model_rows(self.home), *left]

    def find_model(self, name: str) -> ModelRow | None:
        """The model, checkpoint or recipe called `name`, or None."""
        with self._db.read() as c:
            query = select(jobs).where(jobs.c.name == models.final_name(name))
            found = rows_of(JobRow, c.execute(query).mappings())
        rows = [m.model for j in found for m in models.of_job(self.run(j.id), j, self._saved(j.id))]
        return next((m for m in rows if m.name == name), None) or recipes.find_row(self.home, name)

    def delete_model(self, name: str) -> bool:
        """Remove a model's files. Jobs that continued from it keep their own copy. False when there is no such model.

        Raises StateError while its job still needs it.
        """
        row = self.find_model(name)
        if row is None:
            return False
        job = self.get_job(row.job_id)
        if job is None:
            recipes.remove(row)
        else:
            models.remove(self.run(job.id), job, row)
        return True

    def _saved(self, job_id: str | None = None) -> list[EventRow]:
        """The checkpoint events that count, oldest first."""
        query = select(events).where(events.c.type == "checkpoint", ~events.c.superseded)
        if job_id is not None:
            query = query.where(events.c.job_id == job_id)
        with self._db.read() as c:
            return [_event_row(f) for f in c.execute(query.order_by(events.c.step, events.c.attempt)).mappings()]

    # ---- keys ----

    def add_key(self, name: str) -> tuple[str, KeyRow]:
        """A new API key: its plain text (shown once) and its row."""
        return self._keys.add(name, self._now())

    def check_key(self, plain: str) -> KeyRow | None:
        """The row of a valid key, else None."""
        return self._keys.check(plain, self._now())

    def list_keys(self) -> list[KeyRow]:
        return self._keys.list()

    def revoke_key(self, key_id: str) -> bool:
        return self._keys.revoke(key_id, self._now())

    def new_signin_token(self, ttl: int = 900) -> str:
        """A token for one sign-in within `ttl` seconds."""
        return self._keys.new_signin_token(self._now(), ttl)

    def redeem_signin_token(self, token: str) -> str | None:
        """A session key's plain text for a token that is valid and unused, else None."""
        return self._keys.redeem_signin_token(token, self._now())

    # ---- the run folders are the truth ----

    def rebuild(self) -> None:
        """Empty the index and read files, jobs, events, checkpoints and models back from the data folder."""
        with self._db.write() as c:
            for table in (tails, events, jobs):
                c.execute(delete(table))
        self._files.rebuild()
        self._catch_up_all()
        for job in self.jobs_with(TRANSITIONS):
            self.catch_up(job.id)

    def _catch_up_all(self) -> None:
        with self._db.write() as c:
            for run in list_runs(self.home):
                self._catch_up(c, run.id)

    def _catch_up(self, c: Connection, job_id: str) -> None:
        """Apply journal lines that the database does not have: it was rebuilt, or a commit did not happen."""
        run, start = self.run(job_id), _offset(c, job_id, journal.ATTEMPT)
        if journal.size(run) > start:
            self._apply(c, job_id, *journal.read(run, start))

    def _write_journal(self, c: Connection, job_id: str, lines: list[Line]) -> None:
        self._apply(c, job_id, *journal.append(self.run(job_id), lines, self._clock))

    def _apply(self, c: Connection, job_id: str, new: list[Event], offset: int) -> None:
        """Put events of one attempt into the index: changes of the job's row, and lines."""
        if not new:
            return
        for event in new:
            changed = journal.changes_of(event)
            if changed is not None and "id" in changed:
                c.execute(insert_or(jobs).values(**changed).on_conflict_do_nothing())
            elif changed:
                c.execute(update(jobs).where(jobs.c.id == job_id).values(**changed))
            elif event.type == "plan":
                c.execute(update(jobs).where(jobs.c.id == job_id).values(resolved=event.data))
        lines = [_line(job_id, e) for e in new if journal.changes_of(e) is None]
        if lines:
            c.execute(insert_or(events).on_conflict_do_nothing(), lines)
        attempt = new[0].attempt
        c.execute(update(jobs).where(jobs.c.id == job_id, jobs.c.attempt < attempt).values(attempt=attempt))
        _supersede(c, job_id)
        tail = insert_or(tails).values(job_id=job_id, attempt=attempt, offset=offset)
        c.execute(tail.on_conflict_do_update(index_elements=["job_id", "attempt"], set_={"offset": offset}))


def _server_lock(home: Home) -> Lock:
    try:
        return Lock(home.root / "server.lock")
    except Busy as e:
        who = (home.root / "server.lock").read_text(errors="replace").strip()
        raise Busy(
            f"The data folder {home.root} is in use by another tunewright server ({who}). "
            "Stop that one, or set TUNEWRIGHT_HOME to another folder."
        ) from e


def _offset(c: Connection, job_id: str, attempt: int) -> int:
    query = select(tails.c.offset).where(tails.c.job_id == job_id, tails.c.attempt == attempt)
    return c.execute(query).scalar() or 0


def _line(job_id: str, e: Event) -> dict[str, Any]:
    """An event as a row. Shown are lines for people, metrics, and checkpoints that can be called."""
    shown = e.type in ("message", "metrics", "plan", "resumed") or (
        e.type == "checkpoint" and e.data.get("kind") == "epoch"
    )
    line = asdict(e)
    return {
        **line,
        "id": stable_id("ftevent-", job_id, e.attempt, e.seq),
        "job_id": job_id,
        "step": e.data.get("step"),
        "shown": shown and bool(e.message),
        "superseded": False,
    }


def _event_row(found: Any) -> EventRow:
    return rows_of(EventRow, [{**found, "created_at": int(found["time"])}])[0]


def _supersede(c: Connection, job_id: str) -> None:
    """Mark lines of steps that were done again later, as core.events.superseded defines it."""
    resumed = select(events.c.attempt, events.c.seq, events.c.step)
    resumed = resumed.where(events.c.job_id == job_id, events.c.type == "resumed")
    for attempt, seq, step in c.execute(resumed).all():
        earlier = or_(events.c.attempt < attempt, (events.c.attempt == attempt) & (events.c.seq < seq))
        c.execute(
            update(events)
            .where(events.c.job_id == job_id, events.c.type.in_(("metrics", "checkpoint")), ~events.c.superseded)
            .where(earlier, events.c.step > step)
            .values(superseded=True)
        )


def _before(order: Any, at: Any) -> Any:
    """The condition `order < at`, compared like tuples."""
    first, second, third = order
    return or_(
        first < at[0], (first == at[0]) & (second < at[1]), (first == at[0]) & (second == at[1]) & (third < at[2])
    )
