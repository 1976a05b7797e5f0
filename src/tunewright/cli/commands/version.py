"""`tunewright version`: what is installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from tunewright import __version__


def version() -> None:
    """Print the versions of tunewright and what it stands on."""
    print(f"tunewright {__version__}")
    print(f"python {platform.python_version()}")
    for name in ("torch", "transformers", "peft", "tokenizers", "fastapi", "nicegui"):
        print(f"{name} {_version(name)}")


def _version(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"
