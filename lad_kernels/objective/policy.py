"""LAD and the GRPO family on given log-probabilities: ratio level, aggregation, KL, entropy, metrics.

`policy_terms` is the whole objective on M packed tokens, in PyTorch; `kernels/policy.py` is the same in one Triton
launch. Both return the loss together with d loss / d logprob, so the gradient never passes through autograd:

    loss = sum_t w_t (s_t l_t + kl_coef k3_t - entropy_coef H_t)

w_t is the aggregation weight (1/Z, or 1/(length Z) for seq-mean-token-mean), s_t the rollout importance weight, l_t
the divergence or clipped term and k3_t = exp(ref - logp) - (ref - logp) - 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels.objective.advantages import advantages_of, group_log_mean_exp
from lad_kernels.objective.config import DIRECT_LOSSES, DIVERGENCES
from lad_kernels.objective.divergences import grpo_terms, lad_terms
from lad_kernels.objective.inputs import lengths_of
from lad_kernels.packing import sequence_of


class PolicyTerms(NamedTuple):
    """The objective and its gradient."""

    loss: Tensor  # []
    dlogprobs: Tensor  # [M] d loss / d logprob
    dentropy: Tensor | None  # [M] d loss / d entropy; None when the entropy takes no part
    advantages: Tensor  # [B] or [M], as used
    metrics: dict[str, Tensor]  # 0-d


def policy_terms(
    logprobs: Tensor,  # [M]
    old_logprobs: Tensor | None,  # [M]
    *,
    advantages: Tensor | None,  # [B], or [M] if advantages_by_token
    advantages_by_token: bool,
    rewards: Tensor | None,  # [B]
    group_ids: Tensor | None,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    config: Any,
    normalizer: Tensor,  # []
    ref_logprobs: Tensor | None,  # [M]
    entropy: Tensor | None,  # [M]
    rollout_is_weights: Tensor | None,  # [B], or [M] if weights_by_token
    weights_by_token: bool,
    usable: Tensor | None = None,  # [M] False: takes no part, whatever its inputs hold; None: all take part
) -> PolicyTerms:
    """The objective in PyTorch, on packed tokens. Deterministic, no host sync."""
    seq = _Sequences(logprobs, cu_seqlens, usable)
    if rewards is not None:
        advantages = advantages_of(rewards, group_ids, config.advantage_scale)
    logprobs, old_logprobs, ref_logprobs, entropy = map(seq.clean, (logprobs, old_logprobs, ref_logprobs, entropy))
    token_d = _log_ratio(logprobs, old_logprobs)  # [M]
    raw_d = seq.level(token_d, config.importance_sampling_level)  # [M]
    bound = torch.inf if config.log_ratio_clamp is None else config.log_ratio_clamp
    d, stopped = raw_d.clamp(-bound, bound), raw_d.abs() > bound  # [M], [M]; NaN is not stopped
    spread = seq.clean if advantages_by_token else seq.spread
    a = spread(advantages)  # [M]
    bites, extra = stopped, {}
    if config.objective in DIVERGENCES:
        u = advantages / config.eta  # [B] or [M]
        if config.target_norm == "group":
            u = u - group_log_mean_exp(u, group_ids)
        raw_u = spread(u)  # [M]
        target_bound = torch.inf if config.target_clamp is None else config.target_clamp
        u = raw_u.clamp(-target_bound, target_bound)  # [M]
        terms = lad_terms(config.divergence, d, u, centered=config.centered)
        bites, extra["frac_over_target"] = stopped | (raw_u.abs() > target_bound), seq.mean(d > u)
    else:
        terms, clipped = grpo_terms(config, logprobs, d, a, token_d)
        extra["clip_share"] = seq.mean(clipped)
    w = 1 / normalizer
    w = (w / seq.lengths)[seq.index] if config.loss_agg_mode == "seq-mean-token-mean" else w.expand(len(d))  # [M]
    w = seq.clean(w)
    s = w  # [M] weight of the policy term
    if rollout_is_weights is not None:
        s = w * (seq.clean(rollout_is_weights) if weights_by_token else seq.spread(rollout_is_weights))
    loss = (s * terms.loss).sum()
    direct = config.objective in DIRECT_LOSSES
    through_ratio = torch.where(stopped & (not direct), 0.0, s * terms.coef)  # [M]
    level = "token" if direct else config.importance_sampling_level  # at which a log-prob reaches the loss
    dlogprobs = seq.clean(seq.level(through_ratio, level))
    if config.kl_coef != 0:
        gap = ref_logprobs - logprobs  # [M]
        k3 = torch.where(gap.isinf(), torch.inf, gap.expm1() - gap)  # [M]
        beyond = k3 > (torch.inf if config.kl_clamp is None else config.kl_clamp)  # [M]
        k3 = torch.where(beyond, config.kl_clamp or 0.0, k3)
        loss = loss + config.kl_coef * (w * k3).sum()
        dlogprobs = dlogprobs - config.kl_coef * w * torch.where(beyond, 0.0, gap.expm1())
        extra["kl_ref"] = seq.mean(k3)
    dentropy = None
    if entropy is not None:
        extra["entropy"] = seq.mean(entropy)
        if config.entropy_coef != 0:
            loss, dentropy = loss - config.entropy_coef * (w * entropy).sum(), -config.entropy_coef * w
    extra["loss_above_start"] = (s * terms.above_start).sum()
    metrics = {**_metrics(seq, token_d, d, a, terms.coef, bites, dlogprobs), **extra}
    return PolicyTerms(loss, dlogprobs, dentropy, advantages, metrics)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """logp - logp_old [M]; exactly 0 where they are equal, -inf included."""
    if old_logprobs is None:
        return torch.zeros_like(logprobs)
    return torch.where(logprobs == old_logprobs, 0.0, logprobs - old_logprobs)


class _Sequences:
    """Sums, means and broadcasts over M packed tokens, of which `usable` [M] take part, and their sequences."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None, usable: Tensor | None):
        self._usable = usable
        self._tokens = max(len(like), 1) if usable is None else usable.sum().clamp(min=1)
        self.sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is not None:
            self._spans = cu_seqlens.diff().long()  # [B]
            self.lengths = lengths_of(cu_seqlens, usable).clamp(min=1).to(like.dtype)  # [B]
            self.index = sequence_of(len(like), cu_seqlens)  # [M]

    def clean(self, x: Any, other: float = 0.0) -> Any:  # [M] -> [M]; None stays None
        """`other` at tokens that take no part."""
        return x if self._usable is None or x is None else torch.where(self._usable, x, other)

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> [M], 0 at tokens that take no part."""
        return self.clean(x[self.index])

    def level(self, d: Tensor, level: str) -> Tensor:
        """Token log-ratios [M] -> the log-ratio each token's loss sees [M]. Linear, and its own transpose."""
        if level == "token" or self.sequences == 0:
            return d
        total = torch.segment_reduce(d, "sum", lengths=self._spans, unsafe=True)  # [B]
        return (total / self.lengths if level == "sequence" else total)[self.index]

    def mean(self, x: Tensor) -> Tensor:  # [M] -> []
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.clean(x.to(wide)).sum() / self._tokens

    def effective_share(self, d: Tensor) -> Tensor:  # [M] -> []
        """(sum r)^2 / (n sum r^2) of r = e^d, relative to the largest ratio: no power of it overflows."""
        d = torch.cat([self.clean(d, -torch.inf), d.new_full((1,), -torch.inf)])  # [M + 1]
        top = d.amax()  # []
        r = (d - torch.where(top.isinf(), 0.0, top)).exp()  # [M + 1]
        squares = r.square().sum() * self._tokens
        return r.sum().square() / torch.where(squares == 0, 1.0, squares)


def _metrics(
    seq: _Sequences, token_d: Tensor, d: Tensor, a: Tensor, coef: Tensor, bites: Tensor, dlogprobs: Tensor
) -> dict[str, Tensor]:
    """Metrics that every objective has, from [M] tensors."""
    r, size, zero = seq.clean(d.exp()), coef.abs(), d.new_zeros(1)
    metrics = {"ratio_mean": seq.mean(r), "ratio_max": torch.cat([r, zero]).amax()}
    for sign, chosen in (("positive", a > 0), ("negative", a < 0)):
        picked = torch.where(chosen, size, 0.0)
        metrics[f"coef_mean_{sign}"] = picked.sum() / chosen.sum().clamp(min=1)
        metrics[f"coef_max_{sign}"] = torch.cat([picked, zero]).amax()
    metrics["clamp_share"] = seq.mean(bites)
    metrics["zero_coef_share"] = seq.mean(dlogprobs == 0)
    metrics["approx_kl_k1"] = seq.mean(-token_d)
    metrics["approx_kl_k3"] = seq.mean(token_d.expm1() - token_d)
    metrics["ess"] = seq.effective_share(d)
    return metrics
