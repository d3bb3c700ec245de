"""The baseline of each job, as trainers write it: logits stored in the model's dtype, widened, log-softmax, gather."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.data import Batch

EAGER = "eager torch"
EPSILON, ETA = 0.2, 0.25  # as in the default GRPOConfig and LADConfig


def eager_logprobs(batch: Batch) -> Tensor:  # [N]
    logits = (batch.hidden @ batch.weight.T).float()  # [N, V]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def eager_ce(batch: Batch) -> Tensor:  # []
    return F.cross_entropy((batch.hidden @ batch.weight.T).float(), batch.targets)


def grpo_from_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:  # [N] -> []
    """The token-mean PPO-clip loss as trainers write it."""
    mask = torch.ones_like(batch.old_logprobs)  # [B, T]
    ratio = (logprobs.view(batch.padded) - batch.old_logprobs).exp()  # [B, T]
    a = batch.advantages[:, None]  # [B, 1]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)  # [B, T]
    return (loss * mask).sum() / mask.sum()


def lad_from_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:  # [N] -> []
    """The paper's objective with the Jensen-Shannon divergence, e^u f(r / e^u), written the same way."""
    mask = torch.ones_like(batch.old_logprobs)  # [B, T]
    u = batch.advantages[:, None] / ETA  # [B, 1]
    log_x = logprobs.view(batch.padded) - batch.old_logprobs - u  # [B, T]
    x = log_x.exp()
    loss = u.exp() * 0.5 * (x * log_x - (x + 1) * ((x + 1) / 2).log())  # [B, T]
    return (loss * mask).sum() / mask.sum()


def eager_grpo(batch: Batch) -> Tensor:
    return grpo_from_logprobs(eager_logprobs(batch), batch)


def eager_lad(batch: Batch) -> Tensor:
    return lad_from_logprobs(eager_logprobs(batch), batch)
