# `make demo` and `make test` are all a newcomer needs: Python 3.11+, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types evidence bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m torchgraft.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term

# Records every technique anew at laptop scale; about two hours on two cores, needs TORCHGRAFT_DATA.
evidence: $(STAMP)
	set -e; for recipe in $$($(BIN)/torchgraft list --json | $(BIN)/python -c 'import json, sys; print(*(c["slug"] for c in json.load(sys.stdin)))'); do \
	  $(BIN)/torchgraft run $$recipe --record; \
	done

bench: $(STAMP)
	set -e; for name in $$(ls torchgraft/bench | sed -n 's/^\([a-z].*\)\.py$$/\1/p'); do \
	  OMP_NUM_THREADS=1 $(BIN)/torchgraft bench $$name --record; \
	done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage .hypothesis
