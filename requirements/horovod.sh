#!/usr/bin/env bash
# Builds a Horovod wheel for the TensorFlow installed in a virtual environment.
#
#   requirements/horovod.sh VENV OUT_DIR
#
# Horovod 0.28.1 does not build against TensorFlow 2.21 as released: xla_mpi_ops.cc includes a highwayhash header that
# TensorFlow's wheel no longer ships. That file only serves collectives inside XLA-compiled functions, which cvdist does not
# use, so it is left out. No MPI: the ranks meet over Gloo. This is the CPU build; the GPU one (NCCL) has not been tried.
set -euo pipefail
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "$1" && pwd)
out=$2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Settings of the caller must not reach the build: half of Horovod's switches are environment variables, and a MAKEFLAGS
# inherited from `make setup` names that make's job server.
for name in "${!HOROVOD_@}" MAKELEVEL MFLAGS MAKEOVERRIDES; do unset "$name"; done
jobs=$(nproc)
export MAKEFLAGS="-j$((jobs > 8 ? 8 : jobs))" # a compiler takes 1 to 2 GB
export PATH="$venv/bin:$PATH"                 # the locked CMake; the system's may be 4, which refuses the bundled gloo
export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS=GLOO

"$venv/bin/python" -m pip download --no-deps --no-binary horovod --no-build-isolation --require-hashes \
  --dest "$work" --requirement "$requirements/horovod.txt"
tar -xzf "$work"/horovod-*.tar.gz -C "$work"
sources=$(echo "$work"/horovod-*/)
lists=$sources/horovod/tensorflow/CMakeLists.txt
grep -q xla_mpi_ops.cc "$lists" || { echo "xla_mpi_ops.cc is not in $lists: the patch no longer fits"; exit 1; }
sed -i '/xla_mpi_ops\.cc/d' "$lists"

"$venv/bin/python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$out" "$sources"
