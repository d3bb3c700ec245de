"""A case of `distributed_worker.py` that ends when a rank is killed: steps of a head sharded over the ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from lad_kernels import LADConfig, linear_lad_loss


def steps_without_end() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(64, 16, requires_grad=True), torch.randint(0, 100, (64,))
    weight = torch.randn(100 // dist.get_world_size(), 16, requires_grad=True)
    for i in range(1_000_000):
        call = {"advantages": torch.ones(64), "config": LADConfig(), "vocab_group": dist.group.WORLD}
        linear_lad_loss(hidden, weight, targets, -torch.ones(64), **call).loss.backward()
        if i == 20:
            (Path(os.environ["SOAK_FOLDER"]) / "running").touch()


CASES = [steps_without_end]
