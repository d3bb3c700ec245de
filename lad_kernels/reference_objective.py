"""The specification of the objectives on given log-probabilities; `reference.py` has its terms of use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lad_kernels.objective.config import GRPOConfig, LADConfig
from lad_kernels.outputs import LossOutput

# f(x) of each divergence, given log x; x = exp(log x) is formed here and nowhere else.
GENERATORS = {
    "js": lambda x, log_x: 0.5 * (x * log_x - (x + 1) * ((x + 1) / 2).log()),
    "hd": lambda x, log_x: 0.5 * (x.sqrt() - 1) ** 2,
    "tv": lambda x, log_x: (x - 1).abs(),
    "kl": lambda x, log_x: x * log_x,
    "rkl": lambda x, log_x: -log_x,
    "jf": lambda x, log_x: (x - 1) * log_x,
    "ps": lambda x, log_x: (x - 1) ** 2 / x,
    "pearson": lambda x, log_x: (x - 1) ** 2,
}
SLOPE_AT_ONE = {"kl": 1.0, "rkl": -1.0}  # f'(1); zero for every other divergence
TURNS = {"kl": -1.0, "rkl": math.inf}  # log x where f' changes its sign; 0 for every other divergence


def lad_loss(
    logprobs: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None,  # same shape; None: the ratio is exactly 1
    advantages: Tensor,  # [B], or the shape of logprobs
    *,
    loss_mask: Tensor | None = None,  # the shape of logprobs
    cu_seqlens: Tensor | None = None,  # [B + 1], for packed input
    config: LADConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of logprobs
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    entropy: Tensor | None = None,  # the shape of logprobs
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of logprobs
    impl: str = "reference",
) -> LossOutput:
    """sum_t w_t e^u f(r / e^u) on given log-probabilities, for any divergence, ratio level and aggregation."""
    t = _Tokens(logprobs, old_logprobs, loss_mask, cu_seqlens, config, ref_logprobs, rollout_is_weights)
    u_given = advantages / config.eta  # [B] or per token
    if config.target_norm == "group":
        ids = torch.arange(t.count, device=u_given.device) // group_size if group_ids is None else group_ids  # [B]
        for group in ids.unique():
            members = (ids == group).to(u_given.device)
            log_mean = u_given[members].logsumexp(0) - math.log(int(members.sum()))
            u_given = torch.where(members, u_given - log_mean, u_given)
    u_raw = t.per_token(u_given).to(t.logprobs.dtype)  # [M]
    u = u_raw if config.target_clamp is None else u_raw.clamp(-config.target_clamp, config.target_clamp)

    low = -math.inf if config.epsilon_low is None or config.epsilon_low >= 1 else math.log1p(-config.epsilon_low)
    high = math.inf if config.epsilon_high is None else math.log1p(config.epsilon_high)
    turn = u if config.centered else u + TURNS.get(config.divergence, 0.0)  # the loss falls below it and rises above

    def beyond(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Above the upper bound where a step raises the ratio, below the lower one where it lowers it."""
        return (log_ratio > high) & (log_ratio < turn), (log_ratio < low) & (log_ratio > turn)

    def value(log_ratio: Tensor) -> Tensor:
        above, below = beyond(log_ratio)
        log_ratio = torch.where(above, high, torch.where(below, low, log_ratio))
        log_x = log_ratio - u
        f = GENERATORS[config.divergence](log_x.exp(), log_x)
        if config.divergence == "rkl":  # -e^u ln r: the gradient-free e^u u is dropped
            f = -log_ratio
        loss = u.exp() * f
        if config.centered:
            loss = loss - SLOPE_AT_ONE.get(config.divergence, 0.0) * (log_ratio.exp() - u.exp())
        return loss

    extra = {"frac_over_target": t.mean(t.log_ratio > u)}
    if low > -math.inf or high < math.inf:
        above, below = beyond(t.log_ratio.detach())
        extra["clip_share"] = t.mean(above | below)
    clamped = (t.log_ratio_raw != t.log_ratio) | (u_raw != u)
    return t.finish(value, advantages, clamped, extra, normalizer, ref_logprobs, entropy, rollout_is_weights)


