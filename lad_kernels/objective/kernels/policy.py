"""The objective in two Triton launches: rewards or advantages and log-probs -> loss, d loss / d logp, metrics.

Mathematics: divergences.py has the terms of one token, advantages.py the statistics of a group.

Layout. One program per sequence (per 4,096 tokens if there are no sequences), tokens in blocks of 256:
  1. rewards, target_norm: passes over all B values, comparing group ids;
  2. a pass that counts who takes part, with the sequence levels' log r; there also a pass for the gradient that all
     tokens of the sequence share;
  3. a pass for the loss, the metrics and d loss / d logp.
Each program writes one column of partials [ROWS, B], which a second kernel of one program reduces: deterministic, no
host sync, two launches for loss, gradient and metrics.
A chunk is the same launch on its tokens, with group statistics and lengths that `prepare` has computed before.

Exact: ratio 1 where both log-probs are equal (also both -inf), gradient 0 where a clamp or clip holds, A = 0 in a group
of one or of equal rewards; the rest to a few ulp of fp32 per token, beyond the rounding of d and u themselves.
Cost: two to three reads of the [M] tensors and, with groups, B^2 rewards out of cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.objective.config import DIVERGENCES, SETTINGS, PolicyConfig
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels.advantages import _advantage, group_statistics
from lad_kernels.objective.kernels.divergences import _exp, _exps, _minus, _policy_term
from lad_kernels.objective.policy import PolicyTerms, metric_names

SEGMENT = tl.constexpr(4096)  # tokens per program where there are no sequences
BLOCK = tl.constexpr(256)  # tokens per step: one per thread at 8 warps, which ptxas fits without spills

# Rows of the partial results [ROWS, B]: sums over the tokens of a sequence, largest values, the sequence's advantage.
LOSS, ABOVE_START, OVER, CLIPPED, CLAMPED, ZEROS, K1, K3, KL, ENTROPY = map(tl.constexpr, range(10))
RATIOS, SQUARES, TOKENS, POSITIVE_SIZE, NEGATIVE_SIZE, POSITIVE, NEGATIVE = map(tl.constexpr, range(10, 17))
PEAK, POSITIVE_MAX, NEGATIVE_MAX, USED_ADVANTAGE = map(tl.constexpr, range(17, 21))
ROWS = 21
# What `_finish_kernel` makes of them [OUTPUTS]: the first rows over the tokens that take part, but LOSS and ABOVE_START
# as they are, the largest values in their rows, and in the place of others and behind them:
POSITIVE_MEAN, NEGATIVE_MEAN, RATIO_MEAN, RATIO_MAX, ESS = map(tl.constexpr, (11, 12, 20, 21, 22))
OUTPUTS = 23
PADDED, COLUMNS = tl.constexpr(32), tl.constexpr(64)  # a tile of the partials
# Metrics of every objective, and of some.
MEANS = {"clamp_share": CLAMPED, "zero_coef_share": ZEROS, "approx_kl_k1": K1, "approx_kl_k3": K3}
DERIVED = {
    "coef_mean_positive": POSITIVE_MEAN,
    "coef_mean_negative": NEGATIVE_MEAN,
    "coef_max_positive": POSITIVE_MAX,
    "coef_max_negative": NEGATIVE_MAX,
    "ratio_mean": RATIO_MEAN,
    "ratio_max": RATIO_MAX,
    "ess": ESS,
    "loss_above_start": ABOVE_START,
}
OF_SOME = {"frac_over_target": OVER, "clip_share": CLIPPED, "kl_ref": KL, "entropy": ENTROPY}


@triton.jit
def _load_tokens(tokens, t0, end, ADVANTAGE: tl.constexpr, ISW_TOKEN: tl.constexpr):
    """Index, who takes part, logp and log ratio (0 where not), advantage, rollout weight of a block; all [BLOCK]."""
    logprobs, old, source, isw, adv, isw_s, usable = tokens
    t = t0 + tl.arange(0, BLOCK)  # [BLOCK], as all that follow
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
    logprobs,  # [M]
    old,  # [M]; None: ratio exactly 1
    source,  # by ADVANTAGE: [M] token; [B] sequence, or rewards if it is their scale; [2, B] shifted: adv, shift
    groups,  # [B] ids of the groups; None: not needed
    cu_seqlens,  # [B + 1]; None: SEGMENT tokens per program, everything per token
    ref,  # [M]; None: no KL term
    entropy,  # [M]; None: not measured
    isw,  # rollout weights [M] if ISW_TOKEN, else [B]; None: 1
    normalizer,  # by DIVISOR: [] batch, or length (times the tokens of the sequence); [B] sequence, that product
    usable,  # [M] False: takes no part; None: all do
    dlogprobs,  # [M] out
    dentropy,  # [M] out; None: no entropy term
    partials,  # [ROWS, B] out
    N,  # M, read where there are no sequences
    ratio_clamp,  # infinity: none, as for all bounds
    kl_coef,
    kl_clamp,
    entropy_coef,
    setting0,  # of the objective, see `divergences._policy_term`
    setting1,
    setting2,
    setting3,
    OBJECTIVE: tl.constexpr,  # a divergence or a policy loss
    LEVEL: tl.constexpr,  # of the ratio: token, sequence or sequence_sum
    DIVISOR: tl.constexpr,  # see normalizer
    CENTERED: tl.constexpr,
    CLIPS: tl.constexpr,
    TARGET_NORM: tl.constexpr,
    ADVANTAGE: tl.constexpr,  # see source
    ISW_TOKEN: tl.constexpr,
):
    """One sequence: advantage, log ratio, loss, gradient, row sums."""
    s = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    if cu_seqlens is None:
        start = s * SEGMENT
        end = tl.minimum(start + SEGMENT, N)
    else:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    adv, shift = 0.0, 0.0  # [], []
    if ADVANTAGE == "shifted":
        adv, shift = tl.load(source + s), tl.load(source + B + s)
    elif ADVANTAGE != "token":
        adv, shift = _advantage(source, groups, s, setting0, B, ADVANTAGE, ADVANTAGE != "sequence", TARGET_NORM)
    isw_s = 1.0 if isw is None or ISW_TOKEN else tl.load(isw + s)  # []
    tokens = (logprobs, old, source, isw, adv, isw_s, usable)
    settings = (setting0, setting1, setting2, setting3)
    zero = tl.zeros([BLOCK], tl.float32)  # [BLOCK]

    level_d, level_c = zero, zero  # [BLOCK] sums of log ratios and of gradients, then the level's own, the same in all
    members, peak = zero, zero - float("inf")  # [BLOCK] tokens that take part, largest log ratio
    for t0 in range(start, end, BLOCK):
        t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
        level_d += d
        members += tl.where(mask, 1.0, 0.0)
        peak = tl.maximum(peak, tl.where(mask, d, -float("inf")))
    length = tl.maximum(tl.sum(members), 1.0)  # []
    divisor = tl.load(normalizer + (s if DIVISOR == "sequence" else 0))  # []
    weight = 1.0 / (divisor * (length if DIVISOR == "length" else 1.0))  # []
    shared: tl.constexpr = LEVEL != "token" and OBJECTIVE != "vespo"  # whether d reaches the loss through the sequence
    if LEVEL != "token":  # log ratio and d loss / d logp, the same for all tokens of the sequence
        share = 1.0 / length if LEVEL == "sequence" else 1.0  # []
        level_d = tl.sum(level_d) * share + zero
        peak = tl.where(peak == -float("inf"), peak, level_d)
    if shared:
        for t0 in range(start, end, BLOCK):
            t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
            d, loss, c, stopped, above, over, clipped, clamped = _policy_term(
                logp, level_d, d, a, shift, ratio_clamp, settings, OBJECTIVE, CENTERED, CLIPS
            )
            level_c += tl.where(mask & ~stopped, weight * rollout * c, 0.0)
        level_c = tl.sum(level_c) * share + zero

    peak = tl.max(peak)  # [] the largest log ratio as used; -inf: none, or no ratio above 0
    peak = tl.where(tl.sum(members) > 0.0, tl.minimum(tl.maximum(peak, -ratio_clamp), ratio_clamp), peak)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # [] no power of a ratio relative to it overflows
    loss_sum, above_sum = zero, zero  # [BLOCK] of the loss, and of what it has moved since ratio 1
    e_sum, e_squares = zero, zero  # [BLOCK] of ratios relative to e^base
    over_sum, clipped_sum, clamped_sum, zeros = zero, zero, zero, zero  # [BLOCK] counts of tokens
    k1, k3, kl_sum, entropy_sum = zero, zero, zero, zero  # [BLOCK]
    up_sum, up_count, up_max = zero, zero, zero  # [BLOCK] of abs(c) where A > 0
    down_sum, down_count, down_max = zero, zero, zero  # [BLOCK] where A < 0
    for t0 in range(start, end, BLOCK):
        t, mask, logp, d, a, rollout = _load_tokens(tokens, t0, end, ADVANTAGE, ISW_TOKEN)
        k1 -= d
        k3 += _exps(d)[2]
        own = d  # [BLOCK], as all in this loop
        d = d if LEVEL == "token" else level_d
        d, loss, c, stopped, above, over, clipped, clamped = _policy_term(
            logp, d, own, a, shift, ratio_clamp, settings, OBJECTIVE, CENTERED, CLIPS
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
        over_sum += tl.where(mask & over, 1.0, 0.0)
        if CLIPS:
            clipped_sum += tl.where(mask & clipped, 1.0, 0.0)
        clamped_sum += tl.where(mask & clamped, 1.0, 0.0)
        zeros += tl.where(mask & (gradient == 0.0), 1.0, 0.0)
        up_sum += up_size
        up_count += tl.where(up, 1.0, 0.0)
        up_max = tl.maximum(up_max, up_size)
        down_sum += down_size
        down_count += tl.where(down, 1.0, 0.0)
        down_max = tl.maximum(down_max, down_size)

    row = partials + s  # all that is stored is []
    tl.store(row + B * LOSS, tl.sum(loss_sum))
    tl.store(row + B * ABOVE_START, tl.sum(above_sum))
    tl.store(row + B * OVER, tl.sum(over_sum))
    tl.store(row + B * CLIPPED, tl.sum(clipped_sum))
    tl.store(row + B * CLAMPED, tl.sum(clamped_sum))
    tl.store(row + B * ZEROS, tl.sum(zeros))
    tl.store(row + B * K1, tl.sum(k1))
    tl.store(row + B * K3, tl.sum(k3))
    tl.store(row + B * KL, tl.sum(kl_sum))
    tl.store(row + B * ENTROPY, tl.sum(entropy_sum))
    tl.store(row + B * RATIOS, tl.sum(e_sum))
    tl.store(row + B * SQUARES, tl.sum(e_squares))
    tl.store(row + B * TOKENS, tl.sum(members))
    tl.store(row + B * POSITIVE_SIZE, tl.sum(up_sum))
    tl.store(row + B * NEGATIVE_SIZE, tl.sum(down_sum))
    tl.store(row + B * POSITIVE, tl.sum(up_count))
    tl.store(row + B * NEGATIVE, tl.sum(down_count))
    tl.store(row + B * PEAK, peak)
    tl.store(row + B * POSITIVE_MAX, tl.max(up_max))
    tl.store(row + B * NEGATIVE_MAX, tl.max(down_max))
    tl.store(row + B * USED_ADVANTAGE, adv)


@triton.jit
def _pick(values, rows, row):
    """values[row], of [PADDED]."""
    return tl.sum(tl.where(rows == row, values, 0.0))


@triton.jit(do_not_specialize=["B"])
def _finish_kernel(
    partials,  # [ROWS, B]
    out,  # [OUTPUTS] out
    B,
):
    """Sums and largest values over all programs. Sums of ratios and of their squares are relative to e^peak."""
    rows, columns = tl.arange(0, PADDED), tl.arange(0, COLUMNS)  # [PADDED], [COLUMNS]
    tops = tl.full([COLUMNS], -float("inf"), tl.float32)  # [COLUMNS] the largest log ratio
    for first in range(0, B, COLUMNS):
        peak = tl.load(partials + PEAK * B + first + columns, first + columns < B, other=-float("inf"))  # [COLUMNS]
        tops = tl.maximum(tops, tl.where(tl.abs(peak) < float("inf"), peak, -float("inf")))
    top = tl.max(tops)  # []
    sums = tl.zeros([PADDED, COLUMNS], tl.float32)  # [PADDED, COLUMNS]
    maxima = tl.zeros([PADDED, COLUMNS], tl.float32)  # [PADDED, COLUMNS]
    ratios, weights, squares = tl.zeros_like(tops), tl.zeros_like(tops), tl.zeros_like(tops)  # [COLUMNS] each
    for first in range(0, B, COLUMNS):
        at, inside = first + columns, first + columns < B  # [COLUMNS]
        mask = (rows < PEAK + 3)[:, None] & inside[None, :]  # [PADDED, COLUMNS]
        tile = tl.load(partials + rows[:, None] * B + at[None, :], mask=mask, other=0.0)  # [PADDED, COLUMNS]
        sums += tile
        maxima = tl.maximum(maxima, tile)
        peak = tl.load(partials + PEAK * B + at, mask=inside, other=-float("inf"))  # [COLUMNS], as all that follow
        held = tl.abs(peak) < float("inf")
        e = tl.load(partials + RATIOS * B + at, mask=inside, other=0.0)
        ratios += e * _exp(tl.where(held, peak, 0.0))
        scale = _exp(tl.where(held, peak - top, -float("inf")))
        weights += e * scale
        squares += tl.load(partials + SQUARES * B + at, mask=inside, other=0.0) * (scale * scale)
    total, largest = tl.sum(sums, axis=1), tl.max(maxima, axis=1)  # [PADDED], [PADDED]
    tokens = tl.maximum(_pick(total, rows, TOKENS), 1.0)  # []
    kept = (rows == LOSS) | (rows == ABOVE_START)  # [PADDED]
    tl.store(out + rows, tl.where(kept, total, total / tokens), mask=rows < POSITIVE_MEAN)
    positive, negative = tl.maximum(_pick(total, rows, POSITIVE), 1.0), tl.maximum(_pick(total, rows, NEGATIVE), 1.0)
    tl.store(out + POSITIVE_MEAN, _pick(total, rows, POSITIVE_SIZE) / positive)
    tl.store(out + NEGATIVE_MEAN, _pick(total, rows, NEGATIVE_SIZE) / negative)
    tl.store(out + rows, largest, mask=(rows == POSITIVE_MAX) | (rows == NEGATIVE_MAX))
    weight, square = tl.sum(weights), tl.sum(squares) * tokens  # [], []
    tl.store(out + RATIO_MEAN, tl.sum(ratios) / tokens)
    tl.store(out + RATIO_MAX, _exp(top))
    tl.store(out + ESS, weight * weight / tl.where(square == 0.0, 1.0, square))


def prepare(inputs: PackedInputs, config: Any) -> PackedInputs:
    """Advantages and group statistics, which do not depend on log-probs."""
    advantages, shift = inputs.advantages, None  # [B] or [M], [B]
    if inputs.rewards is not None or config.norms_target:
        eta, scale = config.eta if config.norms_target else 1.0, config.advantage_scale
        advantages, shift = group_statistics(
            inputs.rewards, advantages, inputs.group_ids, scale=scale, eta=eta, target_norm=config.norms_target
        )
    return inputs.with_advantages(advantages, shift if config.norms_target else None)


def coefficients(logprobs: Tensor, inputs: PackedInputs, config: PolicyConfig) -> Tensor:  # [C] -> [C]
    """d loss / d logprob of a chunk whose inputs are prepared; its row sums are discarded."""
    return _launch(logprobs, None, inputs, config)[0]


def policy_terms(
    logprobs: Tensor,  # [M] fp32
    entropy: Tensor | None,  # [M]
    inputs: PackedInputs,
    config: PolicyConfig,
) -> PolicyTerms:
    """The objective of all tokens."""
    dlogprobs, dentropy, partials = _launch(logprobs, entropy, inputs, config)  # [M], [M], [ROWS, B]
    loss, metrics = _finish(partials, config, entropy is not None)
    advantages = partials[USED_ADVANTAGE.value] if inputs.advantages is None else inputs.advantages
    return PolicyTerms(loss, dlogprobs, dentropy, advantages, metrics)


def _launch(
    logprobs: Tensor,  # [M]
    entropy: Tensor | None,  # [M]
    inputs: PackedInputs,
    config: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d loss / d logp [M], d loss / d entropy [M] or None, partial results [ROWS, B]."""
    tokens, cu_seqlens, normalizer = len(logprobs), inputs.cu_seqlens, inputs.normalizer
    programs = -(-tokens // SEGMENT.value) if cu_seqlens is None else len(cu_seqlens) - 1  # B
    new = torch.empty_like if inputs.usable is None else torch.zeros_like  # the kernel writes where tokens take part
    dlogprobs = new(logprobs)  # [M]
    dentropy = new(logprobs) if entropy is not None and config.entropy_coef != 0 else None  # [M]
    partials = logprobs.new_empty(ROWS, programs)
    source, advantage = _source(inputs, config)
    divisor = "length" if config.loss_agg_mode == "seq-mean-token-mean" else "batch"
    if divisor == "length" and inputs.prepared:  # a chunk may hold a part of a sequence
        divisor, normalizer = "sequence", normalizer * inputs.lengths.clamp(min=1)  # [B]
    grouped = not inputs.prepared and (inputs.rewards is not None or config.norms_target)
    tensors = (
        logprobs,
        inputs.old_logprobs,
        source,
        inputs.group_ids if grouped else None,
        cu_seqlens,
        inputs.ref_logprobs if config.kl_coef != 0 else None,
        entropy,
        inputs.rollout_is_weights,
        normalizer,
        inputs.usable,
    )
    settings = [getattr(config, name) for name in SETTINGS[config.objective]]
    settings += [0.0] * (4 - len(settings))  # as `divergences._policy_term` reads them
    scalars = (config.log_ratio_clamp, config.kl_coef, config.kl_clamp, config.entropy_coef, *settings)
    if programs > 0:
        with torch.cuda.device_of(logprobs):
            _policy_kernel[(programs,)](
                *(None if x is None else x.contiguous() for x in tensors),
                dlogprobs,
                dentropy,
                partials,
                tokens,
                *(math.inf if x is None else float(x) for x in scalars),  # None: no bound
                OBJECTIVE=config.objective,
                LEVEL=config.importance_sampling_level,
                DIVISOR=divisor,
                CENTERED=config.objective in DIVERGENCES and config.centered,
                CLIPS=config.clips,
                TARGET_NORM=config.norms_target,
                ADVANTAGE=advantage,
                ISW_TOKEN=inputs.rollout_is_weights is not None and inputs.weights_by_token,
                num_warps=8,
            )
    return dlogprobs, dentropy, partials


def _source(inputs: PackedInputs, config: PolicyConfig) -> tuple[Tensor, str]:
    """What the kernel reads advantages from, and its ADVANTAGE."""
    if inputs.rewards is not None:
        return inputs.rewards, config.advantage_scale  # [B]
    if inputs.shift is not None:
        return torch.stack([inputs.advantages, inputs.shift]), "shifted"  # [2, B]
    return inputs.advantages, "token" if inputs.advantages_by_token else "sequence"  # [M] or [B]


def _finish(partials: Tensor, config: PolicyConfig, has_entropy: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows [ROWS, B] of all programs -> loss and metrics, in a fixed order and without a host sync."""
    programs = partials.shape[1]
    out = (partials.new_empty if programs else partials.new_zeros)(OUTPUTS)  # [OUTPUTS]
    if programs:
        with torch.cuda.device_of(partials):
            _finish_kernel[(1,)](partials, out, programs, num_warps=8)
    values, names = out.unbind(), metric_names(config, entropy=has_entropy)  # [] each
    rows = MEANS | DERIVED | OF_SOME
    return values[LOSS.value], {name: values[row.value] for name, row in rows.items() if name in names}
