# `make` lists the targets. In a fresh clone, every target first builds what it needs.

PYTHON ?= python3
# The environment: VENV is created if it does not exist; SYSTEM=1 uses that of PYTHON.
VENV ?= .venv
THREADS ?= 1

ifdef SYSTEM
PY := $(PYTHON)
ENV_DIR := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
ENV_ARGS := --system
else
PY := $(VENV)/bin/python
ENV_DIR := $(VENV)
ENV_ARGS := --venv "$(VENV)"
endif
# One stamp per checkout, so that a moved clone or a second one is installed again.
READY := $(ENV_DIR)/.batchformer-panoptic-$(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)
SOURCES := $(wildcard projects tests tools demo datasets benchmarks train_net.py setup.py)
PYTEST := OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest

DEMO_CONFIG := configs/quickstart/mask2former_shapes.yaml
DEMO_DATA := datasets/shapes_panoptic
DEMO_OUTPUT := output/quickstart

.PHONY: help env demo test slow gpu lint format types check clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10
	@echo
	@echo "variables: PYTHON=python3.11, VENV=/path/of/an/environment, SYSTEM=1, THREADS=1"

env: $(READY) ## build the environment (.venv), or complete the one of VENV=... or SYSTEM=1
	@:

$(READY): constraints.txt setup.cfg pyproject.toml tools/setup_env.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 7))' 2>/dev/null || { \
	  echo "error: no Python 3 under the name '$(PYTHON)': make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/setup_env.py $(ENV_ARGS) --stamp "$(READY)"

demo: $(READY) ## create data, train a small model for some minutes, evaluate PQ, draw predictions
	$(PY) datasets/prepare_shapes_panoptic.py --output $(DEMO_DATA) \
	  --num-train 4000 --num-val 200 --seed 0
	$(PY) train_net.py --config-file $(DEMO_CONFIG) --overwrite OUTPUT_DIR $(DEMO_OUTPUT)
	$(PY) tools/visualize_predictions.py --config-file $(DEMO_CONFIG) --num 12 \
	  --output $(DEMO_OUTPUT)/pictures --opts MODEL.WEIGHTS $(DEMO_OUTPUT)/model_final.pth

test: $(READY) ## the test suite
	$(PYTEST)

slow: $(READY) ## the tests marked slow
	@if grep -rqs 'mark\.slow' tests; then $(PYTEST) -m slow; else echo "no slow tests"; fi

gpu: $(READY) ## the tests that need a GPU; without one they are skipped
	$(PYTEST) -m gpu

lint: $(READY) ## style: ruff check, ruff format --check
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)

format: $(READY) ## fix style where ruff can do so automatically
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

types: $(READY) ## static types of the package
	$(PY) -m mypy

check: lint types test slow ## everything that CI runs

clean: ## delete caches and build products, but not the environment and outputs
	rm -rf build .pytest_cache .ruff_cache .mypy_cache projects/*.egg-info
	find projects tests tools demo datasets benchmarks -name __pycache__ -prune \
	  -exec rm -rf {} + 2>/dev/null || true
