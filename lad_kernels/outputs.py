"""What the public functions return: named records without any mathematics.

Letters used in the whole package: N tokens (packed), B sequences, T padded length, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogprobs(NamedTuple):
    """Result of `linear_logprobs`; every field is shaped like `target_ids` and float32 (float64 for float64 input).

    Positions that `loss_mask` excludes hold exactly 0 and receive exactly zero gradient.
    """

    logprobs: Tensor  # [N] or [B, T], nats, never above 0
    entropy: Tensor | None  # same shape, nats; None unless return_entropy=True
    lse: Tensor  # same shape: log sum_j exp z_j of the transformed logits


class LossOutput(NamedTuple):
    """Result of every loss in the package.

    `loss` alone carries a gradient; the other fields are detached. `metrics` are 0-d tensors on the device of the
    inputs: reading one costs a host sync, filling them does not.
    """

    loss: Tensor  # []
    logprobs: Tensor | None  # [N] or [B, T]: log-probabilities of the targets, 0 where masked; None if not wanted
    entropy: Tensor | None  # same shape; None unless asked for
    advantages: Tensor  # [B], or [N] / [B, T] when they were given per token
    metrics: dict[str, Tensor]
