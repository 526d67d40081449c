# Every target sets up what it needs in .venv first. `make` alone lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:

# One thread each: figures and timings do not depend on how many cores the machine has.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export NUMEXPR_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

BIN := .venv/bin

.PHONY: help demo test test-all check format protos protos-baseline constraints map bench clean base engines full peers

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 20

base:
	@scripts/setup.sh base

engines:
	@scripts/setup.sh engines

full:
	@scripts/setup.sh full

peers:
	@scripts/setup.sh bench

demo: engines ## fetch a small real model once, compare torch with jax on it, end by itself
	@echo "demo: fetching the model (once), then comparing PyTorch with JAX on a short text"
	@$(BIN)/dualtrace model fetch smollm2
	@$(BIN)/dualtrace demo

test: full ## run the tests, all but the slow ones
	@echo "test: everything but the slow tests, one thread"
	@$(BIN)/python -m pytest -m "not slow"

test-all: full ## run every test
	@echo "test-all: everything, one thread"
	@$(BIN)/python -m pytest

check: full ## format, lint, types, imports, protos, generated code, documents, sizes
	@$(BIN)/python scripts/check.py

format: full ## put the code into its one format, mend what the linter can mend
	@echo "format: ruff"
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

protos: full ## generate dualtrace/v1 from protos/
	@$(BIN)/python scripts/generate_protos.py

protos-baseline: full ## make the protos as they are what `buf breaking` compares with
	@echo "protos-baseline: writing protos/baseline.binpb; commit it and say why"
	@$(BIN)/buf build protos --exclude-source-info -o protos/baseline.binpb

map: base ## refresh the map in README.md
	@$(BIN)/python scripts/readme_map.py

constraints: full ## pin the newest versions that install together
	@scripts/pin.sh

bench: peers ## run the benchmarks and print one table; about half an hour
	@echo "bench: fetching the real model (once), then running benchmarks/"
	@$(BIN)/dualtrace model fetch smollm2
	@$(BIN)/python -m benchmarks

clean: ## remove what these targets made here, .venv included; fetched models stay
	@echo "clean: removing .venv, build folders and caches"
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache out
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
