# `make` lists the targets. Everything is set up in .venv from constraints.txt; nothing is installed elsewhere.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
NATIVE ?= 1
PYTHON ?= $(VENV)/bin/python
BASE_PYTHON := $(shell for p in $(TWODICE_PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
  if command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
  then command -v $$p; break; fi; done)
SOURCES := $(shell find src native -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.j2' -o -name '*.css' -o -name '*.js' \) 2>/dev/null) \
  CMakeLists.txt pyproject.toml constraints.txt

NEEDS_COMPILER = if [ "$(NATIVE)" = 1 ] && ! command -v $${CXX:-c++} >/dev/null 2>&1; then echo "no C++17 compiler found; install one (Debian: apt-get install g++) or do without the fast kernels: make NATIVE=0 $(MAKECMDGOALS)" >&2; exit 1; fi

.PHONY: help demo test test-all check bench native setup clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed  ## set up, run the study on the embedded text, say where the report is
	@$(VENV)/bin/twodice study --preset demo --out runs/demo

test: $(VENV)/.installed-dev  ## set up, pass the tests (slow ones left out)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/.installed-dev  ## all tests, the slow ones too
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

check: $(VENV)/.installed-dev  ## lint, types, structure
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/python -m pytest -q tests/structure

bench: $(VENV)/.installed-dev  ## the benchmarks, side by side with the peers (ratios)
	@$(VENV)/bin/python -m benchmarks

setup: $(VENV)/.installed-dev  ## only set up .venv, with the developer's extra

# The interpreter's own folder goes first, for cmake and ninja lie beside it; one that is named is not set up.
native: $(if $(filter file,$(origin PYTHON)),$(VENV)/.dependencies)  ## build the kernels into src/ for work on them (PYTHON=... chooses the interpreter)
	@$(NEEDS_COMPILER)
	@export PATH="$$(cd "$$(dirname "$$(command -v $(PYTHON))")" && pwd):$$PATH" && \
	mkdir -p build/dev && exec 9>build/dev/.lock && flock 9 && \
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$(command -v $(PYTHON)) -DCMAKE_BUILD_TYPE=Release >build/dev/cmake.log 2>&1 \
	  || { tail -20 build/dev/cmake.log; exit 1; } ; \
	cmake --build build/dev && rm -f src/twodice/_native*.so && \
	for f in build/dev/_native*.so; do cp $$f src/twodice/.new.so && mv -f src/twodice/.new.so src/twodice/$$(basename $$f); done

clean:  ## remove what was built (not the runs)
	@rm -rf build $(VENV) src/twodice/_native*.so

$(VENV)/.python:
	@if [ -z "$(BASE_PYTHON)" ]; then echo "twodice needs Python 3.11 or later with venv; install it (Debian: apt-get install python3 python3-venv) or name one: make TWODICE_PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@$(NEEDS_COMPILER)
	@$(BASE_PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install -q -c constraints.txt pip && touch $@

$(VENV)/.dependencies: constraints.txt pyproject.toml | $(VENV)/.python
	@echo "installing the dependencies into $(VENV) (a few minutes the first time)"
	@$(VENV)/bin/python -m pip install -q -c constraints.txt scikit-build-core nanobind cmake ninja
	@$(VENV)/bin/python -m pip install -q -c constraints.txt $$($(VENV)/bin/python -c "import tomllib; print(*(d.replace(' ', '') for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))")
	@touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.dependencies
	@$(NEEDS_COMPILER)
	@echo "building and installing twodice"
	@$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation --no-deps --force-reinstall -C cmake.define.TWODICE_NATIVE=$(NATIVE) . && touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(VENV)/bin/python -m pip install -q -c constraints.txt $$($(VENV)/bin/python -c "import tomllib; print(*(d.split(';')[0].replace(' ', '') for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev']))") && touch $@
