# Every target that needs the environment makes it first; `make` alone says what there is.
.DEFAULT_GOAL := help
.PHONY: help setup setup-modern lint test test-fast test-modern bench-loader demo lock clean

# Written by setup: .venv/bin first on the PATH, and a JAVA_HOME of Java 17.
env = . .venv/env.sh &&
modern_env = . .venv-modern/env.sh &&
# What depends on the versions of packages: all unit tests but those of scripts, listings and processes, every layout through
# spark-submit, ranks, and each environment on what the other has written.
modern_tests = $(filter-out $(patsubst %,tests/unit/test_%.py,cli listing lock sandbox setup sources_tables sources_tars),\
	$(wildcard tests/unit/test_*.py)) tests/integration/test_layouts.py tests/integration/test_two_environments.py \
	tests/distributed/test_end_to_end.py

help:  ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup:  ## make .venv: locked packages, Horovod, cvdist; does nothing when nothing changed
	@requirements/setup.sh

setup-modern:  ## make .venv-modern: newest pyarrow, NumPy 2, Spark 4, no Petastorm; needs a Java 17
	@requirements/setup.sh modern

lint: setup  ## format and rules (ruff), types (mypy); changes nothing
	@$(env) ruff format --check --quiet . || { echo 'lint: the files above are not formatted; fix: .venv/bin/ruff format'; exit 1; }
	@$(env) ruff check --quiet .
	@$(env) mypy

test: lint  ## lint, then all test groups: unit, contract, integration, distributed, faults
	@$(env) python -m pytest

test-fast: setup  ## the groups that need no service: unit, contract
	@$(env) python -m pytest tests/unit tests/contract

test-modern: setup setup-modern  ## prepare under Spark 4, loader and ranks in .venv-modern
	@$(modern_env) python -m pytest $(modern_tests)

bench-loader: setup  ## the loader beside its peers, half an hour; or ARGS="--peers light --rounds 2" and others, see tests/bench/loader.py
	@$(env) python tests/bench/loader.py $(ARGS)

demo: setup  ## prepare, train on 2 ranks and evaluate Fashion-MNIST; or IMAGES=DIR, a directory with one folder per class
	@$(env) python cluster/demo.py $(if $(IMAGES),--images "$(IMAGES)")

lock: setup  ## choose all versions and hashes again, from setup.cfg and requirements/*.in
	@requirements/lock.sh

clean:  ## remove .venv, .venv-modern and everything that tools left here; Horovod's wheel stays in the user's cache
	rm -rf .venv .venv-modern .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist cvdist.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
