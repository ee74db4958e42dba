# make demo | test | test-all | lint | bench | clean
#   PYTHON=python3.12   the interpreter for .venv (needs 3.11 or later)
#   TORCH=installed     the torch that PYTHON has; nothing is downloaded for it
#   ARGS='--quick'      passed on to the demo
#   QUICK=1             a short bench;  RESULTS=folder  where its table and numbers go
# PYTHON and TORCH count when .venv is made: `make clean` first to change them.

PYTHON ?= python3
TORCH ?= pinned
ARGS ?=
RESULTS ?= bench/results/local
VENV := .venv
PY := $(VENV)/bin/python
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
CONSTRAINTS := -c $(VENV)/constraints.txt
EDITABLE = $(INSTALL) $(CONSTRAINTS) --no-build-isolation --editable

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.demo
	@$(PY) -m shampoo_kernels demo $(ARGS)

test: $(VENV)/.test
	@$(PY) -m pytest -q -m "not slow"

test-all: $(VENV)/.test
	@$(PY) -m pytest -q

lint: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(PY) -m mypy

bench: $(VENV)/.bench
	@mkdir -p $(RESULTS)
	@$(PY) -m pytest -q bench --benchmark-only --benchmark-quiet --benchmark-json=$(RESULTS)/cpu.json
	@$(PY) bench/report.py $(RESULTS)/cpu.json | tee $(RESULTS)/cpu.md

clean:
	rm -rf $(VENV) build dist *.egg-info shampoo_kernels/_build.json shampoo_kernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each file stands for a finished installation, so that the next call starts at once.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'shampoo_kernels needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo '$(PYTHON) cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: what follows finds it installed and brings no CUDA libraries along.
$(VENV)/.torch: $(VENV)/.created constraints.txt
ifeq ($(TORCH),installed)
	@$(PYTHON) -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])' \
	    > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed_torch.pth \
	    || { echo 'TORCH=installed, but $(PYTHON) has no torch that can be imported'; exit 1; }
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
else
	@cp constraints.txt $(VENV)/constraints.txt
	@echo "Installing torch ..."
	@$(INSTALL) $(CONSTRAINTS) torch
endif
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "Installing the requirements and building the extension ..."
	@$(INSTALL) $(CONSTRAINTS) setuptools ninja pybind11
	@$(EDITABLE) '.[demo]'
	@$(PY) -c 'from shampoo_kernels import native; print("native kernels:", native.why_not or "built")'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(EDITABLE) '.[demo,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(EDITABLE) '.[demo,test,bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(EDITABLE) '.[demo,test,dev]'
	@touch $@
