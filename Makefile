# make quickstart   train a small model here, in minutes, and look at what it does
# make test         run the tests
# make check        lint, format and types
# make docs         check that the generated pages of docs/ are current
# Each makes .venv first when it is missing or pyproject.toml has changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test check docs

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help:
	@sed -n 's/^# //p' Makefile | head -5

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	model=$$($(BIN)/dtf train quickstart | tail -n 1); \
	$(BIN)/dtf generate "$$model" "def main(" --max-new-tokens 60 --temperature 0.7 --seed 1; \
	$(BIN)/dtf inspect-routing "$$model"

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m tools.reference --check
