"""The data folder: where everything lives. `TUNEWRIGHT_HOME`, else ~/.tunewright."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError


@dataclass(frozen=True)
class Home:
    """Paths under the data folder. Reading a property creates nothing; `ensure()` makes the folders (0700)."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "tunewright.db"

    @property
    def files(self) -> Path:
        """Content-addressed uploads: files/<first two of sha256>/<sha256>."""
        return self.root / "files"

    @property
    def runs(self) -> Path:
        """One folder a job: runs/<job id>/."""
        return self.root / "runs"

    @property
    def models(self) -> Path:
        """Base models in safetensors, one folder each, with `source.json`."""
        return self.root / "models"

    @property
    def recipes(self) -> Path:
        """Models made without training, one folder each, named as the last part of the model's name."""
        return self.root / "recipes"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def blob(self, sha256: str) -> Path:
        return self.files / sha256[:2] / sha256

    def ensure(self) -> Home:
        """Create the folders. Raises UserError if the place cannot be written."""
        try:
            for p in (self.root, self.files, self.runs, self.models, self.recipes, self.cache, self.logs):
                p.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise UserError(
                f"The data folder {self.root} cannot be written ({e.strerror}). "
                "Set TUNEWRIGHT_HOME to a folder of yours, or fix its permissions.",
                code="data_folder_not_writable",
            ) from e
        return self


def find_home(root: str | os.PathLike[str] | None = None) -> Home:
    """The data folder from the argument, else TUNEWRIGHT_HOME, else ~/.tunewright. Creates nothing."""
    place = root or os.environ.get("TUNEWRIGHT_HOME") or "~/.tunewright"
    return Home(Path(place).expanduser().absolute())
