"""A model on this machine, for commands that do not import torch: what must be converted, a subprocess converts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunewright.core.durable import read_json
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.core.run import find_artefact, read_artefact
from tunewright.jobs.launchers.local import worker_env
from tunewright.models.catalogue import resolve

CONVERT = """
import sys
from tunewright.core.errors import TunewrightError
from tunewright.core.home import find_home
from tunewright.models.loader import materialise
try:
    print(materialise(sys.argv[1], find_home()))
except TunewrightError as e:
    sys.exit(e.message)
"""


def tokenizer_folder(name: str, home: Home) -> Path:
    """The folder with the model's tokenizer; of a recipe, that of the model below.

    Raises ModelNotFound, UserError if the files cannot be used.
    """
    if not name.startswith("ft:"):
        return ready_folder(name, home)
    folder = find_artefact(home, name)
    record = read_artefact(folder) if folder.parent == home.recipes else None
    return folder if record is None else tokenizer_folder(str(record.base), home)


def ready_folder(name: str, home: Home) -> Path:
    """The model's safetensors folder, made first if need be (once, in a process with torch)."""
    info = resolve(name, home)
    if info.folder is not None:
        return info.folder
    command = [sys.executable, "-c", CONVERT, name]
    done = subprocess.run(
        command, capture_output=True, text=True, env=worker_env(home, online=info.needs_network), check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The model '{name}' cannot be made ready: {last}", param="model")
    return Path(done.stdout.strip().splitlines()[-1])


def context_of(folder: Path) -> int | None:
    """How many tokens the model attends to, if its folder says so."""
    path = folder / "config.json"
    return read_json(path).get("max_position_embeddings") if path.is_file() else None
