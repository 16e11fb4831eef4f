# One command each. Every target but `clean` first makes sure that .venv is complete.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.complete
# Two processes with one thread each are faster and steadier on two cores than one process with two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
DEMO_OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format docs bench-closed-form bench-finetune results-score browser clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP) ## create .venv with every version pinned

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("expunge needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $(STAMP)

demo: setup ## erase one concept three ways from the embedded model, then print the report's path
	$(BIN)/expunge demo --out $(DEMO_OUT)

test: setup browser ## the fast tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m 'not slow'

test-full: setup browser ## every test, the slow ones as well
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m 'slow or not slow'

lint: setup ## ruff, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench-closed-form: setup ## closed-form engine against what the official scripts compute, ten minutes on one core
	$(ONE_THREAD) $(BIN)/python -m benchmarks.closed_form

results-score: setup ## SCORE and its rivals on every suite and model; days on two cores, continues where it was killed
	$(ONE_THREAD) $(BIN)/python -m benchmarks.results_score

bench-finetune: setup ## a fine-tuning step against its unavoidable passes and against the official manner, ten minutes of one core
	$(ONE_THREAD) $(BIN)/python -m benchmarks.finetune

# The page tests look at report.html in a real browser. Only Debian as root can be helped here; elsewhere they say what is missing.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	else echo 'no chromium found: the page tests will be skipped' >&2; fi

clean: ## remove caches and built pages; runs/ and .venv stay
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
