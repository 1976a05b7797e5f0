"""Install packages that tests need but must not have in their own environment, each into a folder of its own.

The versions of the openai package that the tests talk with; bitsandbytes, which peft imports wherever it finds it (some
seconds for each process). `python tests/api/install_sdks.py [NAME …]` installs what is missing into $TUNEWRIGHT_SDKS
(default <repo>/.sdks).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSIONS = ("3.54.0", "2.54.0", "1.109.1")
# the newest one first: what the server does alike for all of them is checked with it alone
OTHERS = ("bitsandbytes-0.50.2",)


def folder() -> Path:
    return Path(os.environ.get("TUNEWRIGHT_SDKS") or Path(__file__).parents[2] / ".sdks")


def full_name(name: str) -> str:
    """`openai-3.54.0` for `3.54.0`."""
    return f"openai-{name}" if name in VERSIONS else name


def installed(name: str) -> bool:
    return (folder() / name / f"{full_name(name)}.dist-info").is_dir()


def install(name: str) -> None:
    """pip install --target, into a temporary folder first: a broken-off install is not taken for a whole one."""
    target = folder() / name
    half = target.with_name(f".{name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps"] if name in OTHERS else []  # what it needs is in the environment
    subprocess.run([*pip, *alone, "--target", str(half), full_name(name).replace("-", "==")], check=True)
    half.rename(target)


def main() -> None:
    for name in sys.argv[1:] or [*VERSIONS, *OTHERS]:
        if not installed(name):
            print(f"installing {full_name(name)}")
            install(name)


if __name__ == "__main__":
    main()
