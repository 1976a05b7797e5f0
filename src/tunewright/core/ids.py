"""Ids and names as OpenAI forms them: `file-…`, `ftjob-…`, `ft:base:org:suffix:id8[:ckpt-step-N]`."""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass

ALPHABET = string.ascii_letters + string.digits
_MODEL_NAME = re.compile(
    r"^ft:(?P<base>[^:]+):(?P<org>[^:]*):(?P<suffix>[^:]*):(?P<id>[A-Za-z0-9]{8})(?::ckpt-step-(?P<step>\d+))?$"
)


def random_part(length: int = 24) -> str:
    """`length` base62 characters from the operating system's random source."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` plus a random part, e.g. new_id("file-")."""
    return prefix + random_part(length)


@dataclass(frozen=True)
class ModelName:
    """The parts of a fine-tuned model's name. `step` is None for the final model."""

    base: str
    org: str
    suffix: str
    id: str
    step: int | None = None

    def __str__(self) -> str:
        tail = "" if self.step is None else f":ckpt-step-{self.step}"
        return f"ft:{self.base}:{self.org}:{self.suffix}:{self.id}{tail}"


def parse_model_name(name: str) -> ModelName | None:
    """The parts of an `ft:` name, or None if it is not one."""
    m = _MODEL_NAME.match(name)
    if m is None:
        return None
    step = m["step"]
    return ModelName(m["base"], m["org"], m["suffix"], m["id"], None if step is None else int(step))
