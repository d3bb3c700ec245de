#!/usr/bin/env bash
# The experiments of benchmarks/gpu.py on this machine's own Python, offline: no installation, no network.
# Results go to $OUT, or to benchmarks/results/<name of the GPU>. Peers: put a folder of installed wheels into SITE.
#   benchmarks/gpu.sh             about nine minutes on one CUDA device
#   benchmarks/gpu.sh --dry-run   the same code on tiny shapes in Triton's interpreter, without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
