# `make demo` and `make test` need Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types tests clean

demo: $(INSTALLED)
	$(BIN)/secateur demo --out runs/demo --force

test: lint types tests

lint: $(INSTALLED)
	@echo "== ruff"
	@$(BIN)/ruff check

types: $(INSTALLED)
	@echo "== mypy"
	@$(BIN)/mypy

tests: $(INSTALLED)
	@echo "== pytest and doctests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --doctest-modules src tests

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "secateur needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@echo "== setting up .venv (once; torch is a large download)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
