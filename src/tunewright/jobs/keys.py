"""API keys and one-time sign-in tokens: only peppered hashes are stored, a key is shown once."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import delete, insert, select, update

from tunewright.core.ids import new_id, random_part
from tunewright.jobs.db import Database, rows_of
from tunewright.jobs.rows import KeyRow, keys, signin_tokens

KEY_PREFIX = "sk-tw-"
_SESSION_SECONDS = 30 * 24 * 3600
_LAST_USED_SECONDS = 60


def read_pepper(path: Path) -> bytes:
    """The 32 random bytes at `path` (0600), made on first use. Without it stored hashes say nothing about keys."""
    if not path.exists():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as f:
            f.write(os.urandom(32))
            f.flush()
            os.fsync(f.fileno())
    return path.read_bytes()


class Keys:
    """The keys in a database. `now` is always Unix seconds."""

    def __init__(self, db: Database, pepper: bytes) -> None:
        self._db = db
        self._pepper = pepper

    def _hash(self, plain: str) -> str:
        return hmac.new(self._pepper, plain.encode(), hashlib.sha256).hexdigest()

    def add(self, name: str, now: int, kind: str = "key", ttl: int | None = None) -> tuple[str, KeyRow]:
        """A new key: its plain text, never stored, and its row."""
        plain = KEY_PREFIX + random_part(40)
        hint = f"{plain[:9]}…{plain[-4:]}"
        row = KeyRow(new_id("key_"), name, kind, hint, now, expires_at=None if ttl is None else now + ttl)
        with self._db.write() as c:
            c.execute(insert(keys).values(**asdict(row), hash=self._hash(plain)))
        return plain, row

    def check(self, plain: str, now: int) -> KeyRow | None:
        """The row of a valid key, or None. Notes its use, at most once a minute."""
        wanted = self._hash(plain)
        with self._db.read() as c:
            found = c.execute(select(keys).where(keys.c.hash == wanted)).mappings().first()
        if found is None or not hmac.compare_digest(found["hash"], wanted) or found["revoked_at"] is not None:
            return None
        if found["expires_at"] is not None and found["expires_at"] <= now:
            return None
        if (found["last_used"] or 0) < now - _LAST_USED_SECONDS:
            with self._db.write() as c:
                c.execute(update(keys).where(keys.c.id == found["id"]).values(last_used=now))
        return rows_of(KeyRow, [found])[0]

    def list(self) -> list[KeyRow]:
        """All keys, newest first, revoked ones too."""
        with self._db.read() as c:
            found = c.execute(select(keys).order_by(keys.c.n.desc())).mappings().all()
        return rows_of(KeyRow, found)

    def revoke(self, key_id: str, now: int) -> bool:
        """Switch a key off for good. False when there is no such key or it is off already."""
        with self._db.write() as c:
            done = c.execute(
                update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            return done.rowcount == 1

    def new_signin_token(self, now: int, ttl: int) -> str:
        """A token that redeem_signin_token accepts once, within `ttl` seconds."""
        plain = random_part(40)
        with self._db.write() as c:
            c.execute(delete(signin_tokens).where(signin_tokens.c.expires_at <= now))
            c.execute(insert(signin_tokens).values(hash=self._hash(plain), expires_at=now + ttl))
        return plain

    def redeem_signin_token(self, plain: str, now: int) -> str | None:
        """The plain text of a fresh session key, or None when the token is unknown, used or too old."""
        with self._db.write() as c:
            used = c.execute(
                delete(signin_tokens).where(signin_tokens.c.hash == self._hash(plain), signin_tokens.c.expires_at > now)
            )
            if used.rowcount != 1:
                return None
        return self.add("browser session", now, kind="session", ttl=_SESSION_SECONDS)[0]
