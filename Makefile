# Every target sets up what it needs, in .venv, from requirements.txt. `make help` lists the targets.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=
TRITON ?=

VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := pyproject.toml setup.py $(wildcard build_support/*.py) fastsam/_version.py $(NATIVE_SOURCES)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench bench-quick readme-figures gpu-report clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12      the Python (3.10 or newer) that .venv is made with"
	@echo "  PIP_ARGS=...           more options for pip, for example the small PyTorch without CUDA:"
	@echo "                         make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"
	@echo "  PYTEST_ARGS=...        more options for pytest, for example PYTEST_ARGS='-k info'"
	@echo "  TRITON=3.4.0           the Triton of a new .venv, instead of PyTorch's or 3.6.0"
	@echo "  FASTSAM_SKIP_CUDA=1    build without the CUDA part even where nvcc is found"

venv: $(VENV)/.package  ## make .venv with the pinned versions and fastsam itself, compiled

$(VENV)/.requirements: requirements.txt
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "fastsam needs Python 3.10 or newer: install it, or name it with make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (python3-venv on Debian)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@# A PyTorch with CUDA has brought its own Triton; tests run the kernels in the interpreter of this one.
	@[ "$$(uname)" != Linux ] || { [ -z '$(TRITON)' ] && $(BIN)/python -c 'import triton' 2>/dev/null; } || \
		$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) triton==$(or $(TRITON),3.6.0)
	@touch $@

# pip hides what the build did; the last command shows it.
$(VENV)/.package: $(VENV)/.requirements $(BUILD_FILES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --editable .
	$(BIN)/python -m fastsam
	@touch $@

demo: venv  ## train a small SA-ConvLSTM on MovingMNIST for a few minutes, evaluate it, write pictures
	$(BIN)/python -m training demo

test: lint  ## check the style and the types, then run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv  ## check the style and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

bench: venv  ## time fastsam against its peers for about an hour, into benchmarks/results
	$(BIN)/python -m benchmarks $(PYTEST_ARGS)

bench-quick: venv  ## the same on small maps in two minutes
	$(BIN)/python -m benchmarks --quick $(PYTEST_ARGS)

readme-figures: venv  ## put the table and plot of the newest results into README.md
	$(BIN)/python -m benchmarks.report --readme

gpu-report:  ## build, GPU tests and benchmarks with the PyTorch of PYTHON, into the folder OUT (gpu-report)
	PYTHON='$(PYTHON)' OUT='$(or $(OUT),gpu-report)' benchmarks/gpu_report.sh $(PYTEST_ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info fastsam/_build.json fastsam/_native*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
