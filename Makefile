# SPDX-License-Identifier: Apache-2.0
# On a fresh machine: `make demo` trains a small model, `make test` runs the tests. Both set up .venv themselves.

PYTHON ?= python3
# Another build: make TORCH='torch==2.7.1 --index-url ...' setup
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo test lint format clean

setup: $(READY)

# torch first: a loose requirement of another package would choose its build.
$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[standalone,plot,test]'
	touch $@

demo: $(READY)
	$(PY) launch/demo.py

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
