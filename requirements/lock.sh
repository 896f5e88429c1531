#!/usr/bin/env bash
# Writes requirements/*.txt from requirements/*.in and the extras of setup.cfg (or: make lock). Takes 8 minutes.
# Only the index that pip is told of by default is asked: no local wheels and no second index, whose files could carry the
# same names and other contents.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUSTOM_COMPILE_COMMAND="make lock" PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL=

compile() {
  .venv/bin/python -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-build-isolation \
    --no-emit-options "$@"
}
compile requirements/build.in --output-file requirements/build.txt
compile requirements/java.in --output-file requirements/java.txt
compile requirements/full.in setup.cfg --extra spark,petastorm,train,report,dev --constraint requirements/build.txt \
  --output-file requirements/full.txt
compile requirements/modern.in setup.cfg --extra spark,train,report,dev --constraint requirements/build.txt \
  --output-file requirements/modern.txt
grep -H -c -- '==' requirements/build.txt requirements/java.txt requirements/full.txt requirements/modern.txt
