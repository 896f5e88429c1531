# Every target that needs the environment makes it first; `make` alone says what there is.
.DEFAULT_GOAL := help
.PHONY: help setup lint test test-fast demo lock clean

# Written by setup: .venv/bin first on the PATH, and a JAVA_HOME of Java 17.
env = . .venv/env.sh &&

help:  ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup:  ## make .venv: locked packages, Horovod, cvdist; does nothing when nothing changed
	@requirements/setup.sh

lint: setup  ## format and rules (ruff), types (mypy); changes nothing
	@$(env) ruff format --check --quiet . || { echo 'lint: the files above are not formatted; fix: .venv/bin/ruff format'; exit 1; }
	@$(env) ruff check --quiet .
	@$(env) mypy

test: lint  ## lint, then all test groups: unit, contract, integration, distributed, faults
	@$(env) python -m pytest

test-fast: setup  ## the groups that need no service: unit, contract
	@$(env) python -m pytest tests/unit tests/contract

demo: setup  ## prepare, train on 2 ranks and evaluate Fashion-MNIST; or IMAGES=DIR, a directory with one folder per class
	@$(env) python cluster/demo.py $(if $(IMAGES),--images "$(IMAGES)")

lock: setup  ## choose all versions and hashes again, from setup.cfg and requirements/*.in
	@requirements/lock.sh

clean:  ## remove .venv and everything that tools left here; Horovod's wheel stays in the user's cache
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist cvdist.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
