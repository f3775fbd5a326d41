# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where the CPU build of torch comes from. PyPI's own build of torch on Linux carries gigabytes of CUDA libraries.
# Empty: the index pip is configured with.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STEPS ?= 100000
# Test processes at once; each test runs on one thread unless threads are its subject.
WORKERS ?= $(shell nproc)
SEED ?= 0

PIP := $(VENV)/bin/python -m pip
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow check simulate bench clean

help:
	@echo "make demo       install, compile the bundled model, serve it, chat with it, stop"
	@echo "make test       install, run the CPU suite"
	@echo "make test-slow  the long tests"
	@echo "make check      format, lint, types"
	@echo "make simulate   scheduler simulation, STEPS=$(STEPS) SEED=$(SEED)"

$(STAMP): pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(RUN) examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal -m slow

check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	rm -rf build/types && mkdir -p build/types/llmc  # mypy knows no mapped rooms: show it the package as one folder
	ln -s $(CURDIR)/llmc/* $(foreach room,artifacts compiler kernels passes runtime,$(CURDIR)/$(room)) build/types/llmc/
	cd build/types && $(abspath $(RUN)) -m mypy --config-file $(CURDIR)/pyproject.toml -p llmc

simulate: $(STAMP)
	$(RUN) -m tests.runtime.simulation --steps $(STEPS) --seed $(SEED)

clean:
	rm -rf $(VENV) build dist *.egg-info
