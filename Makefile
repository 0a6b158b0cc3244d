# make demo: install, then take a small model through all of post-training on this machine's CPU. make test: install, then run every quick test.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PYTEST  = $(BIN)/pytest --numprocesses 2 --dist loadgroup
INSTALLED = $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test test-long lint bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt tests/plugin/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[develop]'
	$(BIN)/pip install --quiet --no-deps --editable tests/plugin
	touch $@

demo: install
	env -u OMP_NUM_THREADS $(BIN)/postlude run examples/demo.yaml
	$(BIN)/postlude generate build/runs/demo/rl --prompt "4711>" --max-tokens 6

test: install
	$(PYTEST) --durations 15 -m "not long and not gpu"

test-long: install
	$(PYTEST) --durations 25 -m "long and not gpu"

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for script in head packing data startup training dpo distillation engine grpo; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf build $(VENV)
