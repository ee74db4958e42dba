# make demo | test | test-all | test-oldest | lint | bench | bench-compare | clean
#   PYTHON=python3.12   the interpreter for .venv (needs 3.11 or later)
#   TORCH=installed     the torch that PYTHON has; nothing is downloaded for it
#   TORCH=2.12.*        that version instead of the pinned one
#   ARGS='--quick'      passed on to the demo
#   QUICK=1             a short bench;  RESULTS=folder  where its page, plots and numbers go
#   BASE=old/cpu.json   what bench-compare holds the last bench in RESULTS against
# PYTHON and TORCH count when .venv is made. What setup.py reads (SHAMPOO_KERNELS_CUDA, CXX, ...)
# counts at every call: another value builds anew.

VENV := .venv
PY := $(VENV)/bin/python

# What .venv was made with stays, and another wish is refused.
ifeq ($(filter clean,$(MAKECMDGOALS)),)
-include $(VENV)/made_with.mk
endif
PYTHON ?= python3
TORCH ?= pinned
ifneq ($(MADE_WITH),)
ifneq ($(MADE_WITH),PYTHON=$(PYTHON) TORCH=$(TORCH))
$(error $(VENV) was made with $(MADE_WITH), not PYTHON=$(PYTHON) TORCH=$(TORCH): make clean first)
endif
endif

ARGS ?=
RESULTS ?= bench/results/local
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
CONSTRAINTS := -c $(VENV)/constraints.txt
EDITABLE = $(INSTALL) $(CONSTRAINTS) --no-build-isolation --editable
# Which torch: a requirement of something else must not replace it.
TORCH_HERE := $(PY) -c 'from importlib import metadata, util; \
    print(metadata.version("torch"), util.find_spec("torch").origin)'
SAME_TORCH = $(TORCH_HERE) | cmp -s - $(VENV)/.torch \
    || { echo 'another torch has come into $(VENV): make clean first'; $(TORCH_HERE); exit 1; }
BUILD_SWITCHES := SHAMPOO_KERNELS_(NATIVE|CUDA)|TORCH_CUDA_ARCH_LIST|CXX|CUDA_(HOME|PATH)|NVCC_CCBIN

.PHONY: demo test test-all test-oldest lint bench bench-compare clean always

demo: $(VENV)/.demo
	@$(PY) -m shampoo_kernels demo $(ARGS)

test: $(VENV)/.test
	@$(PY) -m pytest -q -m "not slow"

test-all: $(VENV)/.all
	@$(PY) -m pytest -q

# The oldest torch that is promised, in an environment of its own; downloads several GB.
test-oldest:
	@$(MAKE) --no-print-directory test-all VENV=build/oldest TORCH='2.11.*'

lint: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(PY) -m mypy

bench: $(VENV)/.bench
	@mkdir -p $(RESULTS)
	@$(PY) -m pytest -q bench --benchmark-quiet --benchmark-json=$(RESULTS)/cpu.json
	@$(PY) bench/report.py $(RESULTS)/cpu.json > $(RESULTS)/cpu.md
	@sed -n '/^| op /,/^$$/p' $(RESULTS)/cpu.md
	@echo 'The whole page, plots and numbers: $(RESULTS)/cpu.md'

bench-compare: $(VENV)/.created
	@test -n '$(BASE)' || { echo 'make bench-compare BASE=cpu.json of an earlier make bench'; exit 1; }
	@test -e $(RESULTS)/cpu.json || { echo 'there is no $(RESULTS)/cpu.json yet: make bench'; exit 1; }
	@$(PY) bench/compare.py '$(BASE)' $(RESULTS)/cpu.json

clean:
	rm -rf $(VENV) build dist *.egg-info shampoo_kernels/_build.json shampoo_kernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each file stands for a finished installation, so that the next call starts at once.
$(VENV)/.created:
	@command -v '$(PYTHON)' >/dev/null \
	    || { echo 'there is no $(PYTHON) here: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'shampoo_kernels needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo '$(PYTHON) cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@printf '%s\n' 'MADE_WITH := PYTHON=$(PYTHON) TORCH=$(TORCH)' 'PYTHON ?= $(PYTHON)' \
	    'TORCH ?= $(TORCH)' > $(VENV)/made_with.mk
	@touch $@

# torch comes first and alone: what follows finds it installed and brings no CUDA libraries along.
# Another torch than the pinned one chooses its own setuptools and triton.
$(VENV)/.torch: $(VENV)/.created constraints.txt
ifeq ($(TORCH),pinned)
	@cp constraints.txt $(VENV)/constraints.txt
else
	@grep -Ev '^(torch|setuptools|triton)==' constraints.txt > $(VENV)/constraints.txt
endif
ifeq ($(TORCH),installed)
	@$(PYTHON) -W ignore -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])' \
	    > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed_torch.pth \
	    || { echo 'TORCH=installed, but $(PYTHON) has no torch that can be imported'; exit 1; }
else
	@echo "Installing torch ..."
	@$(INSTALL) $(CONSTRAINTS) torch$(if $(filter-out pinned,$(TORCH)),'==$(TORCH)')
endif
	@$(TORCH_HERE) > $@.new
	@sed 's/ .*//; s/^/torch==/' $@.new >> $(VENV)/constraints.txt
	@mv $@.new $@

# What setup.py takes from the environment; written when it changes, and then all is built anew.
build/switches: always
	@mkdir -p build
	@{ echo VENV=$(VENV); env | grep -E '^($(BUILD_SWITCHES))=' | sort; } > $@.new
	@cmp -s $@.new $@ || cp $@.new $@

$(VENV)/.demo: $(VENV)/.torch $(BUILD_INPUTS) build/switches
	@echo "Installing the requirements and building the extension ..."
	@$(INSTALL) $(CONSTRAINTS) torch 'setuptools>=77' ninja pybind11
	@$(EDITABLE) '.[demo]'
	@$(SAME_TORCH)
	@$(PY) -c 'from shampoo_kernels import native; print("native kernels:", native.why_not or "built")'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(EDITABLE) '.[demo,test,peers]'
	@$(SAME_TORCH)
	@touch $@

# What slow tests use beside (trainers, jax) and safetensors: they skip, saying so, without it.
$(VENV)/.all: $(VENV)/.test
	@$(EDITABLE) '.[demo,test,peers,all]'
	@$(SAME_TORCH)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(EDITABLE) '.[demo,test,peers,bench]'
	@$(SAME_TORCH)
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(EDITABLE) '.[demo,test,peers,dev]'
	@$(SAME_TORCH)
	@touch $@
