# make train   sets up .venv and trains configs/tiny.yaml
# make test    sets up .venv and runs the tests (make test-all: the slow ones too)
# make check   format, lint, types
# make plan    sets up .venv-plan (with the CUDA plugin, 4 GB) and plans Llama-3-8B on 8
#              H100; another plan: make plan ARGS="--config configs/... --gpus ..."
# make test-plan   the tests that compile for GPUs
# make test-kernels  those of the kernels for packed documents, on Python 3.12 or newer
#              where there is one; it may set up another 4 GB, .venv-kernels
# make gpu-check  kernels true and fast on this machine's GPU? Uses $(PYTHON) as it is where
#              its JAX sees a GPU, else .venv-plan; writes docs/measured.md and .json
# make strategies  benchmarks/strategies.py, with ringattention in .venv-ringattention
# PYTHON=python3.12 make test   uses another Python; where none is named, make plan takes
#              python3, or where that is older a Python 3.12 or newer that it finds

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
INSTALLED := .venv/installed-for-python-$(VERSION)
IN := .venv/bin/

# The plan compiles for GPUs and so needs JAX's CUDA plugin: an environment of its own, on
# Python 3.12 or newer where there is one, which has the newest JAX, and the kernel for
# packed documents.
ifeq ($(origin PYTHON),file)
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin/python3.
NEWER := $(PYTHON) $(foreach minor,12 13 14,python3.$(minor) $(wildcard $(PYENV)$(minor)))
PLAN_PYTHON := $(shell for python in $(NEWER); do \
	$$python -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null \
	&& echo $$python && exit; done; echo $(PYTHON))
else
PLAN_PYTHON := $(PYTHON)
endif
PLAN_VERSION := $(shell $(PLAN_PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
PLAN_INSTALLED := .venv-plan/installed-for-python-$(PLAN_VERSION)
# Of the plan's Python: where PYTHON is another one, test-plan has .venv-plan for that.
KERNELS := $(if $(filter $(VERSION),$(PLAN_VERSION)),.venv-plan,.venv-kernels)
KERNELS_INSTALLED := .venv-kernels/installed-for-python-$(PLAN_VERSION)
ARGS ?= --config configs/llama3_8b.yaml --gpus h100:1x8
# A peer that benchmarks/strategies.py times needs an older JAX.
PEER_INSTALLED := .venv-ringattention/installed-for-python-$(VERSION)

.PHONY: train test test-all check plan test-plan test-plan-here test-kernels test-kernels-here gpu-check strategies format constraints clean

train: $(INSTALLED)
	@echo "== training configs/tiny.yaml: 4 minutes on 2 cores"
	$(IN)python train.py --config configs/tiny.yaml

test: $(INSTALLED)
	@echo "== tests on 8 simulated CPU devices"
	$(IN)python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not plan"

test-all: $(INSTALLED)
	@echo "== all tests, the slow ones too"
	$(IN)python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not plan"

check: $(INSTALLED)
	@echo "== format, lint, types"
	$(IN)ruff format --check .
	$(IN)ruff check .
	$(IN)pyright

plan: $(PLAN_INSTALLED)
	@echo "== planning with Python $(PLAN_VERSION)"
	@.venv-plan/bin/python -m ulysses_jax.plan $(ARGS)

# On PYTHON itself, an older one than the plan's where there are two: in jax 0.12's CUDA
# plugin XLA ends with a segmentation fault in a few of these programs.
test-plan:
	@$(MAKE) --no-print-directory PYTHON=$(PYTHON) test-plan-here

test-plan-here: $(PLAN_INSTALLED)
	@echo "== tests that compile for GPUs that are not there"
	.venv-plan/bin/python -m pytest -n 2 -m plan

# tokamax, whose kernels these are, needs Python 3.12 and JAX 0.11.
test-kernels:
	@if $(PLAN_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 12))"; \
	then $(MAKE) --no-print-directory test-kernels-here; \
	else echo "== no Python 3.12 or newer here: the kernels for packed documents are not tested"; fi

test-kernels-here: $(KERNELS)/installed-for-python-$(PLAN_VERSION)
	@echo "== tests of the kernels for packed documents, with Python $(PLAN_VERSION)"
	$(KERNELS)/bin/python -m pytest -n 2 --dist loadfile tests/attention/test_mosaic_kernels.py tests/plan/test_gpu_kernels.py

# A machine with GPUs brings its own JAX, which knows its driver: that one is taken.
SEES_GPU = $(PYTHON) -c "import jax; jax.devices('gpu')" 2>/dev/null
gpu-check:
	@$(SEES_GPU) || $(MAKE) $(PLAN_INSTALLED)
	@if $(SEES_GPU); then python=$(PYTHON); else python=.venv-plan/bin/python; fi; \
	PYTHONPATH=. $$python -m ulysses_jax.check_gpu --json docs/measured.json --write-docs

strategies: $(INSTALLED) $(PEER_INSTALLED)
	@$(IN)python benchmarks/strategies.py

format: $(INSTALLED)
	$(IN)ruff check --fix .
	$(IN)ruff format .

# A change of Python, of the dependencies or of their pins makes an environment anew.
$(INSTALLED): pyproject.toml constraints.txt
	$(call make_environment,.venv,.[dev],about a minute,$(PYTHON))

$(PLAN_INSTALLED): pyproject.toml constraints.txt
	$(call make_environment,.venv-plan,.[dev$(comma)gpu],about two minutes and 4 GB,$(PLAN_PYTHON))

$(KERNELS_INSTALLED): pyproject.toml constraints.txt
	$(call make_environment,.venv-kernels,.[dev$(comma)gpu],about two minutes and 4 GB,$(PLAN_PYTHON))

$(PEER_INSTALLED): benchmarks/ringattention.txt
	@echo "== setting up .venv-ringattention with $$($(PYTHON) --version): a minute, once"
	@$(PYTHON) -m venv --clear .venv-ringattention
	.venv-ringattention/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

comma := ,
# A line a package, for those who wait; errors and warnings as pip writes them. What is
# imported is compiled then: pip would compile it all, which takes as long as the rest.
define make_environment
	@echo "== setting up $(1) with $$($(4) --version): $(3), once"
	@$(4) -c "import sys; sys.exit('Python 3.11 or newer is needed: PYTHON=python3.12 make ...' if sys.version_info < (3, 11) else 0)"
	@$(4) -m venv --clear $(1)
	@{ $(1)/bin/python -m pip install --no-compile --progress-bar off --disable-pip-version-check --constraint constraints.txt --editable '$(2)' \
	    || touch $(1)/failed; } \
	| while read -r word name rest; do case $$word-$$name in \
	    Collecting-*) echo "   $${name%%[!A-Za-z0-9._-]*}";; \
	    Installing-collected) echo "   all are here: unpacking them";; \
	  esac; done
	@test ! -e $(1)/failed
	@touch $@
endef

# The pins: what a fresh resolution gives today, for every supported Python.
constraints: $(INSTALLED)
	$(IN)python -m pip install --quiet uv
	$(IN)uv pip compile --universal --python-version 3.11 --all-extras --no-header --no-annotate pyproject.toml --output-file constraints.txt --upgrade

clean:
	rm -rf .venv .venv-plan .venv-kernels .venv-ringattention .jax_cache .pytest_cache .ruff_cache build dist
