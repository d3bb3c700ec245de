"""A case of `distributed_worker.py`: random calls, of which one rank sometimes makes a different one."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs

STEPS = 60


def ranks_out_of_step() -> None:
    """The one that differs and the others get the same ValueError, and the next call is right again."""
    rank, world = dist.get_rank(), dist.group.WORLD
    plan, torch_seed = random.Random(0), 0
    for _ in range(STEPS):
        torch_seed += 1
        gen = torch.Generator().manual_seed(torch_seed)
        n, v = plan.randint(2, 40), plan.randint(2, 50)
        hidden, weight = torch.randn(n, 8, generator=gen), torch.randn(v, 8, generator=gen)
        targets = torch.randint(0, v, (n,), generator=gen)
        advantages = torch.ones(n)
        odd, how = plan.randrange(3), plan.choice(["tokens", "eta", "function", "values", "entropy", None])
        mine = rank == odd
        if mine and how == "tokens":
            hidden, targets, advantages = hidden[1:], targets[1:], advantages[1:]
        if mine and how == "values":
            hidden = hidden + 1e-3

        def call(mine=mine, how=how, given=(hidden, weight, targets), advantages=advantages):
            if mine and how == "function":
                return linear_logprobs(*given, vocab_group=world)
            config = LADConfig(eta=0.5 if mine and how == "eta" else 0.25)
            options = {"config": config, "return_entropy": mine and how == "entropy", "vocab_group": world}
            return linear_lad_loss(*given, advantages=advantages, **options)

        if how is None:
            call()
            continue
        with pytest.raises(ValueError, match="vocab_group: expected the same"):
            call()


CASES = [ranks_out_of_step]
