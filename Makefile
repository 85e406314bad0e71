# Two commands do everything: `make demo` and `make test`. Both need Python 3.10 or newer and set up .venv first.
PYTHON ?= python3
# The CPU build is enough. Where the package index serves another build by default, say which one you want here.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
CPU := $(VENV)/.cpu
STAGES := exporter graph_passes plugins calibration engine runtime bench

CPU_SOURCES := $(wildcard plugins/cpu/*) plugins/onnxruntime/ort.h plugins/onnxruntime/ort_abi.h

.PHONY: help setup demo test cpu plugins lint typecheck format clean

help:
	@echo "make demo       export both example checkpoints, verify, generate text, measure latency, quantize one"
	@echo "make test       ruff, mypy, pytest"
	@echo "make cpu        the CPU kernels again, after a change of plugins/cpu; everything above does it too"
	@echo "make plugins    the libraries for TensorRT and ONNX Runtime, with the CUDA compiler of PyPI's wheels or your own"
	@echo "make lint       ruff and mypy only"
	@echo "make format     let ruff format the sources"
	@echo "make clean      remove everything that was built, .venv included"

setup: $(CPU)

# torch first and alone, so that resolving the other requirements cannot choose another build of it.
$(READY): pyproject.toml VERSION
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[export,dev]'
	touch $@

# The editable install compiled the library: again when its sources change, with the tools that are in .venv now.
cpu: $(CPU)
$(CPU): $(READY) $(CPU_SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(CPU)
	$(BIN)/python examples/demo.py

test: lint $(TOOLS) $(CPU)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# TensorRT without a GPU, and a CUDA compiler: 300 MB that only the tests and `make plugins` need.
$(TOOLS): $(READY) tests/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement tests/requirements.txt
	touch $@

plugins: $(TOOLS)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset plugins
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset plugins

lint: $(READY) typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install: lay the namespace out as links, which pyproject.toml's mypy_path names.
typecheck: $(READY)
	rm -rf build/typecheck
	mkdir -p build/typecheck/qwenforge
	cd build/typecheck/qwenforge && ln -s ../../../qwenforge/* $(addprefix ../../../,$(STAGES)) .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
