"""What the public functions return: named records without any mathematics.

Letters used in the whole package: N tokens (packed), B sequences, T padded length, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# How a metric of `LossOutput` is combined over micro-batches and ranks. `sum`: they add up, given the global
# normalizer. `... tokens`: means, weighted by the tokens they are over: all that take part, those of positive or of
# negative advantage, or all loss tokens, dropped ones included. `apart`: no number per batch combines to that of all.
METRICS = {
    "loss_above_start": "sum",
    "head_flops": "sum",
    "ratio_max": "max",
    "coef_max_positive": "max",
    "coef_max_negative": "max",
    "dropped_mass_max": "max",
    "ratio_mean": "tokens",
    "approx_kl_k1": "tokens",
    "approx_kl_k3": "tokens",
    "kl_ref": "tokens",
    "entropy": "tokens",
    "clamp_share": "tokens",
    "clip_share": "tokens",
    "frac_over_target": "tokens",
    "zero_coef_share": "tokens",
    "kept_share": "tokens",
    "routed_share": "tokens",
    "dropped_mass_mean": "tokens",
    "coef_mean_positive": "positive tokens",
    "coef_mean_negative": "negative tokens",
    "nonfinite_share": "loss tokens",
    "ess": "apart",
    "dhidden_bound": "apart",
    "dweight_bound": "apart",
}


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
    advantages: Tensor | None  # [B], or [N] / [B, T] when they were given per token; None for an objective of your own
    metrics: dict[str, Tensor]  # 0-d; METRICS says how each is combined with those of other batches


class CrossEntropyStats(NamedTuple):
    """What `linear_cross_entropy` reports besides the loss; nothing here carries a gradient."""

    token_accuracy: Tensor  # [] share of the tokens that count whose target no other entry beats
    correct: Tensor  # bool, the shape of target_ids: which those are; False where ignored
    logprobs: Tensor  # the same shape: log-probability of the target, nats, 0 where ignored
    entropy: Tensor  # the same shape: of each token's distribution, nats, 0 where ignored
    z_loss: Tensor  # [] the part of the loss that z_loss adds; with reduction="none" its sum
    metrics: dict[str, Tensor]  # 0-d: kept share and error bounds of the backward, head_flops; as in `LossOutput`
