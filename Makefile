# `make demo` and `make test` need Python 3.11 or newer, make and a package index; nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
# The first interpreter that is new enough; override with `make PYTHON=/path/to/python3.12 test`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := prhs_cli kernels/prhs_kernels calibration/prhs_calibration tests

# torch's threads spin where they wait, which costs a factor on a machine that also does something else
export OMP_WAIT_POLICY ?= PASSIVE
# but sleeping at once costs a third of the speed where nothing else runs: spin for some 10 us
export GOMP_SPINCOUNT ?= 2000

.PHONY: help demo test lint format docs bench compile-all clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 13

demo: $(INSTALLED) ## calibrate, verify, generate, analyze and plot on the embedded model; at most 8 minutes
	$(BIN)/python -m prhs_cli.demo

test: $(INSTALLED) ## every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## formatting, lint and types
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m mypy $(filter-out tests,$(SOURCES))

format: $(INSTALLED) ## rewrite the formatting
	$(BIN)/python -m ruff format $(SOURCES)
	$(BIN)/python -m ruff check --fix $(SOURCES)

docs: $(INSTALLED) ## write docs/cli.md from the command line itself
	$(BIN)/python -m prhs_cli.manual docs/cli.md

bench: $(INSTALLED) ## on a GPU: every operator right? then one layer, then whole decode steps; at most 25 minutes
	$(BIN)/python -W ignore -m prhs_kernels.bench.gpu_check --seconds 500
	$(BIN)/prhs bench operator --seconds 500
	$(BIN)/prhs bench decode --seconds 500

compile-all: $(INSTALLED) ## compile every kernel for sm_80, sm_90, sm_100; registers and shared memory
	PYTHONPATH=kernels $(BIN)/python -W ignore -m prhs_kernels.bench.compile --json docs/benchmarks/compile.json

clean: ## remove the virtual environment and what building left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch is pinned to a version, not to a build: pip takes the one your package index offers.
$(INSTALLED): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo 'make: no Python 3.11 or newer found; say which with PYTHON=...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
