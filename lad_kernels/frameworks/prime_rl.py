"""LAD as a custom loss of prime-rl, which computes the log-probs itself; see `docs/frameworks/prime_rl.md`.

Masks, weights and the global divisor stay prime-rl's, so micro-batches and ranks do not change the gradient. What
masked tokens hold has no effect. A loss token without a finite old log-prob (or reference log-prob, or weight, where
they take part) is dropped, and counted in a metric and by prime-rl's divisor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.options import HEAD_SETTINGS, NO_HEAD, refuse


class LossOutputs(NamedTuple):
    """What prime-rl reads from a custom loss."""

    loss: Tensor  # [], the sum over the sequence
    metrics: dict[str, Tensor]  # 0-d, means over the sequence's tokens


def prime_rl_lad_loss(inputs: Any, **settings: Any) -> LossOutputs:
    """LAD on one sequence; the trainer adds the sequences up and divides by the global token count.

    Args:
        inputs: prime-rl's LossInputs: `trainer_logprobs`, `inference_logprobs`, `advantages` and `loss_mask`, each [T],
            and `ref_logprobs` and `loss_weights`, [T] or None.
        **settings: fields of `LADConfig`, from `[trainer.loss.kwargs]`.

    Raises:
        ValueError, TypeError: a setting that is wrong, or that cannot be honoured here.
    """
    refuse(settings, "prime-rl averages over tokens and shows one sequence at a time", "loss_agg_mode", "target_norm")
    refuse(settings, NO_HEAD, *HEAD_SETTINGS)
    if inputs.loss_weights is not None:
        refuse(settings, "loss_weights would not reach the KL term", "kl_coef")
    given = {
        "old_logprobs": inputs.inference_logprobs,
        "advantages": inputs.advantages,
        "loss_mask": inputs.loss_mask,
        "ref_logprobs": inputs.ref_logprobs,
        "rollout_is_weights": inputs.loss_weights,
    }
    rows = {name: None if x is None else x[None] for name, x in given.items()}  # [1, T]
    tokens = inputs.loss_mask.sum().clamp(min=1)  # [] those that prime-rl counts, dropped ones included
    out = lad_loss(inputs.trainer_logprobs[None], config=LADConfig(**settings), normalizer=tokens, **rows)
    return LossOutputs(out.loss * tokens, {f"lad/{name}": value for name, value in out.metrics.items()})
