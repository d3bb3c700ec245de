# Two commands matter: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS := $(if $(wildcard /proc/driver/nvidia/version),constraints-cuda.txt,constraints-cpu.txt)
BIN := $(VENV)/bin
EXTRAS_train := train
EXTRAS_test := test,train
EXTRAS_bench := bench

.PHONY: demo test lint bench clean

demo: $(VENV)/.train
	$(BIN)/python -m integration.demo $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

# One stamp per set of extras: installing again costs nothing until setup.py or the pins change.
$(VENV)/.%: setup.py constraints-cpu.txt constraints-cuda.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS_$*)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
