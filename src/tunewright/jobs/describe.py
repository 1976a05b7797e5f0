"""The describe file: the options and capabilities of every part, which only code with torch knows.

Made once by a subprocess, then read from the data folder's cache for as long as the installed code is the same.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import TunewrightError
from tunewright.core.home import Home
from tunewright.core.spec import KINDS, LISTS
from tunewright.jobs.launchers.local import worker_env

COMMAND = (sys.executable, "-m", "tunewright.train.describe")
_PACKAGES = ("tunewright", "torch", "transformers", "peft")
_SOURCES = ("tuners", "objectives", "train")
_SECONDS = 300


def load_describe(home: Home) -> dict[str, Any]:
    """{kind: {name: {"schema", "defaults", "card", …}}, …, "versions"}. Takes seconds the first time.

    Raises TunewrightError when the parts cannot be loaded.
    """
    path = home.cache / f"describe-{_digest()}.json"
    if path.exists():
        return read_json(path)
    described = _ask(home)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in home.cache.glob("describe-*.json"):
        old.unlink(missing_ok=True)
    write_json(path, described)
    return described


def _ask(home: Home) -> dict[str, Any]:
    done = subprocess.run(
        COMMAND, capture_output=True, env=worker_env(home), stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
    )
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise TunewrightError(
            f"The training parts cannot be loaded: {last[0][:300]}. `tunewright doctor` says what is missing.",
            code="describe_failed",
        )
    return json.loads(done.stdout)


def _digest() -> str:
    """Changes with the installed versions, the entry points and, for a checkout, the files of our own parts."""
    lines = [f"{name} {_version(name)}" for name in _PACKAGES]
    for kind in (*KINDS, *LISTS):
        lines += [
            f"{e.group} {e.name} {e.value} {e.dist.version if e.dist else ''}"
            for e in entry_points(group=f"tunewright.{kind}")
        ]
    lines += [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in _source_files()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _source_files() -> list[Path]:
    spec = find_spec("tunewright")
    roots = [Path(r) for r in (spec.submodule_search_locations or [])] if spec else []
    return [p for root in roots for part in _SOURCES for p in sorted((root / part).rglob("*.py"))]
