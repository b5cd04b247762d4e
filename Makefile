# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow lint check docs bench clean
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## a study on real images: one table, and a report as one page
	OMP_NUM_THREADS=1 $(BIN)/kdkit compare recipes/digits/knowledge.yaml --processes 2 --spread
	OMP_NUM_THREADS=1 $(BIN)/kdkit report runs/digits_knowledge

test: $(VENV)/installed  ## the default test suite
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## all that must hold before a change goes in

docs: $(VENV)/installed  ## write what is generated: the schemas and the reference pages; make the site from it all
	$(BIN)/kdkit schema > recipes/recipe.schema.json
	$(BIN)/kdkit schema --study > recipes/study.schema.json
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed  ## kdkit against plain torch: a step, an epoch, the loader, the teacher, each loss and balance; studies and caches against runs without; what a typo costs
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/balances.py
	$(BIN)/python benchmarks/teacher.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/epoch.py
	$(BIN)/python benchmarks/segmentation.py
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/served.py
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
