"""Rewards to advantages: GRPO, Dr. GRPO, RLOO and batch scaling, on contiguous or ragged groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.objective.config import ADVANTAGE_SCALES, check_choice, check_number
from lad_kernels.operators import operator

EPSILON = 1e-4  # added to the standard deviation, as TRL does


@without_autocast
def group_advantages(
    rewards: Tensor,  # [B]
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    scale: str = "group",
    eps: float = EPSILON,
    impl: str = "auto",
) -> Tensor:  # [B]
    """Advantage of each completion within the group of completions that answer the same prompt.

    | scale | advantage | known as |
    |---|---|---|
    | `group` | (R - mean_group) / (std_group + eps) | GRPO, arXiv 2402.03300 Eq. 10; unbiased std |
    | `batch` | (R - mean_group) / (std_batch + eps) | arXiv 2508.08221 |
    | `none` | R - mean_group | Dr. GRPO, arXiv 2503.20783 |
    | `loo` | R - mean of the others | RLOO, arXiv 2402.14740 |

    A reward that is not finite marks an unscorable completion: it takes no part in any statistic and gets advantage
    0. So does the only scorable member of a group. Equal rewards give 0. Variances are two-pass, in float32 or wider:
    rewards of 1e6 +- 0.06 keep the digits they have, and rewards of 1e20 do not overflow.

    Args:
        rewards: [B] floating point, one per completion.
        group_size: completions per prompt, at least 2, contiguous; divides B. Give this or `group_ids`.
        group_ids: [B] integers; equal ids make a group, of any size and in any order. Alone: advantage 0.
        scale: `group`, `batch`, `none` or `loo`.
        eps: added to the standard deviation, in units of reward; above 0, or equal rewards would give 0 / 0.
        impl: `reference` runs `lad_kernels.reference`; the others share one PyTorch path here.

    Returns:
        [B] float32 (float64 for float64 rewards), on the device of `rewards`, without gradient.

    Raises:
        ValueError, TypeError: wrong rank, dtype or size; both or neither of group_size and group_ids; unknown scale.
    """
    if torch.compiler.is_compiling() and impl != "reference":
        return _operator(rewards, group_size, group_ids, scale, eps, impl)
    checks.rewards(rewards)
    check_choice("scale", scale, ADVANTAGE_SCALES)
    eps = check_number("eps", eps, 0.0, strict=True)
    checks.impl(impl)
    ids = checks.groups(len(rewards), rewards.device, group_size, group_ids)  # [B]
    if impl == "reference":
        from lad_kernels import reference

        return reference.group_advantages(rewards, group_ids=ids, scale=scale, eps=eps)
    return advantages_of(rewards, ids, scale, eps)


@operator(
    "group_advantages",
    "(Tensor rewards, SymInt? group_size, Tensor? group_ids, str scale, float eps, str impl) -> Tensor",
)
def _operator(
    rewards: Tensor, group_size: int | None, group_ids: Tensor | None, scale: str, eps: float, impl: str
) -> Tensor:
    """For torch.compile and torch.export to trace."""
    advantages = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale=scale, eps=eps, impl=impl)
    return advantages.clone() if advantages is rewards else advantages


@_operator.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.promote_types(rewards.dtype, torch.float32))


@torch.no_grad()
def advantages_of(rewards: Tensor, group_ids: Tensor, scale: str, eps: float = EPSILON) -> Tensor:
    """[B] rewards and group ids, already validated, to [B] advantages. Deterministic, no host sync."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if len(rewards) == 0:
        return rewards
    order = group_ids.argsort(stable=True)  # [B] members of a group next to each other
    group, lengths = _number_groups(group_ids[order])  # [B], [B]

    def total(x: Tensor, how: str = "sum") -> Tensor:  # [B] -> [B]: the sum or maximum over each member's group
        return torch.segment_reduce(x, how, lengths=lengths, unsafe=True)[group]

    scorable = rewards[order].isfinite()  # [B]
    r = torch.where(scorable, rewards[order], 0.0)  # [B]
    count = total(scorable.to(r.dtype))  # [B]
    centred = torch.where(scorable, r - total(r) / count.clamp(min=1), 0.0)  # [B]
    # The second time removes the rounding error of the mean.
    centred = torch.where(scorable, centred - total(centred) / count.clamp(min=1), 0.0)  # [B]
    if scale == "group":
        unit = total(centred.abs(), "max")  # [B] deviations of 1e20 have no square in float32
        centred = centred / (_deviation(unit, total(_scaled(centred, unit).square()), count) + eps)
    elif scale == "batch":
        scored = scorable.sum().to(r.dtype)  # []
        around_batch = r  # [B]
        for _ in range(2):  # likewise
            around_batch = torch.where(scorable, around_batch - around_batch.sum() / scored.clamp(min=1), 0.0)  # [B]
        unit = around_batch.abs().amax()  # []
        centred = centred / (_deviation(unit, _scaled(around_batch, unit).square().sum(), scored) + eps)
    elif scale == "loo":
        centred = centred * count / (count - 1).clamp(min=1)
    return torch.empty_like(r).index_copy(0, order, centred.masked_fill(count < 2, 0.0))


def _scaled(x: Tensor, unit: Tensor) -> Tensor:
    """x / unit, 0 where unit is 0."""
    return x / torch.where(unit == 0, 1.0, unit)


def _deviation(unit: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Unbiased standard deviation of `count` values whose squares, in `unit`, sum to `squares`."""
    return unit * (squares / (count - 1).clamp(min=1)).sqrt()


def _number_groups(sorted_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted ids [B] to (number of each member's group [B], members of each number [B], zeros at the end)."""
    first = torch.ones_like(sorted_ids)  # [B] 1 where a group begins
    first[1:] = sorted_ids[1:] != sorted_ids[:-1]
    number = first.cumsum(0) - 1  # [B]
    return number, torch.zeros_like(number).index_add(0, number, torch.ones_like(number))


@torch.no_grad()
def group_log_mean_exp(u: Tensor, group_ids: Tensor) -> Tensor:
    """[B] -> [B]: log of the mean of e^u over each member's group."""
    if len(u) == 0:
        return u
    order = group_ids.argsort(stable=True)  # [B]
    group, lengths = _number_groups(group_ids[order])  # [B], [B]
    top = torch.segment_reduce(u[order], "max", lengths=lengths, unsafe=True)[group]  # [B]
    mass = torch.segment_reduce((u[order] - top).exp(), "sum", lengths=lengths, unsafe=True)[group]  # [B]
    return torch.empty_like(u).index_copy(0, order, top + (mass / lengths[group]).log())
