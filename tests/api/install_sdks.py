"""Install the versions of the openai package that the tests talk with, each into a folder of its own.

`python tests/api/install_sdks.py [VERSION …]` installs what is missing into $TUNEWRIGHT_SDKS (default <repo>/.sdks).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSIONS = ("3.54.0", "2.54.0", "1.109.1")
# the newest one is what the default tests use; the others run in the slow tests
NEWEST = VERSIONS[0]


def folder() -> Path:
    return Path(os.environ.get("TUNEWRIGHT_SDKS") or Path(__file__).parents[2] / ".sdks")


def installed(version: str) -> bool:
    return (folder() / version / f"openai-{version}.dist-info").is_dir()


def install(version: str) -> None:
    """pip install --target, into a temporary folder first: a broken-off install is not taken for a whole one."""
    target = folder() / version
    half = target.with_name(f".{version}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(half), f"openai=={version}"], check=True)
    half.rename(target)


def main() -> None:
    for version in sys.argv[1:] or VERSIONS:
        if not installed(version):
            print(f"installing openai {version}")
            install(version)


if __name__ == "__main__":
    main()
