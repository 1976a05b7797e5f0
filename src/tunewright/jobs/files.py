"""Files of the Files API: a row each, its bytes by hash. A sidecar beside the bytes lets the rows be rebuilt."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or

from tunewright.core.durable import read_json, write_json
from tunewright.core.home import Home
from tunewright.jobs.db import Database, one_page, rows_of
from tunewright.jobs.rows import FileRow, Page, files


class Files:
    """The files of a data folder. Methods as in Store."""

    def __init__(self, db: Database, home: Home) -> None:
        self._db = db
        self._home = home

    def add(self, row: FileRow) -> None:
        sidecar = self._sidecar(row.id)
        sidecar.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(sidecar, asdict(row))
        with self._db.write() as c:
            c.execute(insert_or(files).values(**asdict(row)).on_conflict_do_nothing())

    def get(self, file_id: str) -> FileRow | None:
        with self._db.read() as c:
            found = c.execute(select(files).where(files.c.id == file_id)).mappings().first()
        return None if found is None else rows_of(FileRow, [found])[0]

    def update(self, file_id: str, changes: dict[str, Any]) -> bool:
        row = self.get(file_id)
        if row is None:
            return False
        write_json(self._sidecar(file_id), asdict(replace(row, **changes)))
        with self._db.write() as c:
            return c.execute(update(files).where(files.c.id == file_id).values(**changes)).rowcount == 1

    def list(self, purpose: str | None, after: str | None, limit: int, order: str) -> Page[FileRow]:
        query = select(files)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        return one_page(self._db, FileRow, query, files, after, limit, order)

    def delete(self, file_id: str) -> bool:
        row = self.get(file_id)
        if row is None:
            return False
        with self._db.write() as c:
            c.execute(delete(files).where(files.c.id == file_id))
            same = c.execute(select(func.count()).select_from(files).where(files.c.sha256 == row.sha256)).scalar_one()
            self._sidecar(file_id).unlink(missing_ok=True)
            if same == 0:
                self._home.blob(row.sha256).unlink(missing_ok=True)
        return True

    def rebuild(self) -> None:
        """Read the rows back from the sidecars, in the order in which the files came."""
        found = [(read_json(p), p.stat().st_mtime_ns) for p in self._sidecar("x").parent.glob("*.json")]
        rows = [row for row, _ in sorted(found, key=lambda f: (f[0]["created_at"], f[1]))]
        with self._db.write() as c:
            c.execute(delete(files))
            if rows:
                c.execute(insert(files), rows)

    def _sidecar(self, file_id: str) -> Path:
        return self._home.files / "rows" / f"{file_id}.json"
