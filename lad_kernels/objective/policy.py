"""LAD and the GRPO family on M packed tokens, in PyTorch: ratio level, aggregation, KL, entropy, metrics.

kernels/policy.py has the same three functions on Triton. The loss comes together with d loss / d logprob, so the
gradient never passes through autograd:

    loss = sum_t w_t (s_t l_t + kl_coef k3_t - entropy_coef H_t)

w_t is the aggregation weight (1/Z, or 1/(length Z) for seq-mean-token-mean), s_t the rollout importance weight, l_t
the divergence or clipped term and k3_t = exp(ref - logp) - (ref - logp) - 1. Deterministic, no host sync.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels.objective.advantages import advantages_of, group_log_mean_exp
from lad_kernels.objective.config import DIVERGENCES, PolicyConfig
from lad_kernels.objective.divergences import Terms, clip, grpo_terms, lad_terms
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.packing import sequence_of

_ALWAYS = (
    *("ratio_mean", "ratio_max", "coef_mean_positive", "coef_max_positive", "coef_mean_negative", "coef_max_negative"),
    *("clamp_share", "zero_coef_share", "approx_kl_k1", "approx_kl_k3", "ess", "loss_above_start", "nonfinite_share"),
)


class PolicyTerms(NamedTuple):
    """The objective and its gradient."""

    loss: Tensor  # []
    dlogprobs: Tensor  # [M] d loss / d logprob
    dentropy: Tensor | None  # [M] d loss / d entropy; None without an entropy term
    advantages: Tensor  # [B] or [M], as used
    metrics: dict[str, Tensor]  # 0-d


def prepare(inputs: PackedInputs, config: Any) -> PackedInputs:
    """Advantages and group statistics, which do not depend on log-probs."""
    advantages, shift = inputs.advantages, None  # [B] or [M]
    if inputs.rewards is not None:
        advantages = advantages_of(inputs.rewards, inputs.group_ids, config.advantage_scale)
    if config.norms_target:
        shift = group_log_mean_exp(advantages / config.eta, inputs.group_ids)  # [B]
    return inputs.with_advantages(advantages, shift)


def coefficients(logprobs: Tensor, inputs: PackedInputs, config: PolicyConfig) -> Tensor:  # [C] -> [C]
    """d loss / d logprob of a chunk whose inputs are prepared."""
    return _token_terms(_Sequences(logprobs, inputs), logprobs, inputs, config).dlogprobs


def policy_terms(
    logprobs: Tensor, entropy: Tensor | None, inputs: PackedInputs, config: PolicyConfig
) -> PolicyTerms:  # [M], [M]
    """The objective of all tokens."""
    inputs = inputs if inputs.prepared else prepare(inputs, config)
    seq = _Sequences(logprobs, inputs)
    t = _token_terms(seq, logprobs, inputs, config)
    loss, dentropy = (t.policy_weight * t.terms.loss).sum(), None
    extra = {} if t.over is None else {"frac_over_target": seq.mean(t.over)}
    if config.clips:
        extra["clip_share"] = seq.mean(t.clipped)
    if config.kl_coef != 0:
        loss = loss + config.kl_coef * (t.weight * t.k3).sum()
        extra["kl_ref"] = seq.mean(t.k3)
    if entropy is not None:
        entropy = seq.clean(entropy)
        extra["entropy"] = seq.mean(entropy)
        if config.entropy_coef != 0:
            loss = loss - config.entropy_coef * (t.weight * entropy).sum()
            dentropy = -config.entropy_coef * t.weight
    extra["loss_above_start"] = (t.policy_weight * t.terms.above_start).sum()
    return PolicyTerms(loss, t.dlogprobs, dentropy, inputs.advantages, {**_metrics(seq, t), **extra})


def metric_names(config: PolicyConfig, *, entropy: bool) -> tuple[str, ...]:
    """What is measured, in a fixed order; `entropy`: it is given."""
    also = {
        "frac_over_target": config.objective in DIVERGENCES,
        "clip_share": config.clips,
        "kl_ref": config.kl_coef != 0,
        "entropy": entropy,
    }
    return (*_ALWAYS, *(name for name, there in also.items() if there))


class _TokenTerms(NamedTuple):
    """What a token contributes; all [M]."""

    own_log_ratio: Tensor  # of the token itself
    log_ratio: Tensor  # of the level, clamped
    advantage: Tensor
    terms: Terms
    over: Tensor | None  # bool: the ratio is above its target; None without a target
    clipped: Tensor  # bool: the ratio is beyond a bound that stops the gradient there
    clamped: Tensor  # bool: a clamp on ratio or target is active
    weight: Tensor  # w of the KL and entropy terms
    policy_weight: Tensor  # w times the rollout's importance weight
    k3: Tensor | None  # None without a KL term
    dlogprobs: Tensor  # d loss / d logprob


def _token_terms(seq: _Sequences, logprobs: Tensor, inputs: PackedInputs, config: Any) -> _TokenTerms:
    logprobs, old = seq.clean(logprobs), seq.clean(inputs.old_logprobs)  # [M], [M]
    # [M] exactly 0 where both are equal, -inf included
    own = torch.zeros_like(logprobs) if old is None else torch.where(logprobs == old, 0.0, logprobs - old)
    raw_d = seq.level(own, config.importance_sampling_level)  # [M]
    bound = torch.inf if config.log_ratio_clamp is None else config.log_ratio_clamp
    d, stopped = raw_d.clamp(-bound, bound), raw_d.abs() > bound  # [M], [M]; NaN is not stopped
    expand = seq.clean if inputs.advantages_by_token else seq.expand
    a, clamped, over = expand(inputs.advantages), stopped, None  # [M], [M]
    if config.objective in DIVERGENCES:
        u = inputs.advantages / config.eta  # [B] or [M]
        raw_u = expand(u if inputs.shift is None else u - inputs.shift)  # [M]
        target_bound = torch.inf if config.target_clamp is None else config.target_clamp
        u = raw_u.clamp(-target_bound, target_bound)  # [M]
        inside, clipped = clip(config, d, u)  # [M], [M]
        terms = lad_terms(config.objective, inside, u, centered=config.centered)
        terms = terms._replace(coef=torch.where(clipped, 0.0, terms.coef))
        over, clamped = d > u, stopped | (raw_u.abs() > target_bound)
    else:
        terms, clipped = grpo_terms(config, logprobs, d, a, own)
    w = 1 / inputs.normalizer
    w = (w / seq.lengths)[seq.index] if config.loss_agg_mode == "seq-mean-token-mean" else w.expand(len(d))  # [M]
    w = seq.clean(w)
    s, isw = w, inputs.rollout_is_weights  # [M]
    if isw is not None:
        s = w * (seq.clean(isw) if inputs.weights_by_token else seq.expand(isw))
    direct = config.is_direct
    through_ratio = torch.where(stopped & (not direct), 0.0, s * terms.coef)  # [M]
    level = "token" if direct else config.importance_sampling_level  # at which a log-prob reaches the loss
    dlogprobs = seq.clean(seq.level(through_ratio, level))
    k3 = None
    if config.kl_coef != 0:
        gap = seq.clean(inputs.ref_logprobs) - logprobs  # [M]
        k3 = torch.where(gap.isinf(), torch.inf, gap.expm1() - gap)  # [M]
        beyond = k3 > (torch.inf if config.kl_clamp is None else config.kl_clamp)  # [M]
        k3 = torch.where(beyond, config.kl_clamp or 0.0, k3)
        dlogprobs = dlogprobs - config.kl_coef * w * torch.where(beyond, 0.0, gap.expm1())
    return _TokenTerms(own, d, a, terms, over, clipped, clamped, w, s, k3, dlogprobs)


class _Sequences:
    """Sums, means and broadcasts over packed tokens, some of which take part, and their sequences."""

    def __init__(self, like: Tensor, inputs: PackedInputs):  # [M]
        self._usable, cu_seqlens = inputs.usable, inputs.cu_seqlens  # [M], [B + 1]
        self._tokens = max(len(like), 1) if self._usable is None else self._usable.sum().clamp(min=1)
        if cu_seqlens is not None:
            self._spans = cu_seqlens.diff().long()  # [B]
            self.lengths = inputs.lengths.clamp(min=1).to(like.dtype)  # [B]
            self.index = sequence_of(len(like), cu_seqlens)  # [M]

    def clean(self, x: Any, other: float = 0.0) -> Any:  # [M] -> [M]; None stays None
        """`other` at tokens that take no part."""
        return x if self._usable is None or x is None else torch.where(self._usable, x, other)

    def expand(self, x: Tensor) -> Tensor:
        """[B] -> [M], 0 at tokens that take no part."""
        return self.clean(x[self.index])

    def level(self, d: Tensor, level: str) -> Tensor:
        """Token log-ratios [M] -> the log-ratio in each token's loss [M]. Linear, and its own transpose."""
        if level == "token" or len(self._spans) == 0:
            return d
        total = torch.segment_reduce(d, "sum", lengths=self._spans, unsafe=True)  # [B]
        return (total / self.lengths if level == "sequence" else total)[self.index]

    def mean(self, x: Tensor) -> Tensor:  # [M] -> []
        return self.clean(x.to(torch.promote_types(x.dtype, torch.float32))).sum() / self._tokens

    def effective_share(self, d: Tensor) -> Tensor:  # [M] -> []
        """(sum r)^2 / (n sum r^2) of r = e^d, relative to the largest ratio: no power of it overflows."""
        d = torch.cat([self.clean(d, -torch.inf), d.new_full((1,), -torch.inf)])  # [M + 1]
        top = d.amax()  # []
        r = (d - torch.where(top.isinf(), 0.0, top)).exp()  # [M + 1]
        squares = r.square().sum() * self._tokens
        return r.sum().square() / torch.where(squares == 0, 1.0, squares)


def _metrics(seq: _Sequences, t: _TokenTerms) -> dict[str, Tensor]:
    """Metrics that every objective has."""
    d, own = t.log_ratio, t.own_log_ratio  # [M], [M]
    r, size, zero = seq.clean(d.exp()), t.terms.coef.abs(), d.new_zeros(1)  # [M], [M], [1]
    metrics = {"ratio_mean": seq.mean(r), "ratio_max": torch.cat([r, zero]).amax()}
    for sign, chosen in (("positive", t.advantage > 0), ("negative", t.advantage < 0)):
        picked = torch.where(chosen, size, 0.0)
        metrics[f"coef_mean_{sign}"] = picked.sum() / chosen.sum().clamp(min=1)
        metrics[f"coef_max_{sign}"] = torch.cat([picked, zero]).amax()
    metrics["clamp_share"] = seq.mean(t.clamped)
    metrics["zero_coef_share"] = seq.mean(t.dlogprobs == 0)
    metrics["approx_kl_k1"] = seq.mean(-own)
    metrics["approx_kl_k3"] = seq.mean(own.expm1() - own)
    metrics["ess"] = seq.effective_share(d)
    return metrics