def grpo_loss(
    logprobs: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None,  # same shape; None: the ratio is exactly 1
    advantages: Tensor,  # [B], or the shape of logprobs
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
    impl: str = "reference",
) -> LossOutput:
    """PPO-clip with asymmetric and dual clip (GRPO, DAPO, Dr. GRPO, GSPO, LUSPO), CISPO, REINFORCE, SAPO, VESPO."""
    t = _Tokens(logprobs, old_logprobs, loss_mask, cu_seqlens, config, ref_logprobs, rollout_is_weights)
    a = t.per_token(advantages).to(t.logprobs.dtype)  # [M]
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    ratio = t.log_ratio.detach().exp()

    def value(log_ratio: Tensor) -> Tensor:
        r = log_ratio.exp()
        if config.policy_loss == "reinforce":
            return -a * t.logprobs
        if config.policy_loss == "cispo":
            return -r.clamp(low, high).detach() * a * t.logprobs
        if config.policy_loss == "sapo":
            tau = torch.where(a > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
            gate = nn.functional.logsigmoid(tau * (r - 1)).exp()  # its slope: sigmoid's y (1 - y) is 0 too soon
            return -a * gate * 4 / tau
        if config.policy_loss == "vespo":
            k = torch.where(a >= 0, config.vespo_k_pos, config.vespo_k_neg)
            rate = torch.where(a >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
            return -(r**k * (rate * (1 - r)).exp()).detach() * a * t.logprobs
        loss = torch.maximum(-a * r, -a * r.clamp(low, high))
        if config.dual_clip is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -a * config.dual_clip), loss)
        return loss

    clipped = ((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))
    if config.policy_loss == "cispo":
        clipped = (ratio < low) | (ratio > high)
    elif config.policy_loss in ("reinforce", "sapo", "vespo"):
        clipped = torch.zeros_like(clipped)
    elif config.dual_clip is not None:
        clipped |= (a < 0) & (ratio > config.dual_clip)
    clamped = t.log_ratio_raw != t.log_ratio
    extra = {"clip_share": t.mean(clipped)}
    return t.finish(value, advantages, clamped, extra, normalizer, ref_logprobs, entropy, rollout_is_weights)


