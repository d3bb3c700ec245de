#!/usr/bin/env bash
# The experiments of benchmarks/gpu/ on this machine's own Python, offline: no network, nothing installed for good.
# Results go to $OUT, or to benchmarks/results/<name of the GPU>. Peers are taken from the wheels that
# benchmarks/carry.sh put into .carry/peers, or from a folder of installed packages named by SITE; states of a policy
# from the folder after --states, or from .carry/states. Kernels that benchmarks/ahead.sh compiled come from .carry too.
#   benchmarks/gpu.sh              parts A and B: at most 560 s on one CUDA device
#   benchmarks/gpu.sh A            one part
#   benchmarks/gpu.sh --dry-run    the same code on tiny shapes in Triton's interpreter, without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${SITE:-}" ] && compgen -G ".carry/peers/*.whl" >/dev/null; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" .carry/peers/*.whl
fi
if [ -e .carry/kernels.tar.xz ]; then # compiled by benchmarks/ahead.sh, found under the same path only
  export TRITON_CACHE_DIR=/tmp/lad_kernels_compiled
  if [ ! -d "$TRITON_CACHE_DIR" ]; then # whole, or not at all
    unpacked=$(mktemp -d -p /tmp)
    "$python" -m tarfile -e .carry/kernels.tar.xz "$unpacked" && mv "$unpacked" "$TRITON_CACHE_DIR"
  fi
fi
if [ -z "${LAD_KERNELS_COMMIT:-}" ] && [ -e .carry/commit ]; then
  LAD_KERNELS_COMMIT=$(cat .carry/commit)
  export LAD_KERNELS_COMMIT
fi
export PYTHONPATH="$PWD${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -m benchmarks.gpu.session "$@"
