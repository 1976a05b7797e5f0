"""The rivals' own Python environment, made once from requirements-trl.txt: `python -m benchmarks.venv`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".venv-trl"
REQUIREMENTS = HERE / "requirements-trl.txt"
STAMP = FOLDER / ".made-from"


def trl_python() -> str:
    """The interpreter that has TRL; the environment is made (some minutes, from the package index) if need be."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    python = FOLDER / "bin" / "python"
    if python.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return str(python)
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    (torch,) = (line for line in lines if line.startswith("torch=="))
    print(f"Making {FOLDER} from {REQUIREMENTS.name} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # torch alone and by its exact version first: resolved together with others it may bring the newest CUDA build
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    STAMP.write_text(wanted)
    return str(python)


if __name__ == "__main__":
    print(trl_python())
