# make demo | test | lint | bench | campaign    The first call of any of them makes .venv (a few minutes).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-fast lint bench campaign clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/flatcensus demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not ray"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks

campaign: $(VENV)/.installed
	$(BIN)/python -m tests.campaigns --faults 500 --flips 10000

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo
