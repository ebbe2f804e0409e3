# demo, test and lint set up their own environment, with the versions of constraints.txt.
# test-gpu and bench run in the environment that is active and install nothing.

SHELL := bash

PYTHON ?= python3
WORKERS ?= 2
GPU_WORKERS ?= 8

VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRITON := 3.6.0
BESIDE := $(VENV)/triton-$(OLDEST_TRITON)
TORCH := $(shell grep '^torch==' constraints.txt)
SET_UP := constraints.txt pyproject.toml setup.cfg
SUITES := tests/unit tests/compile tests/aot tests/models tests/families tests/sparsity

# A stale compile cache turns failures green, so each run has its own.
FRESH_CACHES = caches=$$(mktemp -d) && trap 'rm -rf "$$caches"' EXIT && \
	export TORCHINDUCTOR_CACHE_DIR=$$caches/inductor TRITON_CACHE_DIR=$$caches/triton

# pytest-xdist already fills the cores; worksteal keeps the tests of a module, and so its fixtures, together.
PARALLEL_PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-all test-families test-oldest test-gpu bench lint format clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 15

demo: $(VENV)/.installed  ## train a small language model through the op, compare it with eager, then make it sparse
	$(VENV)/bin/python examples/train_small_lm.py
	$(VENV)/bin/python examples/hf_sa.py --sparse_attn skip_softmax_calib --backend triton \
		--export_dir examples/output/sparse-model

test: SELECTED := not slow and not gpu
test: $(BESIDE)/.installed  ## the tests that need no GPU, within ten minutes on two cores
test-all: SELECTED := not gpu
test-all: $(BESIDE)/.installed  ## all tests that need no GPU
test test-all:
	@$(FRESH_CACHES) && \
	$(call PARALLEL_PYTEST,$(VENV)) $(SUITES) -m "$(SELECTED)" && \
	PYTHONPATH="$(CURDIR)/$(BESIDE)" $(call PARALLEL_PYTEST,$(VENV)) tests/aot/test_hopper*.py -m "$(SELECTED)" && \
	TRITON_INTERPRET=1 $(call PARALLEL_PYTEST,$(VENV)) tests/interpret -m "$(SELECTED)"

test-families: $(VENV)/.installed  ## every family of Transformers against eager; writes docs/transformers-families.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.families --workers $(WORKERS) --write

test-oldest: $(OLDEST)/.installed  ## kernels under the oldest Triton: compiled ahead of time, and interpreted
	@$(FRESH_CACHES) && \
	$(call PARALLEL_PYTEST,$(OLDEST)) tests/aot && \
	TRITON_INTERPRET=1 $(call PARALLEL_PYTEST,$(OLDEST)) tests/interpret

test-gpu:  ## the GPU suite, on an NVIDIA GPU
	@$(FRESH_CACHES) && \
	PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(GPU_WORKERS) --dist worksteal \
		tests/gpu tests/models -m "gpu or not slow"

bench:  ## speed against the alternatives on whatever device is there
	PYTHONPATH="$(CURDIR)" $(PYTHON) examples/benchmarks/run.py

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/.installed-dev  ## let ruff fix what it can
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find fa_ops fa_ops_meta tests examples -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone, so that pip takes the build that this machine offers (a CPU one, where there is one).
$(VENV)/.installed: $(SET_UP)
	$(call NEW_VENV,$(VENV))
	$(VENV)/bin/python -m pip install -c constraints.txt setuptools
	$(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[hf,plot,test,train]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# The oldest Triton beside the pinned one, for what compiles the kernels of sm_90 with both.
$(BESIDE)/.installed: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --no-deps --upgrade --target $(BESIDE) triton==$(OLDEST_TRITON)
	PYTHONPATH=$(BESIDE) $(VENV)/bin/python -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)"'
	touch $@

# torch asks for one exact Triton, so pip is not asked. Triton 3.6's interpreter needs numpy < 2.4.
$(OLDEST)/.installed: $(SET_UP)
	$(call NEW_VENV,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --no-deps triton==$(OLDEST_TRITON)
	$(OLDEST)/bin/python -m pip install -c <(grep -v '^numpy==' constraints.txt) \
		'numpy<2.4' expecttest pytest pytest-timeout pytest-xdist setuptools
	$(OLDEST)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

define NEW_VENV
$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install $(TORCH)
endef
