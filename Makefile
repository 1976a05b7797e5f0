# One file of commands. Needs python3 (3.11 or newer) and make; everything else goes into .venv.
#
# PYTHON=python3.12            another interpreter
# TORCH_INDEX=URL              where torch comes from: https://download.pytorch.org/whl/cpu for a small CPU build,
#                              https://download.pytorch.org/whl/cu130 for CUDA; empty = whatever pip is set up for
# TUNEWRIGHT_HOME=FOLDER       where models, jobs and the database live (default ~/.tunewright)
# DATA=FOLDER                  public sets for `make objectives-table` (benchmarks/README.md names the files)

PYTHON ?= python3
TORCH_INDEX ?=
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo install dev sdks test test-slow test-slow-parts test-slow-whole test-all check fmt serve bench nightly methods-table objectives-table docs lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

demo: install ## install everything, train the demo model, show base and tuned answers side by side
	$(BIN)/tunewright demo

install: $(VENV)/.runtime

dev: $(VENV)/.dev

$(VENV)/.runtime: requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tunewright needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python has no venv module here (Debian: apt install python3-venv)."; exit 1; }
	@echo "Installing $(TORCH) (set TORCH_INDEX= to choose a CPU or CUDA build) ..."
	$(PIP) install $(TORCH) -c requirements/lock.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "Installing the pinned packages of requirements/lock.txt ..."
	$(PIP) install -q --no-deps -r requirements/lock.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt
	@echo "Installing what tests and checks need ..."
	$(PIP) install -q --no-deps -r requirements/dev.txt
	@touch $@

sdks: $(VENV)/.dev ## packages that tests need outside their environment (openai's versions, bitsandbytes), into .sdks/
	@$(BIN)/python tests/api/install_sdks.py

test: dev ## the default tests (a little over a minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: test-slow-parts test-slow-whole ## the slow tests: real model, kill -9, browser (the browser ones need chromium)

SLOW := $(BIN)/python -m pytest -m "slow and not nightly" --durations=25
test-slow-parts: dev sdks
	OMP_NUM_THREADS=1 $(SLOW) -n 2 --dist loadfile --ignore=tests/e2e

test-slow-whole: dev sdks # the product as a whole, one after the other: some measure this machine
	$(SLOW) tests/e2e

test-all: test test-slow ## all tests

check: dev ## lint, formatting, types, layers, file lengths, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/long_files.py
	$(BIN)/python tools/reference.py --check

fmt: dev ## fix formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: install ## API and dashboard on this machine, without API keys
	$(BIN)/tunewright up --open

docs: dev ## write the generated pages of docs/reference
	$(BIN)/python tools/reference.py

methods-table: install ## docs/methods.md: every method on a real model (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.retain
	$(BIN)/python -m benchmarks.untuned
	$(BIN)/python -m benchmarks.proxy

objectives-table: install ## the measured part of docs/objectives.md (hours; goes on where it stopped); DATA=FOLDER of public sets
	$(BIN)/python -m benchmarks.objectives $(if $(DATA),--data $(DATA))

bench: install ## a short look at training speed beside a plain loop (four minutes; benchmarks/README.md has the rest)
	$(BIN)/python -m benchmarks.sft --data benchmarks/data/short.jsonl --only ours,plain --rounds 1 --seconds 40

nightly: demo check test-all ## everything
	$(BIN)/python -m pytest -m nightly

lock: ## resolve the dependencies again
	PYTHON=$(PYTHON) requirements/lock.sh

clean: ## remove the environment and the caches (never the data folder)
	rm -rf $(VENV) .sdks .pytest_cache .ruff_cache .import_linter_cache
