"""Measurements that are kept one by one: a JSON file each, with a key; what is there with its key is not run again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import RivalFailed
from benchmarks.settings import save, say


@dataclass(frozen=True)
class Piece:
    """name: as progress says it. path: its file. key: of all that its result depends on. measure: makes the result."""

    name: str
    path: Path
    key: str
    measure: Callable[[], dict[str, Any]]

    @property
    def is_there(self) -> bool:
        return self.path.is_file() and json.loads(self.path.read_text())["key"] == self.key


def key_of(settings: object, sources: Iterable[Path] = ()) -> str:
    """Hash of settings (plain data) and of what is in files."""
    text = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(b"".join([text, *(path.read_bytes() for path in sources)])).hexdigest()[:16]


def run_pieces(pieces: Iterable[Piece], tell: Callable[[dict[str, Any]], str]) -> int:
    """Measure and save what is not there; one that fails is told and left out. Returns how many failed.

    tell: what is said of a result.
    """
    todo = [piece for piece in pieces if not piece.is_there]
    failed, begun = 0, time.monotonic()
    for i, piece in enumerate(todo):
        left = f" (about {(time.monotonic() - begun) / i * (len(todo) - i) / 60:.0f} min left)" if i else ""
        say(f"[{i + 1}/{len(todo)}] {piece.name}{left}")
        try:
            found = piece.measure()
        except RivalFailed as e:
            say(f"  {e}")
            failed += 1
            continue
        piece.path.parent.mkdir(parents=True, exist_ok=True)
        save({"key": piece.key, **found}, str(piece.path))
        say(f"  {tell(found)}")
    return failed
