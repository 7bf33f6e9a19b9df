# make setup | demo | test | lint | soak | audit. Nothing else is needed; see README.md.
PYTHON ?= python3
BIN := .venv/bin
TEACHER ?= models/pocket-teacher
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test lint soak audit clean

setup: .venv/ready

# --editable makes `data_prep` and `pipeline` importable from any folder.
.venv/ready: requirements.txt requirements-test.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "error: python3 -m venv failed; install Debian's python3-venv or set PYTHON" >&2; exit 1; }
	@echo "installing into .venv (several minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements-test.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --editable .
	@touch $@

demo: setup
	@$(BIN)/python -m pipeline.demo --teacher $(TEACHER)

# Two at a time: most of a launcher test is one core's start-up.
test: setup
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# In an environment of its own, since it brings dependencies that are not ours.
audit:
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && \
	  .audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	@.audit/bin/pip-audit --strict --requirement requirements.txt --no-deps --disable-pip

# An hour: a hundred kills of a training, and of a preparation, and damage of every kind.
soak: setup
	@$(BIN)/python -m tests.soak.kills --kills 100
	@$(BIN)/python -m tests.soak.preparation --kills 100
	@$(BIN)/python -m tests.soak.corruptions --number 100

clean:
	rm -rf runs .venv .audit *.egg-info
