"""Launches, bytes and host syncs of one call with a mask, by path: `python -m benchmarks.harness.calls` prints JSON.

The step of tests/device/test_counts.py on the CUDA device that is not there (tests/support/cuda_device): forward and
backward, off-policy, all tokens in one chunk or slab. An operation of PyTorch counts as one launch; a sort or a search
for nonzeros is a few. Bytes are those that kernels load and store, mostly from L2, and those of the tensors that
operations are given and make; over those of hidden states, weight and their gradients. N = 150, D = 64, V = 600:
vectors of N numbers weigh more than in real calls.
"""

from __future__ import annotations

import json
import os
import sys


def count() -> dict[str, dict[str, float]]:
    """{"launches", "bytes" or "syncs": {path: number}}."""
    import cuda_device

    log = cuda_device.install()
    import test_counts

    from lad_kernels.head import dispatch

    found: dict[str, dict[str, float]] = {"launches": {}, "bytes": {}, "syncs": {}}
    operands = 2 * 2 * test_counts.D * (test_counts.N + test_counts.V)  # and gradients, in bfloat16
    for path in dispatch.PATHS:
        test_counts.step(path, on_policy=False)
        found["launches"][path] = sum(log.operations.values()) + sum(log.launches.values())
        found["bytes"][path] = round(log.moved / operands, 2)
        found["syncs"][path] = sum(log.syncs.values())
    return found


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = ["tests/support", "tests/device"]
    import interpreter

    interpreter.install()
    print(json.dumps(count()))