def counted(like: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Mask in the shape of `like`: where loss_mask keeps a token and, in packed input, not beyond the last bound."""
    mask = torch.ones_like(like, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    if cu_seqlens is not None:
        mask = mask & (torch.arange(len(like), device=like.device) < cu_seqlens[-1])
    return mask


class _Tokens:
    """The tokens that take part: their sequence, their log-ratio at the configured level, their weights.

    Kept by the mask, before the last bound of packed input, and with finite old, reference and rollout values.
    """

    def __init__(self, logprobs, old_logprobs, loss_mask, cu_seqlens, config, ref_logprobs, rollout_is_weights):
        self.config, self.shape = config, logprobs.shape
        if logprobs.ndim == 2:
            self.count, self.padded_length = logprobs.shape
            sequence = torch.arange(logprobs.numel(), device=logprobs.device) // self.padded_length
        elif cu_seqlens is not None:
            self.count, self.padded_length = len(cu_seqlens) - 1, None
            lengths = cu_seqlens.diff().long()
            sequence = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)
        else:
            self.count, self.padded_length = 1, None
            sequence = torch.zeros(logprobs.numel(), dtype=torch.long, device=logprobs.device)
        self.has_sequences = logprobs.ndim == 2 or cu_seqlens is not None
        asked = counted(logprobs, loss_mask, cu_seqlens).reshape(-1).nonzero()[:, 0]  # flat indices
        finite = torch.ones_like(asked, dtype=torch.bool)
        self.kept, self.sequence = asked, sequence[asked]
        for x in (old_logprobs, ref_logprobs if config.kl_coef != 0 else None):
            if x is not None:
                finite = finite & self.pick(x).isfinite()
        if rollout_is_weights is not None:
            finite = finite & self.per_token(rollout_is_weights).isfinite()
        self.kept, self.sequence = asked[finite], sequence[asked[finite]]  # [M], [M]
        self.nonfinite_share = logprobs.new_tensor((len(asked) - len(self.kept)) / max(len(asked), 1))
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        self.full_logprobs = logprobs
        self.logprobs = logprobs.reshape(-1)[self.kept].to(dtype)  # [M]
        old = self.logprobs.detach() if old_logprobs is None else self.pick(old_logprobs).to(dtype)
        new = self.logprobs
        d = torch.where(new == old, new - new.detach(), new - old)  # 0 where both are equal, ...
        self.token_log_ratio = d = torch.where(new.isinf() & (new == old), 0.0, d)  # ... also where both are -inf
        self.lengths = self.sum_sequences(torch.ones_like(self.logprobs))  # [B] kept tokens
        if config.importance_sampling_level != "token":
            d = self.sum_sequences(d)  # [B]
            if config.importance_sampling_level == "sequence":
                d = d / self.lengths.clamp(min=1)
            d = d[self.sequence]  # [M]
        self.log_ratio_raw = d
        clamp = config.log_ratio_clamp
        self.log_ratio = d if clamp is None else d.clamp(-clamp, clamp)

    def pick(self, x: Tensor) -> Tensor:
        return x.reshape(-1)[self.kept]

    def per_token(self, x: Tensor) -> Tensor:
        """[B] or per token -> [M]. A packed batch without cu_seqlens has per-token values only."""
        return x[self.sequence] if self.has_sequences and x.shape == (self.count,) else self.pick(x)

    def sum_sequences(self, x: Tensor) -> Tensor:  # [M] -> [B]
        return x.new_zeros(self.count).index_add(0, self.sequence, x)

    def mean(self, x: Tensor) -> Tensor:
        return x.to(self.logprobs.dtype).sum() / max(len(self.kept), 1)

    def effective_share(self, d: Tensor) -> Tensor:  # [M] -> []
        """(sum r)^2 / (n sum r^2)."""
        if not len(d) or d.max() == -torch.inf:
            return d.new_zeros(())
        r = (d - d.max()).exp()  # [M], of a common factor
        return r.sum() ** 2 / (len(d) * (r**2).sum())

    def weights(self, normalizer: float | Tensor | None) -> Tensor:  # [M]
        mode, ones = self.config.loss_agg_mode, torch.ones_like(self.logprobs)
        if normalizer is None:
            sequences = int((self.lengths > 0).sum())
            counts = {
                "token-mean": len(self.kept),
                "seq-mean-token-mean": sequences,
                "seq-mean-token-sum": sequences,
                "seq-mean-token-sum-norm": self.count * (self.padded_length or 1),
            }
            normalizer = max(1, counts[mode])
        if mode == "seq-mean-token-mean":
            ones = ones / self.lengths[self.sequence]
        return ones / normalizer

    def finish(self, value, advantages, clamped, extra, normalizer, ref_logprobs, entropy, rollout_is_weights):
        """Aggregate, add the KL and entropy terms, and measure."""
        config, w = self.config, self.weights(normalizer)  # [M]
        isw = (
            torch.ones_like(w) if rollout_is_weights is None else self.per_token(rollout_is_weights).to(w.dtype)
        )  # [M]
        policy = value(self.log_ratio)  # [M]
        loss = (w * isw * policy).sum()
        r = self.log_ratio.detach().exp()
        d = self.token_log_ratio.detach()
        metrics = {
            "ratio_mean": self.mean(r),
            "ratio_max": r.max() if len(r) else r.new_zeros(()),
            "clamp_share": self.mean(clamped),
            "approx_kl_k1": self.mean(-d),
            "approx_kl_k3": self.mean(d.expm1() - d),
            "ess": self.effective_share(self.log_ratio.detach()),
            "nonfinite_share": self.nonfinite_share,
            **extra,
        }
        if isinstance(config, LADConfig):
            start = value(torch.zeros_like(self.log_ratio))
            metrics["loss_above_start"] = (w * isw * (policy - start)).sum().detach()
        if config.kl_coef != 0:
            gap = self.pick(ref_logprobs) - self.logprobs
            k3 = gap.exp() - gap - 1  # [M], Schulman's estimate of KL(pi || pi_ref)
            if config.kl_clamp is not None:
                beyond = k3.detach() > config.kl_clamp
                gap = torch.where(beyond, 0.0, gap)  # autograd would multiply its zero by an infinity
                k3 = torch.where(beyond, config.kl_clamp, gap.exp() - gap - 1)
            loss = loss + config.kl_coef * (w * k3).sum()
            metrics["kl_ref"] = self.mean(k3.detach())
        if entropy is not None:
            loss = loss - config.entropy_coef * (w * self.pick(entropy)).sum()
            metrics["entropy"] = self.mean(self.pick(entropy.detach()))
        loss = loss + self.full_logprobs.reshape(-1)[:0].sum()  # differentiable when every token is masked
        return LossOutput(
            loss, self.full_logprobs.detach(), None if entropy is None else entropy.detach(), advantages, metrics
        )
