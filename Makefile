# SPDX-License-Identifier: Apache-2.0
# On a fresh machine: `make demo` trains a small model, `make test` runs the tests. Both set up .venv themselves.

PYTHON ?= python3
# Another build: make TORCH='torch==2.7.1 --index-url ...' setup
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# The line that MindSpeed supports commercially, laid over the environment: no second torch.
OLD_MEGATRON := $(VENV)/megatron-core-0.12.1
ON_OLD_MEGATRON := tests/unit/test_host_versions.py tests/unit/test_ternary_linears.py tests/unit/test_recipe.py \
	tests/unit/test_record.py tests/unit/test_telemetry.py tests/distributed/test_gradients.py

.PHONY: setup demo test test-mcore-0.12 test-kill lint format clean

setup: $(READY)

# torch first: a loose requirement of another package would choose its build.
$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[standalone,hf,plot,test]'
	touch $@

demo: $(READY)
	$(PY) launch/demo.py

test: $(READY)
	$(PY) -m pytest

$(OLD_MEGATRON)/.ready: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(OLD_MEGATRON) megatron-core==0.12.1
	touch $@

test-mcore-0.12: $(OLD_MEGATRON)/.ready
	PYTHONPATH=$(CURDIR)/$(OLD_MEGATRON) $(PY) -m pytest $(ON_OLD_MEGATRON)

# Kills a training run 30 times at random moments; bounded in time, prints its seed. KILL='--kills 100 --seed 7'
test-kill: $(READY)
	$(PY) tests/kill_campaign.py $(KILL)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
