"""The database: one file, one writer, many readers. SQLite from pysqlite3, whose engine has the WAL-reset fix."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from pysqlite3 import dbapi2
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from tunewright.core.errors import Busy, DiskFull, UserError

_BUSY_SECONDS = 5.0
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
    """`read()` and `write()` give a connection inside a transaction; writes are one at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._writer = _engine(path, "BEGIN IMMEDIATE", _PRAGMAS, size=1, overflow=0)
        self._reader = _engine(path, "BEGIN", (*_PRAGMAS, "query_only=ON"), size=5, overflow=50)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end. Raises DiskFull or Busy; then nothing of it was kept."""
        with self._lock, _clear_errors(), self._writer.begin() as connection:
            yield connection

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
