"""LAD as the loss function of prime-rl and slime, which compute the log-probs themselves.

| framework | how it is chosen |
|---|---|
| prime-rl | `[trainer.loss]` with `type = "custom"` and `import_path = "integration.losses.prime_rl_lad_loss"` |
| slime | `--loss-type custom_loss --custom-loss-function-path integration.losses.slime_lad_loss` |

Masks, weights and the global divisor stay the framework's, so micro-batches and ranks do not change the gradient. What
masked tokens hold has no effect. A loss token without a finite old log-prob (or reference log-prob, or weight, where
they take part) is dropped and counted in a metric; the frameworks themselves would let it spoil the step, and their
divisors still count it. What a call could not honour is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels import LADConfig, lad_loss

HEAD_SETTINGS, NO_HEAD = ("backward", "tail_mass", "tail"), "the framework's own head makes the log-probs"


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
    _refuse(settings, "prime-rl averages over tokens and shows one sequence at a time", "loss_agg_mode", "target_norm")
    _refuse(settings, NO_HEAD, *HEAD_SETTINGS)
    if inputs.loss_weights is not None:
        _refuse(settings, "loss_weights would not reach the KL term", "kl_coef")
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
    metrics = {f"lad/{name}": value for name, value in out.metrics.items()}
    return LossOutputs(out.loss * tokens, metrics)


# What slime's own policy loss adds; a custom loss replaces all of it.
SLIME_REFUSED = (
    "use_tis", "get_mismatch_metrics", "use_opsm", "use_kl_loss", "entropy_coef",
    "custom_pg_loss_reducer_function_path",
)  # fmt: skip


def slime_lad_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """LAD per token, reduced by slime's own `sum_of_sample_mean`, context parallelism included.

    The value is sum_t c_t log pi_t with constant c = d LAD / d log pi: LAD's gradient, without the e^u terms that
    dominate LAD's value.

    Args:
        args: slime's arguments; `--custom-config-path` may name a YAML file that sets `lad`, fields of `LADConfig`.
        batch: what slime's policy loss gets: `advantages`, `log_probs`, `rollout_log_probs` and so on, lists of [T_i].
        logits: [1, N, V / tp], float32.
        sum_of_sample_mean: per-token values [M] -> [].

    Raises:
        ImportError: slime is not installed.
        ValueError, TypeError: a setting that is wrong, or that cannot be honoured here.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    settings = dict(getattr(args, "lad", {}))
    _refuse(settings, "slime reduces single tokens itself", "loss_agg_mode", "importance_sampling_level", "target_norm")
    _refuse(settings, NO_HEAD, *HEAD_SETTINGS)
    _refuse(vars(args), "a custom loss replaces slime's policy loss and all that it adds", *SLIME_REFUSED)
    _, scored = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs = torch.cat(scored["log_probs"])  # [M]
    mask = _loss_tokens(sum_of_sample_mean, logprobs)  # [M]
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(old) if old else None  # [M]
    keep = mask if old is None else mask & old.isfinite()  # [M]
    leaf, advantages = logprobs.detach().requires_grad_(), torch.cat(batch["advantages"])  # [M], [M]
    out = lad_loss(leaf, old, advantages, loss_mask=keep, config=LADConfig(**settings), normalizer=1)
    (coefficients,) = torch.autograd.grad(out.loss, leaf)  # [M]

    def reduce(x: Tensor) -> Tensor:  # [M] -> []; slime multiplies by its mask, which keeps NaN and infinities
        return sum_of_sample_mean(torch.where(keep, x, 0.0))

    loss = reduce(coefficients * logprobs)
    if logprobs.numel() == 0:
        loss = loss + 0 * logits.sum()
    log_ratio = leaf.detach() - (leaf.detach() if old is None else old)  # [M]
    seen = {"ppo_kl": -log_ratio, "lad/ratio": log_ratio.exp(), "lad/abs_coef": coefficients.abs()}
    metrics = {"loss": loss.detach(), **{name: reduce(x) for name, x in seen.items()}}
    return loss, metrics | {"lad/nonfinite_share": sum_of_sample_mean((mask & ~keep).to(leaf.dtype))}


def _loss_tokens(sum_of_sample_mean: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:  # [M] -> bool [M]
    """Tokens to which slime's reducer gives a weight: its loss masks, of this rank's part under context parallelism."""
    probe = torch.zeros_like(like, requires_grad=True)  # [M]
    return torch.autograd.grad(sum_of_sample_mean(probe), probe)[0] != 0


def _refuse(settings: dict[str, Any], why: str, *names: str) -> None:
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name}: expected it unset, got {settings[name]!r}; {why}")
