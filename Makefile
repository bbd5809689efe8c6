# Everything here needs Python 3.11 or 3.12 with venv, and nothing else. Start with `make help`.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(RUN) -m pip --quiet --quiet --disable-pip-version-check install --constraint constraints.txt

# Two halves of the tests that take about as long as each other, most of it waiting for processes to start.
HALF := tests/cluster tests/registry/test_clean_environment.py tests/retraining tests/search tests/training

.PHONY: help install train test test-half test-other-half test-avx2 test-day test-all test-faults lint clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv with the pinned versions (done once; about two minutes)

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(RUN) || for python in $(PYTHON) python3.12 python3; do \
		"$$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
			&& "$$python" -m venv $(VENV) && break || true; \
	done
	@test -x $(RUN) || { echo "no Python 3.11 or 3.12 with venv found: install one, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) (about two minutes, once) ..."
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

train: install ## the demonstration: data, training, evaluation, registry, and a pull of the model that classifies
	@$(RUN) -m jobs.demo

test: install lint ## lint, types and the default tests; the numeric ones also without AVX-512, as on most laptops
	@$(MAKE) --jobs=4 test-half test-other-half test-avx2 test-day

test-half: install
	@$(RUN) -m pytest -q --durations=25 --durations-min=3 $(HALF)

test-other-half: install
	@$(RUN) -m pytest -q --durations=25 --durations-min=3 tests $(HALF:%=--ignore=%)

test-avx2: install
	@ONEDNN_MAX_CPU_ISA=AVX2 $(RUN) -m pytest -q tests/methods tests/functional tests/nets

test-day: install
	@test "$$(getconf _NPROCESSORS_ONLN)" -ge 4 || { echo "A day in five minutes wants four cores: make test-faults has it"; exit 0; }; \
		$(RUN) -m pytest -q -m faults tests/cluster/test_day.py

test-all: install lint ## the same with the slow tests, but those of test-faults
	@$(RUN) -m pytest -q -m "not faults"

test-faults: install ## what is done to a training on several nodes, and to a busy day: a table (three quarters of an hour)
	@$(RUN) -m tests.cluster.faults

lint: install ## ruff, mypy and what may import what
	@$(VENV)/bin/ruff check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports

clean: ## remove caches and builds; datasets, runs, models and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
