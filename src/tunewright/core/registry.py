"""Tables: a name -> where the part lives. Read by a human, imported lazily, open to entry points."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from tunewright.core.errors import SpecError, did_you_mean


@dataclass(frozen=True)
class Table:
    """One kind of part. `rows` maps a name to 'package.module:attribute'; other packages add rows by entry points.

    Example: Table("tuner", {"lora": "tunewright.tuners.lora:LoRA"}).load("lora")
    """

    kind: str
    rows: Mapping[str, str]

    @property
    def group(self) -> str:
        """The entry-point group, e.g. `tunewright.tuner`."""
        return f"tunewright.{self.kind}"

    def paths(self) -> dict[str, str]:
        """Every name with its import path, ours first; an entry point cannot replace one of ours."""
        found = {e.name: e.value for e in entry_points(group=self.group)}
        return {**found, **self.rows}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.paths()))

    def load(self, name: str) -> Any:
        """Import and return the part. Raises SpecError with the allowed names and the nearest one."""
        # looking through all installed packages takes milliseconds; our own rows need it only for the error
        paths = self.rows if name in self.rows else self.paths()
        if name not in paths:
            raise SpecError(
                f"There is no {self.kind} '{name}'. Use one of: {', '.join(sorted(paths))}."
                + did_you_mean(name, paths),
                param=self.kind,
            )
        module, _, attribute = paths[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
