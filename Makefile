# make train   sets up .venv and trains configs/tiny.yaml
# make test    sets up .venv and runs the tests (make test-all: the slow ones too)
# make check   format, lint, types
# PYTHON=python3.12 make test   uses another Python

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
INSTALLED := .venv/installed-for-python-$(VERSION)
IN := .venv/bin/

.PHONY: train test test-all check format constraints clean

train: $(INSTALLED)
	@echo "== training configs/tiny.yaml: a few minutes on 2 cores"
	$(IN)python train.py --config configs/tiny.yaml

test: $(INSTALLED)
	@echo "== tests on 8 simulated CPU devices"
	$(IN)python -m pytest -n 2 --dist loadfile -m "not slow and not plan"

test-all: $(INSTALLED)
	@echo "== all tests, the slow ones too"
	$(IN)python -m pytest -n 2 --dist loadfile -m "not plan"

check: $(INSTALLED)
	@echo "== format, lint, types"
	$(IN)ruff format --check .
	$(IN)ruff check .
	$(IN)pyright

format: $(INSTALLED)
	$(IN)ruff check --fix .
	$(IN)ruff format .

# A change of Python, of the dependencies or of their pins makes the environment anew.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "== setting up .venv with $$($(PYTHON) --version): about a minute, once"
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: PYTHON=python3.12 make ...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv --clear .venv
	$(IN)python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The pins: what a fresh resolution gives today, for every supported Python.
constraints: $(INSTALLED)
	$(IN)python -m pip install --quiet uv
	$(IN)uv pip compile --universal --python-version 3.11 --all-extras --no-header --no-annotate pyproject.toml --output-file constraints.txt --upgrade

clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache build dist
