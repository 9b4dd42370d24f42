# make quickstart   train a small model here, in minutes, and look at what it does
# make test         the quick tests, while you work: about six minutes on two cores
# make test-all     all tests, what CI runs: about half an hour on two cores
# make check        lint, format, types, and who imports whom
# make docs         check that the generated pages of docs/ are current
# Each makes .venv first when it is missing or pyproject.toml has changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all check docs

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help:
	@sed -n 's/^# //p' Makefile | head -6

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	model=$$($(BIN)/dtf train quickstart | tail -n 1); \
	$(BIN)/dtf generate "$$model" "def main(" --max-new-tokens 60 --temperature 0.7 --seed 1; \
	$(BIN)/dtf inspect-routing "$$model"

PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(INSTALLED)
	HYPOTHESIS_PROFILE=dev $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not long and not gpu"

test-all: $(INSTALLED)
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest $(PARALLEL) -m "not long and not gpu"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.house --check

docs: $(INSTALLED)
	$(BIN)/python -m tools.reference --check
