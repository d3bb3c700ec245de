"""What `context_parallel_loss` refuses before any rank talks to another; test_distributed.py has its numbers."""

from __future__ import annotations

import pytest
import torch

from lad_kernels import GRPOConfig
from lad_kernels.frameworks.distributed import context_parallel_loss

WHOLE = {
    "vespo": {"importance_sampling_level": "sequence_sum"},
    "luspo": {"importance_sampling_level": "sequence", "loss_agg_mode": "seq-mean-token-sum"},
}


@pytest.mark.parametrize("policy_loss", WHOLE)
def test_losses_that_weigh_whole_sequences_are_refused_by_name(policy_loss):
    config = GRPOConfig(policy_loss=policy_loss, **WHOLE[policy_loss])
    with pytest.raises(ValueError, match=rf"policy_loss: expected .*, got '{policy_loss}', .* keep sequences whole"):
        context_parallel_loss(torch.zeros(2, 3), None, torch.ones(2), group=None, config=config)
