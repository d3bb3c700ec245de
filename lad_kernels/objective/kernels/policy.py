"""The objective storey as one Triton launch: rewards or advantages and log-probs -> loss, d loss / d logp, metrics.

Mathematics: divergences.py has the terms of one token, advantages.py the statistics of a group.

Layout. One program per sequence (per 4,096 tokens if there are no sequences), tokens in blocks of 256:
  1. rewards, target_norm: passes over all B values, comparing group ids;
  2. a pass that counts who takes part, with the sequence levels' log r; there also a pass for the gradient that all
     tokens of the sequence share;
  3. a pass for the loss, the metrics and d loss / d logp.
Each program writes one column of partials [ROWS, B], which a few torch operations reduce: deterministic, no host sync.

Exact: ratio 1 where both log-probs are equal (also both -inf), gradient 0 where a clamp or clip holds, A = 0 in a group
of one or of equal rewards; the rest to a few ulp of fp32 per token, beyond the rounding of d and u themselves.
Cost: two to three reads of the N-vectors and, with groups, B^2 rewards out of cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.objective.config import DIVERGENCES, SETTINGS, PolicyConfig
from lad_kernels.objective.kernels.advantages import _advantage
from lad_kernels.objective.kernels.divergences import _exp, _exps, _minus, _policy_term

SEGMENT = tl.constexpr(4096)  # tokens per program where there are no sequences
BLOCK = tl.constexpr(256)  # tokens per step: one per thread at 8 warps, which ptxas fits without spills

# Rows of the partials buffer in the order in which the kernel stores them: sums, maxima, the sequence's advantage.
MEANS = ("marked", "clamp_share", "zero_coef_share", "approx_kl_k1", "approx_kl_k3", "kl_ref", "entropy")
SUMS = ("loss", "loss_above_start", *MEANS, "e_sum", "e_squares", "tokens", "coef_positive", "coef_negative",
        "positive", "negative")  # fmt: skip
MAXIMA = ("peak", "coef_max_positive", "coef_max_negative")


@triton.jit
def _load_tokens(tokens, t0, end, ADVANTAGE: tl.constexpr, ISW_TOKEN: tl.constexpr):
    """Index, who takes part, logp and log ratio (0 where not), advantage, rollout weight of a block; all [BLOCK]."""
    logprobs, old, source, isw, adv, isw_s, usable = tokens
    t = t0 + tl.arange(0, BLOCK)
    mask = t < end
    if usable is not None:
        mask = mask & (tl.load(usable + t, mask=mask, other=0) != 0)
    logp = tl.load(logprobs + t, mask=mask, other=0.0)
    zero = tl.zeros_like(logp)
    d = zero if old is None else _minus(logp, tl.load(old + t, mask=mask, other=0.0))
    a = tl.load(source + t, mask=mask, other=0.0) if ADVANTAGE == "token" else adv + zero
    return t, mask, logp, d, a, tl.load(isw + t, mask=mask, other=0.0) if ISW_TOKEN else isw_s + zero


@triton.jit
def _policy_kernel(
    logprobs, old, source, groups, cu_seqlens, ref, entropy, isw, normalizer, usable, dlogprobs, dentropy, partials,
    N, ratio_clamp, kl_coef, kl_clamp, entropy_coef, setting0, setting1, setting2, setting3,
    OBJECTIVE: tl.constexpr, LEVEL: tl.constexpr, SEQ_MEAN: tl.constexpr, SCALE: tl.constexpr, CENTERED: tl.constexpr,
    TARGET_NORM: tl.constexpr, ADVANTAGE: tl.constexpr, ISW_TOKEN: tl.constexpr,
):  # fmt: skip
    """One sequence: advantage, log ratio, loss, gradient, row sums. Shapes: see `policy_terms`."""
    s = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    if cu_seqlens is None:
        start = s * SEGMENT
        end = tl.minimum(start + SEGMENT, N)
    else:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    adv, shift = 0.0, 0.0
    if ADVANTAGE != "token":
        adv, shift = _advantage(source, groups, s, setting0, B, SCALE, ADVANTAGE == "rewards", TARGET_NORM)
    isw_s = 1.0 if isw is None or ISW_TOKEN else tl.load(isw + s)
    tokens = (logprobs, old, source, isw, adv, isw_s, usable)
    settings = (setting0, setting1, setting2, setting3)
    zero = tl.zeros([BLOCK], tl.float32)

    level_d, level_c, members, peak = zero, zero, zero, zero - float("inf")
    for t0 in range(start, end, BLOCK):
        t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
        level_d += d
        members += tl.where(mask, 1.0, 0.0)
        peak = tl.maximum(peak, tl.where(mask, d, -float("inf")))
    length = tl.maximum(tl.sum(members), 1.0)
    weight = 1.0 / (tl.load(normalizer) * (length if SEQ_MEAN else 1.0))
    shared: tl.constexpr = LEVEL != "token" and OBJECTIVE != "vespo"  # whether d reaches the loss through the sequence
    if LEVEL != "token":  # log ratio and d loss / d logp, the same for all tokens of the sequence
        share = 1.0 / length if LEVEL == "sequence" else 1.0
        level_d = tl.sum(level_d) * share + zero
        peak = tl.where(peak == -float("inf"), peak, level_d)
    if shared:
        for t0 in range(start, end, BLOCK):
            t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
            d, loss, c, stopped, above, marked, clamped = _policy_term(
                logp, level_d, d, a, shift, ratio_clamp, settings, OBJECTIVE, CENTERED
            )
            level_c += tl.where(mask & ~stopped, weight * rollout * c, 0.0)
        level_c = tl.sum(level_c) * share + zero

    peak = tl.max(peak)  # the largest log ratio as used; -inf: none, or no ratio above 0
    peak = tl.where(tl.sum(members) > 0.0, tl.minimum(tl.maximum(peak, -ratio_clamp), ratio_clamp), peak)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # no power of a ratio relative to it overflows
    loss_sum, above_sum, e_sum, e_squares = zero, zero, zero, zero
    marked_sum, clamped_sum, zeros, k1, k3, kl_sum, entropy_sum = zero, zero, zero, zero, zero, zero, zero
    up_sum, up_count, up_max, down_sum, down_count, down_max = zero, zero, zero, zero, zero, zero
    for t0 in range(start, end, BLOCK):
        t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
        k1 -= d
        k3 += _exps(d)[2]
        own = d
        d = d if LEVEL == "token" else level_d
        d, loss, c, stopped, above, marked, clamped = _policy_term(
            logp, d, own, a, shift, ratio_clamp, settings, OBJECTIVE, CENTERED
        )
        total = weight * rollout * loss
        gradient = tl.where(stopped, 0.0, weight * rollout * c) if not shared else level_c
        if ref is not None:
            gap = _minus(tl.load(ref + t, mask=mask, other=0.0), logp)
            _, slope, kl = _exps(gap)
            slope, kl = tl.where(kl > kl_clamp, 0.0, slope), tl.where(kl > kl_clamp, kl_clamp, kl)
            total += kl_coef * weight * kl
            gradient -= kl_coef * weight * slope
            kl_sum += kl
        if entropy is not None:
            h = tl.load(entropy + t, mask=mask, other=0.0)
            total -= entropy_coef * weight * h
            entropy_sum += h
        if dentropy is not None:
            tl.store(dentropy + t, zero - entropy_coef * weight, mask=mask)
        tl.store(dlogprobs + t, gradient, mask=mask)
        e = tl.where(mask, _exp(d - base), 0.0)
        up, down = mask & (a > 0.0), mask & (a < 0.0)
        up_size, down_size = tl.where(up, tl.abs(c), 0.0), tl.where(down, tl.abs(c), 0.0)
        loss_sum += tl.where(mask, total, 0.0)
        above_sum += tl.where(mask, weight * rollout * above, 0.0)
        e_sum += e
        e_squares += e * e
        marked_sum += tl.where(mask & marked, 1.0, 0.0)
        clamped_sum += tl.where(mask & clamped, 1.0, 0.0)
        zeros += tl.where(mask & (gradient == 0.0), 1.0, 0.0)
        up_sum += up_size
        up_count += tl.where(up, 1.0, 0.0)
        up_max = tl.maximum(up_max, up_size)
        down_sum += down_size
        down_count += tl.where(down, 1.0, 0.0)
        down_max = tl.maximum(down_max, down_size)

    rows = (loss_sum, above_sum, marked_sum, clamped_sum, zeros, k1, k3, kl_sum, entropy_sum, e_sum, e_squares, members,
            up_sum, down_sum, up_count, down_count, peak + zero, up_max, down_max)  # fmt: skip
    for i in tl.static_range(len(rows)):
        tl.store(partials + i * B + s, tl.max(rows[i]) if i >= len(rows) - 3 else tl.sum(rows[i]))
    tl.store(partials + len(rows) * B + s, adv)


def policy_terms(
    logprobs: Tensor,  # [N] fp32: packed tokens
    old_logprobs: Tensor | None,  # [N]; None: ratio exactly 1
    *,
    advantages: Tensor | None,  # [B], or [N] if advantages_by_token
    advantages_by_token: bool,
    rewards: Tensor | None,  # [B]; exactly one of advantages and rewards
    group_ids: Tensor | None,  # [B] integers, for rewards and for target_norm
    cu_seqlens: Tensor | None,  # [B + 1]; None: no sequences, everything is per token
    config: PolicyConfig,
    normalizer: Tensor,  # [] the divisor Z
    ref_logprobs: Tensor | None,  # [N], used if config.kl_coef is not 0
    entropy: Tensor | None,  # [N]
    rollout_is_weights: Tensor | None,  # [B], or [N] if weights_by_token
    weights_by_token: bool,
    usable: Tensor | None = None,  # [N] bool; False: takes no part, whatever its inputs hold; None: all take part
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
    """loss [], d loss / d logp [N], d loss / d entropy [N] or None, advantages [B] or [N] as used, metrics (0-d)."""
    n, lad = len(logprobs), config.objective in DIVERGENCES
    programs = triton.cdiv(n, SEGMENT.value) if cu_seqlens is None else len(cu_seqlens) - 1
    target_norm = config.norms_target
    grouped = target_norm or rewards is not None
    new = torch.empty_like if usable is None else torch.zeros_like  # the kernel writes where tokens take part
    dlogprobs = new(logprobs)  # [N]
    dentropy = new(logprobs) if entropy is not None and config.entropy_coef != 0 else None  # [N]
    partials = logprobs.new_empty(len(SUMS) + len(MAXIMA) + 1, programs)  # [ROWS, B]
    tensors = (logprobs, old_logprobs, advantages if rewards is None else rewards, group_ids if grouped else None,
               cu_seqlens, ref_logprobs if config.kl_coef != 0 else None, entropy, rollout_is_weights,
               normalizer, usable)  # fmt: skip
    scalars = (config.log_ratio_clamp, config.kl_coef, config.kl_clamp, config.entropy_coef, *_settings(config))
    options = dict(
        OBJECTIVE=config.objective, LEVEL=config.importance_sampling_level,
        SEQ_MEAN=config.loss_agg_mode == "seq-mean-token-mean", SCALE=config.advantage_scale,
        CENTERED=lad and config.centered, TARGET_NORM=target_norm,
        ISW_TOKEN=rollout_is_weights is not None and weights_by_token,
        ADVANTAGE="rewards" if rewards is not None else "token" if advantages_by_token else "sequence",
    )  # fmt: skip
    if programs > 0:
        with torch.cuda.device_of(logprobs):
            _policy_kernel[(programs,)](
                *(None if x is None else x.contiguous() for x in tensors), dlogprobs, dentropy, partials, n,
                *(math.inf if x is None else float(x) for x in scalars), **options, num_warps=8,
            )  # fmt: skip
    loss, metrics = _finish(partials, lad, config.kl_coef != 0, entropy is not None)
    return loss, dlogprobs, dentropy, advantages if rewards is None else partials[-1], metrics


def _settings(config: PolicyConfig) -> list[float | None]:
    """The four numbers of the objective itself, as `divergences._policy_term` reads them; None is infinity."""
    own = [getattr(config, name) for name in SETTINGS[config.objective]]
    return own + [0.0] * (4 - len(own))


def _finish(partials: Tensor, lad: bool, ref: bool, entropy: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows [ROWS, B] of all programs -> loss and metrics, in a fixed order and without a host sync."""
    sums = partials[: len(SUMS)].sum(1)  # [SUMS]
    maxima = partials[len(SUMS) : -1].amax(1) if partials.shape[1] else partials.new_zeros(len(MAXIMA))  # [MAXIMA]
    total = dict(zip(SUMS, sums.unbind()))
    tokens = total["tokens"].clamp(min=1)  # []
    metrics = dict(zip(MEANS, (sums[2 : 2 + len(MEANS)] / tokens).unbind()))
    metrics["frac_over_target" if lad else "clip_share"] = metrics.pop("marked")
    for name in [*([] if ref else ["kl_ref"]), *([] if entropy else ["entropy"])]:
        del metrics[name]
    metrics |= zip(MAXIMA[1:], maxima[1:].unbind())
    metrics |= zip(("coef_mean_positive", "coef_mean_negative"), (sums[-4:-2] / sums[-2:].clamp(min=1)).unbind())
    metrics |= _ratios(*(partials[len(SUMS) + i] for i in _RATIO_ROWS), tokens)
    return total["loss"], metrics | {"loss_above_start": total["loss_above_start"]}


_RATIO_ROWS = (0, SUMS.index("e_sum") - len(SUMS), SUMS.index("e_squares") - len(SUMS))


def _ratios(peak: Tensor, sums: Tensor, squares: Tensor, tokens: Tensor) -> dict[str, Tensor]:  # [B], [B], [B], []
    """Mean, maximum and effective sample size of ratios; sums of them and their squares are relative to e^peak."""
    held = peak.isfinite()  # [B]
    top = torch.where(held, peak, -torch.inf).amax() if len(peak) else peak.new_full((), -torch.inf)  # []
    scale = torch.where(held, peak - top, -torch.inf).exp()  # [B]
    weight, square = (sums * scale).sum(), (squares * scale**2).sum() * tokens  # [], []
    return {
        "ratio_mean": (sums * torch.where(held, peak, 0.0).exp()).sum() / tokens,
        "ratio_max": top.exp(),
        "ess": weight**2 / torch.where(square == 0, 1.0, square),
    }
