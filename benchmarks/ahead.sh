#!/usr/bin/env bash
# For a GPU machine whose quarter of an hour is short: the kernels that the tests launch, compiled here for sm_90, into
# .carry/kernels.tar.xz (about 10 MiB), which benchmarks/gpu.sh unpacks. Needs the tests' environment (make .venv/.test), a C
# compiler, Python 3.12 with its headers (PYTHON312) and 2 GB of packages for it; about 25 minutes on two cores.
# Do it last: a kernel's key holds its source and its line.
#   benchmarks/ahead.sh [TESTS]    default: tests/head tests/objective tests/loss
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p .carry "$work/records" "$work/cuda"
"$python" -c 'import pytest, xdist, torch' # before anything takes minutes
"${PYTHON312:-python3.12}" -m venv "$work/venv"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$work/cuda/libcuda.so.1" tests/launch/libcuda.c
export OMP_NUM_THREADS=1

# Failures do not matter: what a test launches is recorded before it ends.
RECORD="$work/records" PYTHONPATH=tests/support:tests/launch "$python" -m pytest -q -n 2 --dist worksteal -m 'not slow' \
  -p cuda_device.plugin -p record -p no:cacheprovider \
  -k 'not (compiles or compiled or operators or cuda_graphs or distributed or mutants or fuzz or offsets or more_tokens)' \
  ${@:-tests/head tests/objective tests/loss} >"$work/log" 2>&1 || true
tail -1 "$work/log"

pin() { grep -m 1 "^$1==" constraints.txt; }
"$work/venv/bin/pip" install --quiet --no-compile torch==2.11.0 "$(pin triton)" numpy
export TRITON_CACHE_DIR=/tmp/lad_kernels_compiled LD_LIBRARY_PATH="$work/cuda" TRITON_LIBCUDA_PATH="$work/cuda"
rm -rf "$TRITON_CACHE_DIR"
PYTHONPATH=. "$work/venv/bin/python" tests/launch/ahead.py "$work/records" || [ $? -eq 1 ]
tar cf - -C "$TRITON_CACHE_DIR" . | xz -T0 >.carry/kernels.tar.xz
du -h .carry/kernels.tar.xz
