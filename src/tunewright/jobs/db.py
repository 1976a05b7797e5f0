"""The database: one file, one writer, many readers. SQLite from pysqlite3, whose engine has the WAL-reset fix."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from pysqlite3 import dbapi2
from sqlalchemy import Connection, Engine, Select, Table, create_engine, event, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool

from tunewright.core.errors import Busy, DiskFull, NotFound, UserError
from tunewright.core.ids import random_part
from tunewright.jobs.rows import Page

R = TypeVar("R")
_BUSY_SECONDS = 5.0
_BALLAST_BYTES = 16 << 20
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


def _engine(path: Path, begin: str, pragmas: tuple[str, ...], size: int, overflow: int) -> Engine:
    """An engine whose transactions open with `begin`. Python's own transaction handling is switched off."""

    def connect() -> Any:
        raw = dbapi2.connect(  # pyright: ignore[reportAttributeAccessIssue]
            str(path), timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        for pragma in pragmas:
            raw.execute(f"PRAGMA {pragma}")
        return raw

    engine = create_engine(
        "sqlite://", module=dbapi2, creator=connect, poolclass=QueuePool, pool_size=size, max_overflow=overflow
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


@contextmanager
def _clear_errors() -> Iterator[None]:
    """SQLite's 'disk is full' and 'locked' as our own errors."""
    try:
        yield
    except OperationalError as e:
        if "disk is full" in str(e.orig):
            raise DiskFull(
                "The disk is full: the job database could not be written. Nothing already saved was lost. "
                "Free some space and try again."
            ) from e
        if "locked" in str(e.orig):
            raise Busy(
                "The job database is locked by another program. Close what has tunewright.db open and try again."
            ) from e
        raise


class Database:
    """`read()` and `write()` give a connection inside a transaction; writes are one at a time.

    Beside the file lies ballast: SQLite cannot even delete a row on a full disk, so the first write that finds it
    full gives the ballast's space back, and the next one succeeds.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._ballast = path.with_name("ballast")
        _lay_ballast(self._ballast)
        self._writer = _engine(path, "BEGIN IMMEDIATE", _PRAGMAS, size=1, overflow=0)
        self._reader = _engine(path, "BEGIN", (*_PRAGMAS, "query_only=ON"), size=5, overflow=50)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end. Raises DiskFull or Busy; then nothing of it was kept."""
        with self._lock:
            try:
                with _clear_errors(), self._writer.begin() as connection:
                    yield connection
            except DiskFull:
                self._ballast.unlink(missing_ok=True)
                raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot."""
        with _clear_errors(), self._reader.connect() as connection:
            yield connection

    def check(self) -> bool:
        """Whether SQLite finds the file sound."""
        with self.read() as connection:
            return connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() == "ok"

    def migrate(self) -> None:
        """Bring the schema up to date. Raises UserError when a newer tunewright wrote the file."""
        config = Config()
        config.set_main_option(
            "script_location", str(package_files("tunewright.jobs") / "migrations").replace("%", "%%")
        )
        with self.write() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as e:
                raise UserError(
                    "The data folder was written by a newer version of tunewright. Install that version "
                    "(pip install -U tunewright), or set TUNEWRIGHT_HOME to another folder.",
                    code="data_folder_too_new",
                ) from e

    def close(self) -> None:
        self._writer.dispose()
        self._reader.dispose()


def open_database(path: Path) -> tuple[Database, bool]:
    """The migrated database, and whether it is new and empty. A damaged one is set aside beside it."""
    fresh = not path.exists()
    db = Database(path)
    try:
        if fresh or db.check():
            db.migrate()
            return db, fresh
    except DatabaseError as e:
        if "malformed" not in str(e.orig) and "not a database" not in str(e.orig):
            raise
    db.close()
    mark = random_part(8)
    for damaged in path.parent.glob(f"{path.name}*"):
        damaged.rename(path.parent / f"damaged-{mark}-{damaged.name}")
    db = Database(path)
    db.migrate()
    return db, True


def rows_of(cls: type[R], found: Iterable[Any]) -> list[R]:
    """Database rows as dataclass rows; columns that the class lacks are left out."""
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    return [cls(**{n: row[n] for n in names}) for row in found]


def one_page(
    db: Database, cls: type[R], query: Select[Any], table: Table, after: str | None, limit: int, order: str = "desc"
) -> Page[R]:
    """One page of a table that is listed by age. Raises NotFound when nothing has the id `after`."""
    n = table.c.n
    with db.read() as c:
        if after is not None:
            at = c.execute(select(n).where(table.c.id == after)).scalar()
            if at is None:
                raise NotFound(f"No such object: {after}", param="after")
            query = query.where(n < at if order == "desc" else n > at)
        found = c.execute(query.order_by(n.desc() if order == "desc" else n).limit(limit + 1)).mappings().all()
    return Page(rows_of(cls, found[:limit]), len(found) > limit)


def _lay_ballast(path: Path) -> None:
    """A file of 16 MiB, smaller on a small disk; none when there is hardly any space."""
    size = min(_BALLAST_BYTES, shutil.disk_usage(path.parent).free // 8)
    if path.exists() or size < _BALLAST_BYTES // 16:
        return
    with open(path, "xb") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            f.write(bytes(size))
