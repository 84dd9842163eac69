PYTHON ?= python3
BIN := .venv/bin
DATA ?= simulated

.PHONY: demo test lint docs clean

demo: $(BIN)/.ready
	$(BIN)/python tutorials/demo.py --data $(DATA) --out demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(BIN)/.ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

docs: $(BIN)/.ready
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

# torch is pinned in constraints.txt, so that no other package pulls another build of it
$(BIN)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,docs,dev]"
	touch $@

clean:
	rm -rf .venv demo docs/_build
