"""LAD as a custom loss of slime, which computes the log-probs itself; its settings are in `docs/frameworks/slime.md`.

Masks and the divisor stay slime's, so micro-batches and ranks do not change the gradient. What masked tokens hold has
no effect. A loss token without a finite old log-prob is dropped, and counted in a metric and by slime's divisor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.options import HEAD_SETTINGS, NO_HEAD, ratio_bounds, refuse, say_bounds

# What slime's own policy loss adds; a custom loss replaces all of it.
SLIME_REFUSED = (
    "use_tis",
    "get_mismatch_metrics",
    "use_opsm",
    "use_kl_loss",
    "entropy_coef",
    "custom_pg_loss_reducer_function_path",
    "eps_clip_c",
)
EPS_CLIP = 0.2  # slime's default of eps_clip, which sets no bound here


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
    refuse(settings, "slime reduces single tokens itself", "loss_agg_mode", "importance_sampling_level", "target_norm")
    refuse(settings, NO_HEAD, *HEAD_SETTINGS)
    refuse(vars(args), "a custom loss replaces slime's policy loss and all that it adds", *SLIME_REFUSED)
    clip, high = getattr(args, "eps_clip", EPS_CLIP), getattr(args, "eps_clip_high", None)
    theirs = clip, clip if high is None else high
    own = settings.get("epsilon_low"), settings.get("epsilon_high")
    settings["epsilon_low"], settings["epsilon_high"] = ratio_bounds(own, theirs, EPS_CLIP, "--eps-clip")
    say_bounds("slime_lad_loss", settings["epsilon_low"], settings["epsilon_high"], unset="slime's default --eps-clip")
    _, scored = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs = torch.cat(scored["log_probs"])  # [M]
    # Slime's reducer gives a weight to the tokens of its loss masks; under context parallelism to this rank's part.
    probe = torch.zeros_like(logprobs, requires_grad=True)  # [M]
    mask = torch.autograd.grad(sum_of_sample_mean(probe), probe)[0] != 0  # [M]
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
    values = {"ppo_kl": -log_ratio, "lad/ratio": log_ratio.exp(), "lad/abs_coef": coefficients.abs()}
    metrics = {"loss": loss.detach(), **{name: reduce(x) for name, x in values.items()}}
    return loss, metrics | {"lad/nonfinite_share": sum_of_sample_mean((mask & ~keep).to(leaf.dtype))}
