# The whole interface of the project: `make` lists what there is.
# Needs Python 3.11 or newer (make PYTHON=... picks one), nothing else; everything is made in .venv.
# Linux: pip takes torch's CPU build where an extra index or a folder of wheels offers one
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), and the CUDA build, gigabytes, elsewhere.

SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# Twice quiet: only errors are printed. --use-pep517: Debian 12's pip cannot build seqeval the old way.
PIP := $(BIN)/python -m pip install -qq --use-pep517 --disable-pip-version-check -c constraints.txt
TESTS ?=
WORKERS ?= 2
# Tiers: `make test` (minutes), `.ci/run` (adds samples of the slow tests), `make test-all` (everything).
TIER ?= not slow and not thorough
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all chaos soak mutations check lint format types contracts docs numbers compose-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/made.stamp: .ci/environment
	@.ci/environment
	@touch $@

# What a run needs; the development environment below holds it too.
.venv/run.stamp: .venv/made.stamp pyproject.toml constraints.txt
	@echo "installing LoRAbbit with torch and transformers (one to three minutes)" >&2
	@$(PIP) -e '.[server,client,cli,bench,demo]'
	@touch $@

.venv/dev.stamp: .venv/made.stamp pyproject.toml constraints.txt
	@echo "installing LoRAbbit with its development tools (one to three minutes)" >&2
	@$(PIP) -e '.[all,dev]'
	@touch .venv/run.stamp $@

demo: .venv/run.stamp ## fine-tune a small model on real text with six clients in one process
	$(BIN)/lorabbit run examples/quickstart.yaml

test: .venv/dev.stamp ## the fast tests, with a real RabbitMQ and Redis (TESTS="-k name" narrows, WORKERS=0 runs them in one process)
	@.ci/services
	$(PYTEST) -m "$(TIER)" $(TESTS)

test-all: .venv/dev.stamp ## all tests, for hours: slow ones, the failure matrix, containers, mutations; the result is stored
	@.ci/services
	$(BIN)/python tools/test_all.py

chaos: .venv/dev.stamp ## play the failure matrix: kill, cut, freeze, fill up, and compare (ROWS="NAME ..." narrows)
	@.ci/services
	PYTHONPATH=tests $(BIN)/python -m chaos $(if $(ROWS),--only $(ROWS))

soak: .venv/dev.stamp ## kill something every few seconds for an hour, and compare (MINUTES=60 SEED=1)
	@.ci/services
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),60) --seed $(or $(SEED),1)

mutations: .venv/dev.stamp ## change a sample of lines and check that a test fails for each (SAMPLE=240 SEED=1 ARGS=--record)
	@.ci/services
	PYTHONPATH=tests $(BIN)/python -m mutations $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) --workers $(WORKERS) $(ARGS)

check: lint types contracts test ## everything a change must pass: lint, types, import contracts, tests

lint: .venv/dev.stamp ## look for lint and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if command -v shellcheck >/dev/null; then shellcheck .ci/*; fi

format: .venv/dev.stamp ## put the code into its format and mend what can be mended
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

types: .venv/dev.stamp ## check the types, strictly
	$(BIN)/mypy

contracts: .venv/dev.stamp ## check who may import whom
	$(BIN)/lint-imports --no-cache

docs: .venv/dev.stamp ## write the reference pages that are generated from the code, and the chart's README
	$(BIN)/python tools/reference_pages.py docs/reference
	$(BIN)/python helm/readme.py helm/lorabbit

numbers: .venv/dev.stamp ## measure everything again that README and docs report, for hours (ONLY="NAME ..." narrows)
	@.ci/services
	$(BIN)/python benchmarks/measure_all.py $(if $(ONLY),--only $(ONLY))

compose-test: .venv/dev.stamp ## build the images and run the quickstart under compose
	$(BIN)/pytest -m containers $(TESTS)

clean: ## remove the environment and everything that was built
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
