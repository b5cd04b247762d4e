# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RECIPES = $(addprefix recipes/digits/,alone.yaml response.yaml feature.yaml relation.yaml)

.PHONY: demo test test-slow lint check docs bench clean
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## distil on real images and print one table
	$(BIN)/kdkit compare $(RECIPES) --seeds 3

test: $(VENV)/installed  ## the default test suite
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## all that must hold before a change goes in

docs: $(VENV)/installed  ## write what is generated: the schemas and the reference pages
	$(BIN)/kdkit schema > recipes/recipe.schema.json
	$(BIN)/kdkit schema --study > recipes/study.schema.json
	$(BIN)/python docs/generate.py

bench: $(VENV)/installed  ## a step of kdkit against the same step in plain torch, and each loss against its naive form
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/losses.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
