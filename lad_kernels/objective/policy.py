"""LAD and the GRPO family on given log-probabilities: ratio level, aggregation, KL, entropy, metrics.

`policy_terms` is the whole objective on M packed tokens, in PyTorch; `kernel.policy_terms` is the same in one Triton
launch. Both return the loss together with d loss / d logprob, so the gradient never passes through autograd:

    loss = sum_t w_t (s_t l_t + kl_coef k3_t - entropy_coef H_t)

w_t is the aggregation weight (1/Z, or 1/(length Z) for seq-mean-token-mean), s_t the rollout importance weight, l_t
the divergence or clipped term and k3_t = exp(ref - logp) - (ref - logp) - 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.objective.advantages import advantages_of, group_log_mean_exp
from lad_kernels.objective.config import DIRECT_LOSSES, GRPOConfig, LADConfig
from lad_kernels.objective.divergences import grpo_terms, lad_terms
from lad_kernels.objective.inputs import (
    Config,
    PolicyInputs,
    divisor,
    has_target_norm,
    has_values_by_token,
    lengths_of,
    tokens_by_input,
    validate,
)
from lad_kernels.outputs import LossOutput
from lad_kernels.packing import Packing, pack, sequence_of


class PolicyTerms(NamedTuple):
    """The objective and its gradient."""

    loss: Tensor  # []
    dlogprobs: Tensor  # [M] d loss / d logprob
    dentropy: Tensor | None  # [M] d loss / d entropy; None when the entropy takes no part
    advantages: Tensor  # [B] or [M], as used
    metrics: dict[str, Tensor]  # 0-d


def lad_loss(
    logprobs: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None,  # same shape
    advantages: Tensor,  # [B], or the shape of logprobs
    *,
    loss_mask: Tensor | None = None,  # the shape of logprobs
    cu_seqlens: Tensor | None = None,  # [B + 1]
    config: LADConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of logprobs
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    entropy: Tensor | None = None,  # the shape of logprobs
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of logprobs
    impl: str = "auto",
) -> LossOutput:
    """LAD (arXiv 2602.20132) on log-probabilities that you already have: sum_t w_t e^u f(r / e^u), u = A / eta.

    The loss value is dominated by e^u terms that carry no gradient; watch `metrics["loss_above_start"]` (the loss
    minus its value at ratio 1) and the `coef_*` metrics instead.

    A token takes part if `loss_mask` keeps it, if it does not lie beyond the last bound of packed input, and if its old
    and reference log-prob and its rollout weight (of those that are used) are finite: one bad number of an engine drops
    its token, not the step. `metrics["nonfinite_share"]` counts such tokens; lengths, means over tokens and the default
    normalizer leave them out, a normalizer that you give is taken as it is. A NaN of the policy itself propagates.

    Args:
        logprobs: [N] packed or [B, T] padded, nats; the gradient flows into it (and into `entropy`) alone.
        old_logprobs: the behaviour policy's log-probs, same shape; None means on-policy, ratio exactly 1.
        advantages: [B] or [B, 1], one per sequence, or one per token; finite where a token counts. Packed input needs
            `cu_seqlens` for [B].
        loss_mask: same shape as logprobs, nonzero where a token counts. Others may hold anything, NaN included.
        cu_seqlens: int32 [B + 1], cumulative sequence lengths of packed input; tokens beyond the last are padding.
        config: divergence, eta, ratio level, aggregation, clamps, KL and entropy weights.
        normalizer: the divisor of the sum over tokens (token-mean, seq-mean-token-sum-norm) or sequences (the other
            modes). Give the global batch's to make gradient accumulation and data parallelism exact. Default: this
            batch's tokens that take part, its sequences with at least one of them, or B * T.
        ref_logprobs: reference policy's log-probs, needed when `config.kl_coef` is not 0, else not read.
        group_size, group_ids: as in `group_advantages`; needed when `config.target_norm` is set, else not read.
        entropy: per-token entropy, needed when `config.entropy_coef` is not 0.
        rollout_is_weights: importance weights >= 0 of the rollout engine, per token or, [B] or [B, 1], per sequence;
            constants.
        impl: `auto`, `triton`, `torch` or `reference`.

    Returns:
        LossOutput; metrics are described in the README.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype or device; the message says which and why.
    """
    checks.config(config, LADConfig, "grpo_loss")
    inputs = PolicyInputs(
        old_logprobs=old_logprobs, advantages=advantages, group_size=group_size, group_ids=group_ids,
        loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer, ref_logprobs=ref_logprobs, entropy=entropy,
        rollout_is_weights=rollout_is_weights,
    )  # fmt: skip
    return _policy_loss(logprobs, inputs, config, impl)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: GRPOConfig = GRPOConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    impl: str = "auto",
) -> LossOutput:
    """PPO-clip and its family (see `GRPOConfig`) on given log-probabilities; arguments as for `lad_loss`."""
    checks.config(config, GRPOConfig, "lad_loss")
    inputs = PolicyInputs(
        old_logprobs=old_logprobs, advantages=advantages, group_size=group_size, group_ids=group_ids,
        loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer, ref_logprobs=ref_logprobs, entropy=entropy,
        rollout_is_weights=rollout_is_weights,
    )  # fmt: skip
    return _policy_loss(logprobs, inputs, config, impl)


@without_autocast
def _policy_loss(logprobs: Tensor, inputs: PolicyInputs, config: Config, impl: str) -> LossOutput:
    checks.impl(impl)
    checks.plain_tensor("logprobs", logprobs)
    checks.floating_dtype("logprobs", logprobs)
    inputs = validate(inputs, logprobs, "logprobs", config)
    if impl == "reference":
        from lad_kernels import reference

        loss: Any = reference.lad_loss if isinstance(config, LADConfig) else reference.grpo_loss
        return loss(logprobs, config=config, **{k: v for k, v in vars(inputs).items() if k != "rewards"})
    packing = pack(logprobs, inputs.loss_mask, inputs.cu_seqlens)
    logp = packing.take(logprobs)  # [M]
    entropy = None if inputs.entropy is None else packing.take(inputs.entropy)  # [M]
    terms = compute_terms(logp, entropy, inputs, packing, config, impl)
    loss = _AttachGradient.apply(logp, entropy, terms.loss, terms.dlogprobs, terms.dentropy)
    place = packing.place
    used = inputs.advantages.detach()
    seen = None if entropy is None else place(entropy.detach())
    return LossOutput(loss, place(logp.detach()), seen, used, terms.metrics)


class _AttachGradient(torch.autograd.Function):
    """Gives a loss that was computed without autograd its known gradient."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss, dlogprobs, dentropy):  # [M], [M] | None, [], [M], [M] | None
        ctx.save_for_backward(dlogprobs, dentropy)
        ctx.set_materialize_grads(False)
        return loss.clone()

    @staticmethod
    @without_autocast
    def backward(ctx, grad):  # []
        checks.refuse_double_backward()
        dlogprobs, dentropy = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        return grad * dlogprobs, None if dentropy is None else grad * dentropy, None, None, None


