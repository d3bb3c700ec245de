"""Group advantages in Triton: one sequence's, and log mean e^u over its group, from all rewards of the batch.

`_policy_kernel` computes them itself, in one launch for everything; where the objective runs in chunks,
`group_statistics` computes them before the first.
Rewards are taken relative to the program's own reward before any sum, so equal rewards give exactly 0 and 100 +- 0.01
keeps its digits; every scale is A_j = (R_j - mean) * factor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.objective.kernels.divergences import _exp

GROUP_BLOCK = tl.constexpr(256)  # rewards per step of the group statistics
STD_EPS = tl.constexpr(1e-4)  # added to the standard deviation of rewards, as TRL does


@triton.jit
def _moments(
    source,  # [B] rewards or advantages
    groups,  # [B] ids of the groups
    own,  # [] what the values are relative to, the program's own
    own_group,  # []
    centre,  # [] of deviations, relative to `own`
    unit,  # [] of squares
    slope,  # [] of exponents
    B,
    WHOLE: tl.constexpr,
):
    """Over the group (the batch if WHOLE): members, and of the finite values x relative to `own`: count, sum, maximum,
    largest abs(x - centre), sum of ((x - centre) / unit)^2, sum of e^(slope (x - centre)). All []."""
    members = tl.zeros([GROUP_BLOCK], tl.float32)  # [GROUP_BLOCK], as are the others
    count, total, squares, mass, top, far = members, members, members, members, members - float("inf"), members
    for j0 in range(0, B, GROUP_BLOCK):
        j = j0 + tl.arange(0, GROUP_BLOCK)  # [GROUP_BLOCK]
        member = j < B
        x = tl.load(source + j, mask=member, other=0.0)  # [GROUP_BLOCK]
        if not WHOLE:
            member = member & (tl.load(groups + j, mask=member, other=0) == own_group)
        chosen = member & (tl.abs(x) < float("inf"))  # False for NaN too
        x = tl.where(chosen, x - own, 0.0)
        members += tl.where(member, 1.0, 0.0)
        count += tl.where(chosen, 1.0, 0.0)
        total += x
        top = tl.maximum(top, tl.where(chosen, x, -float("inf")))
        apart = tl.where(chosen, x - centre, 0.0)
        far = tl.maximum(far, tl.abs(apart))
        squares += (apart / unit) * (apart / unit)
        mass += tl.where(chosen, _exp((x - centre) * slope), 0.0)
    return tl.sum(members), tl.sum(count), tl.sum(total), tl.max(top), tl.max(far), tl.sum(squares), tl.sum(mass)


@triton.jit
def _advantage(
    source,  # [B] rewards if REWARDS, else advantages
    groups,  # [B] ids of the groups; None: not needed
    s,  # [] the sequence
    eta,  # []
    B,
    SCALE: tl.constexpr,  # of rewards: group, batch, none or loo
    REWARDS: tl.constexpr,
    TARGET_NORM: tl.constexpr,
):
    """The sequence's advantage, and log mean e^u over its group, u = 0 where unscorable (0 unless TARGET_NORM)."""
    adv = tl.load(source + s)  # []
    own_group = 0 if groups is None else tl.load(groups + s)  # []
    own, mean, factor, shift = 0.0, 0.0, 1.0, 0.0
    if REWARDS:
        scorable = tl.abs(adv) < float("inf")
        own = tl.where(scorable, adv, 0.0)
        _, n, total, _, _, _, _ = _moments(source, groups, own, own_group, 0.0, 1.0, 0.0, B, False)
        mean = total / tl.maximum(n, 1.0)
        centre = mean
        if SCALE == "loo":
            factor = n / tl.maximum(n - 1.0, 1.0)  # R - mean of the others = (R - mean) n / (n - 1)
        if SCALE == "batch":
            _, n, total, _, _, _, _ = _moments(source, groups, own, own_group, 0.0, 1.0, 0.0, B, True)
            centre = total / tl.maximum(n, 1.0)
        if SCALE == "group" or SCALE == "batch":  # in units of the largest: deviations of 1e20 have no square
            _, n, _, _, unit, _, _ = _moments(source, groups, own, own_group, centre, 1.0, 0.0, B, SCALE == "batch")
            unit = tl.where(unit > 0.0, unit, 1.0)
            _, n, _, _, _, squares, _ = _moments(source, groups, own, own_group, centre, unit, 0.0, B, SCALE == "batch")
            factor = 1.0 / (unit * tl.sqrt(squares / tl.maximum(n - 1.0, 1.0)) + STD_EPS)
        adv = tl.where(scorable, -mean * factor, 0.0)
    if TARGET_NORM:
        members, n, _, top, _, _, _ = _moments(source, groups, own, own_group, 0.0, 1.0, 0.0, B, False)
        top = tl.where(n > 0.0, top, 0.0)
        _, _, _, _, _, _, mass = _moments(source, groups, own, own_group, top, 1.0, factor / eta, B, False)
        highest = (top - mean) * factor / eta
        shift = highest + tl.log((mass + (members - n) * _exp(-highest)) / members)
    return adv, shift


@triton.jit
def _group_kernel(
    source,  # [B] rewards if REWARDS, else advantages
    groups,  # [B]
    statistics,  # [2, B] out: advantage, log mean e^u
    eta,
    SCALE: tl.constexpr,
    REWARDS: tl.constexpr,
    TARGET_NORM: tl.constexpr,
):
    """One sequence."""
    s = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    adv, shift = _advantage(source, groups, s, eta, B, SCALE, REWARDS, TARGET_NORM)
    tl.store(statistics + s, adv)
    tl.store(statistics + B + s, shift)


def group_statistics(
    rewards: Tensor | None,  # [B]
    advantages: Tensor | None,  # [B]; exactly one of both
    group_ids: Tensor,  # [B] integers
    *,
    scale: str,
    eta: float,
    target_norm: bool,
) -> Tensor:  # [2, B]
    """Advantages, and log mean e^u over each one's group (0 unless target_norm)."""
    source = (advantages if rewards is None else rewards).contiguous()  # [B]
    statistics = source.new_empty(2, len(source))
    if len(source):
        with torch.cuda.device_of(source):
            _group_kernel[(len(source),)](
                source,
                group_ids.contiguous(),
                statistics,
                float(eta),
                SCALE=scale,
                REWARDS=rewards is not None,
                TARGET_NORM=target_norm,
                num_warps=8,  # those of `_policy_kernel`: its sums have the same order
            )
    return statistics
