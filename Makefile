# make demo and make test do everything on a fresh machine, the environment in .venv included.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test faults algorithms performance lint format types

help:  ## Show these targets
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

demo: $(STAMP)  ## Train SmolLM2 from human ratings, end to end; about 15 minutes on two cores
	@$(BIN)/python -m examples.movie_reviews.demo

test: $(STAMP)  ## Run the tests that need neither a GPU nor patience
	@$(BIN)/python -m pytest -q $(TESTS)

faults: $(STAMP)  ## Kill, freeze and starve the processes of real runs, and simulate thousands more; about 20 minutes
	@$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_cluster_faults.py tests/test_cluster_ranks.py tests/test_cluster_run.py
	@$(BIN)/python -m benchmarks.simulate --schedules 2000 --jobs 2
	@$(BIN)/python -m benchmarks.simulate --planted --schedules 200

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
