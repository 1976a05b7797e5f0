"""Warns of source files over 400 lines. A longer file is a sign that it holds two ideas; exceptions give a reason."""

from __future__ import annotations

from pathlib import Path

LIMIT = 400
ALLOWED: dict[str, str] = {}  # path -> why it may be longer


def long_files(root: Path) -> list[str]:
    """`path: N lines` for each file of src/ that is over the limit and not listed with a reason."""
    found = []
    for path in sorted((root / "src").rglob("*.py")):
        name = str(path.relative_to(root))
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > LIMIT and name not in ALLOWED:
            found.append(f"{name}: {n} lines")
    return found


if __name__ == "__main__":
    for line in long_files(Path(__file__).parent.parent):
        print(f"warning: {line} (over {LIMIT}; split it, or list it in tools/long_files.py with a reason)")