def compute_terms(
    logprobs: Tensor,  # [M]
    entropy: Tensor | None,  # [M]
    inputs: PolicyInputs,
    packing: Packing,
    config: Config,
    impl: str,
) -> PolicyTerms:
    """Pack what is still unpacked and run the objective in Triton or PyTorch."""
    if config.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: needed because config.entropy_coef is {config.entropy_coef}, got None")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def by_token(x: Tensor | None) -> bool:
        return x is not None and has_values_by_token(x, packing)

    def take(x: Tensor | None, by_token: bool = True) -> Tensor | None:  # per token -> [M]; per sequence stays [B]
        if x is None:
            return None
        return (packing.take(x.detach()) if by_token else x.detach()).to(dtype)

    finite = tokens_by_input(inputs, packing, config)  # [M]
    usable = packing.inside if finite is None else finite if packing.inside is None else finite & packing.inside  # [M]
    group_ids = None
    if inputs.rewards is not None or has_target_norm(config):
        group_ids = checks.groups(len(packing.cu_seqlens) - 1, logprobs.device, inputs.group_size, inputs.group_ids)
    compute: Any = policy_terms
    if checks.use_triton(impl, logprobs.device, logprobs.dtype):
        from lad_kernels.objective.kernel import policy_terms as compute
    with torch.no_grad():
        found = compute(
            logprobs.detach().to(dtype), take(inputs.old_logprobs),
            advantages=take(inputs.advantages, by_token(inputs.advantages)),
            advantages_by_token=by_token(inputs.advantages), rewards=take(inputs.rewards, False), group_ids=group_ids,
            cu_seqlens=packing.cu_seqlens, config=config,
            normalizer=divisor(inputs.normalizer, packing, config, logprobs, usable), usable=usable,
            ref_logprobs=take(inputs.ref_logprobs), entropy=None if entropy is None else entropy.detach().to(dtype),
            rollout_is_weights=take(inputs.rollout_is_weights, by_token(inputs.rollout_is_weights)),
            weights_by_token=by_token(inputs.rollout_is_weights),
        )  # fmt: skip
        terms = PolicyTerms(*found)
        terms.metrics["nonfinite_share"] = _dropped_share(finite, packing.inside, logprobs)
    return terms


def _dropped_share(finite: Tensor | None, inside: Tensor | None, like: Tensor) -> Tensor:  # [M], [M] -> []
    """Share of tokens that an input of an engine drops."""
    if finite is None:
        return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    inside = torch.ones_like(finite) if inside is None else inside
    share = (inside & ~finite).sum() / inside.sum().clamp(min=1)
    return share.to(torch.promote_types(like.dtype, torch.float32))


def policy_terms(
    logprobs: Tensor,  # [M]
    old_logprobs: Tensor | None,  # [M]
    *,
    advantages: Tensor | None,  # [B], or [M] if advantages_by_token
    advantages_by_token: bool,
    rewards: Tensor | None,  # [B]
    group_ids: Tensor | None,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    config: Config,
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
    if isinstance(config, LADConfig):
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
    direct = isinstance(config, GRPOConfig) and config.policy_loss in DIRECT_LOSSES
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
