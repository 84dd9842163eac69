PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
DATA ?= simulated

.PHONY: demo test lint types docs dist clean

demo: $(BIN)/.ready
	$(BIN)/python tutorials/demo.py --data $(DATA) --out demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: types
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(BIN)/.ready
	$(BIN)/mypy

docs: $(BIN)/.ready
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

dist: $(BIN)/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# torch is pinned in the constraints, so that no other package pulls another build of it
$(BIN)/.ready: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[test,docs,dev]"
	touch $@

clean:
	rm -rf .venv demo dist docs/_build
