# Every target builds its environment from pyproject.toml first, and again when that file changes.
#   make demo | test | test-long | lint | bench | artifact | conformance POLICY=path.py:Name       PYTHON=python3.12: a second environment, with jax==0.11.2
PYTHON ?= python3
WHICH := -c 'import sys; print(sys.executable)'
# A Python that pyenv has but has not activated is found too.
PY := $(shell $(PYTHON) $(WHICH) 2>/dev/null || PYENV_VERSION=$$(pyenv latest $(subst python,,$(PYTHON))) $(PYTHON) $(WHICH))
VERSION := $(shell $(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
JAX := $(if $(filter-out 3.11,$(VERSION)),jax==0.11.2 jaxlib==0.11.2)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long conformance lint format bench artifact ready which clean

demo: $(READY)
	$(BIN)/python -m experiments.demo

test: $(READY)
	$(BIN)/python -m pytest -m "not long" $(TESTS)

test-long: $(READY)
	$(BIN)/python -m pytest -m long $(TESTS)

conformance: $(READY)
	$(BIN)/python -m pytest tests/conformance/test_schedules.py tests/conformance/test_tokens.py --policy=$(POLICY)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m experiments.bench_engine

artifact: $(READY)
	$(BIN)/python -m experiments.artifact --overwrite

ready: $(READY)

which:
	@echo $(PY)

$(READY): pyproject.toml
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' $(JAX)
	touch $@

clean:
	rm -rf .venv* build *.egg-info results
