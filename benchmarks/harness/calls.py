"""Launches and host syncs of one call with a mask, by path: `python -m benchmarks.harness.calls` prints them as JSON.

On the CUDA device that is not there (tests/support/cuda_device), forward and backward, off-policy, all tokens in one
chunk or slab. An operation of PyTorch counts as one launch; a sort or a search for nonzeros is a few.
"""

from __future__ import annotations

import json
import os
import sys

TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 150, 64, 600


def count() -> dict[str, dict[str, int]]:
    """{"launches" or "syncs": {path: number}}."""
    import cuda_device

    log = cuda_device.install()

    import torch

    from lad_kernels import LADConfig, linear_lad_loss
    from lad_kernels.head import dispatch
    from lad_kernels.testing import make_inputs

    x = make_inputs(TOKENS, HIDDEN_SIZE, VOCAB_SIZE, dtype=torch.bfloat16, entropy=0.5, masked=0.0)
    hidden, weight = (leaf.detach().cuda().requires_grad_() for leaf in (x.hidden, x.weight))  # [N, D], [V, D]
    old = torch.full((TOKENS,), -1.0, device="cuda")  # [N]
    number = torch.arange(TOKENS, device="cuda")  # [N]
    mask, advantages = number % 5 != 0, number % 3 - 1.0  # [N], [N]
    found: dict[str, dict[str, int]] = {"launches": {}, "syncs": {}}
    for path in dispatch.PATHS:
        log.clear()
        with dispatch.force(path):
            given = (hidden, weight, x.targets.cuda(), old)
            out = linear_lad_loss(*given, advantages=advantages, loss_mask=mask, config=LADConfig(tail_mass=1e-3))
        torch.autograd.grad(out.loss, (hidden, weight))
        found["launches"][path] = sum(log.operations.values()) + sum(log.launches.values())
        found["syncs"][path] = sum(log.syncs.values())
    return found


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = ["tests/support"]
    import interpreter

    interpreter.install()
    print(json.dumps(count()))
