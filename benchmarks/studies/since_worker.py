"""Calls of whichever `lad_kernels` is imported, on a CPU thread: `since.py` starts one for each of two checkouts.

Each line of standard input names a file of tensors, a job and a tail mass; the answer is JSON: seconds of this thread
and norms of the two gradients, or null where this version lacks the function.
"""

from __future__ import annotations

import json
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

import lad_kernels


@lru_cache(maxsize=1)
def load(path: str) -> dict[str, torch.Tensor]:
    """hidden [B, T, D], weight [V, D], targets [B, T], old_logprobs [B, T], advantages [B], upstream [B, T]."""
    return {name: x.clone() for name, x in torch.load(path, mmap=True).items()}


def loss(batch: dict[str, torch.Tensor], job: str, tail_mass: float) -> torch.Tensor:  # []
    operands = batch["hidden"], batch["weight"], batch["targets"]
    if job == "head":
        return (lad_kernels.linear_logprobs(*operands).logprobs * batch["upstream"]).sum()
    if job == "ce":
        return lad_kernels.linear_cross_entropy(*operands, tail_mass=tail_mass)
    config = {"lad": lad_kernels.LADConfig, "grpo": lad_kernels.GRPOConfig}[job](tail_mass=tail_mass)
    function = {"lad": lad_kernels.linear_lad_loss, "grpo": lad_kernels.linear_grpo_loss}[job]
    return function(*operands, batch["old_logprobs"], advantages=batch["advantages"], config=config).loss


def call(path: str, job: str, tail_mass: str) -> tuple[float, float, float] | None:
    if job == "ce" and not hasattr(lad_kernels, "linear_cross_entropy"):
        return None
    batch = load(path)
    leaves = [batch[name].requires_grad_() for name in ("hidden", "weight")]
    for x in leaves:
        x.grad = None
    start = time.thread_time()
    loss(batch, job, float(tail_mass)).backward()
    seconds = time.thread_time() - start
    return seconds, *(x.grad.norm().item() for x in leaves)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    expected = Path(sys.argv[1]).resolve()
    if not Path(lad_kernels.__file__).is_relative_to(expected):
        sys.exit(f"since_worker: expected lad_kernels of {expected}, got {lad_kernels.__file__}")
    for line in sys.stdin:
        path, *case = line.split("\t")
        print(json.dumps(call(path, *case)), flush=True)
