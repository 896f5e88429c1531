# cvdist on CPUs: the environment of `make setup`, in an image.
#
#   docker build -t cvdist .
#   docker run --rm cvdist cvdist --help
#   docker run --rm -v "$PWD/photos:/data:ro" -v "$PWD/out:/out" cvdist \
#       spark-submit jobs/prepare.py file:///data file:///out/shards
#   docker run --rm --shm-size=1g -v "$PWD/out:/out" cvdist \
#       horovodrun -np 2 python -m cvdist.train --data file:///out/shards --model mnist_convnet --epochs 1 \
#       --global_batch 64 --run file:///out/run
#
# The image has no entry point: what follows its name is the command, run in the checkout with .venv/bin on the PATH. It runs
# as the user `cvdist` (uid 1000), so /out must be writable for that uid.
#
# GPUs: this image uses none. A GPU image would need an NVIDIA CUDA base image, `tensorflow[and-cuda]`, and Horovod built with
# HOROVOD_GPU_OPERATIONS=NCCL. That build has not been tried; Horovod 0.28.1 includes a TensorFlow header
# (tensorflow/compiler/xla/stream_executor/stream.h) that has moved, so expect to patch more than requirements/horovod.sh does.
FROM debian:12-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3.11 python3.11-venv g++ make openjdk-17-jre-headless procps ca-certificates \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 cvdist
USER cvdist
WORKDIR /home/cvdist/cvdist

# Only what the set-up is made from, so that a change of the code does not build Horovod again.
COPY --chown=cvdist Makefile setup.cfg setup.py pyproject.toml ./
COPY --chown=cvdist requirements requirements
COPY --chown=cvdist cvdist/__init__.py cvdist/_tiles.c cvdist/
RUN PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/tmp/cache make setup && rm -rf /tmp/cache

COPY --chown=cvdist . .
ENV PATH=/home/cvdist/cvdist/.venv/bin:$PATH
CMD ["cvdist", "--help"]
