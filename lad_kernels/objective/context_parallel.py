"""Batches that are distributed over processes: context parallelism, global normalisers, groups on several ranks.

Every function is collective: all ranks of the group call it, those without a single loss token too. A loss here is this
rank's share: summed over the ranks, losses and gradients are those of one process with the whole batch. DDP and FSDP
*average* gradients over their W ranks, so multiply the loss by W (or divide the normalizer by W).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lad_kernels.objective.advantages import group_advantages
from lad_kernels.objective.config import LADConfig, PolicyConfig
from lad_kernels.objective.inputs import PolicyInputs
from lad_kernels.objective.losses import policy_loss
from lad_kernels.outputs import LossOutput
from lad_kernels.packing import sequence_of

PER_TOKEN = ("old_logprobs", "loss_mask", "ref_logprobs", "entropy")  # of PolicyInputs, as `logprobs` is


class ContextShard(NamedTuple):
    """One rank's consecutive tokens of a batch; S = ceil(T / ranks), the tail of the last rank is masked padding."""

    input_ids: Tensor  # [B, S] or [S]
    target_ids: Tensor  # same shape: the token that follows, also across the rank's last position
    loss_mask: Tensor  # same shape, bool: whether that target is a loss token
    sequence_ids: Tensor | None  # [S] int64, ascending, of packed input


def shard_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's slice along the last dimension, [..., T] -> [..., S], padded with zeros to equal slices.

    For tensors with one value per token: position ids, old log-probs (shifted as the targets are), rollout weights.
    """
    ranks = dist.get_world_size(group)
    size = -(-x.shape[-1] // ranks)
    x = torch.nn.functional.pad(x, (0, size * ranks - x.shape[-1]))  # [..., S * ranks]
    return x.narrow(-1, dist.get_rank(group) * size, size)


def shift_and_shard(
    input_ids: Tensor,  # [B, T] or packed [N]
    loss_mask: Tensor,  # same shape
    group: dist.ProcessGroup,
    *,
    cu_seqlens: Tensor | None = None,  # [B + 1], of packed input
) -> ContextShard:
    """Shift the whole batch, then cut it, so that the target of a rank's last token is kept.

    Args:
        input_ids: the same on every rank of the group, padded [B, T] or packed [N].
        loss_mask: nonzero where the token *itself* is a loss token (a completion's); shifted here with the targets.
        group: ranks that hold consecutive slices of the same sequences.
        cu_seqlens: int [B + 1] cumulative lengths of packed input; the first token of a sequence is never a target.

    Raises:
        ValueError: shapes do not fit together.
    """
    if loss_mask.shape != input_ids.shape or (input_ids.ndim == 1) != (cu_seqlens is not None):
        raise ValueError(
            f"input_ids, loss_mask, cu_seqlens: expected [B, T] twice, or packed [N] twice with cu_seqlens, got "
            f"{list(input_ids.shape)}, {list(loss_mask.shape)} and "
            f"{None if cu_seqlens is None else list(cu_seqlens.shape)}"
        )
    first = torch.zeros_like(input_ids, dtype=torch.bool)  # [B, T] where a sequence begins
    sequence_ids = None
    if cu_seqlens is None:
        first[:, :1] = True
    else:
        lengths = cu_seqlens.diff().long()  # [B]
        first[cu_seqlens[:-1][lengths > 0].long()] = True
        first[int(cu_seqlens[-1]) :] = True  # the padding behind the last bound is nobody's target
        sequence_ids = sequence_of(len(input_ids), cu_seqlens)  # [N]
        sequence_ids = shard_tokens(sequence_ids + 1, group) - 1  # padding gets -1 ...
        sequence_ids = torch.where(sequence_ids < 0, len(lengths) - 1, sequence_ids)  # ... and joins the last sequence
    shifted = ((loss_mask != 0) & ~first).roll(-1, -1)
    ids, targets, mask = (shard_tokens(x, group) for x in (input_ids, input_ids.roll(-1, -1), shifted))
    return ContextShard(ids, targets, mask, sequence_ids)


def context_parallel_loss(
    logprobs: Tensor,  # [B, S] or packed [S]
    old_logprobs: Tensor | None,  # same shape
    advantages: Tensor,  # [B]
    *,
    group: dist.ProcessGroup,
    loss_mask: Tensor | None = None,  # the shape of logprobs
    sequence_ids: Tensor | None = None,  # [S], of packed input
    config: PolicyConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of logprobs
    entropy: Tensor | None = None,  # the shape of logprobs
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of logprobs
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    impl: str = "auto",
) -> LossOutput:
    """`lad_loss` or `grpo_loss` (by the config) of sequences whose tokens are sharded over the ranks of `group`.

    The one collective is an all-reduce of three numbers per sequence (log-ratio, tokens, rollout weight); it is
    skipped where nothing needs it: token level, not seq-mean-token-mean, normalizer given. A sequence-level gradient is
    then local, since it is the same number for all tokens of a sequence.

    Args:
        logprobs, old_logprobs, loss_mask, ref_logprobs, entropy: this rank's tokens; any number, 0 too.
        advantages: one per sequence, the same on every rank, as are `config`, `normalizer`, `group_size`, `group_ids`.
        sequence_ids: int64 [S], ascending, numbers of the sequences; as `shift_and_shard` returns them.
        normalizer: as for `lad_loss`, of the global batch; None: that of this group's batch.
        rollout_is_weights: constants, one per token of this rank, or with padded input one per sequence.

    Returns:
        LossOutput: `loss` is this rank's share, metrics are of this rank's tokens alone.

    Raises:
        ValueError: shapes that do not fit; seq-mean-token-sum-norm without a normalizer; `policy_loss` vespo or luspo.
    """
    given = PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        rollout_is_weights=rollout_is_weights,
    )
    _check(logprobs, given, sequence_ids, config)
    if sequence_ids is None:
        return _padded_loss(logprobs, given, config, group, impl)
    lengths = sequence_ids.bincount(minlength=len(advantages))  # [B]
    position = torch.arange(len(logprobs), device=lengths.device) - (lengths.cumsum(0) - lengths)[sequence_ids]  # [S]
    index = sequence_ids, position

    def pad(x: Tensor | None) -> Tensor | None:  # [S] -> [B, longest]
        return None if x is None else x.new_zeros(len(lengths), int(lengths.max())).index_put(index, x)

    given = given._replace(loss_mask=torch.ones_like(sequence_ids) if loss_mask is None else loss_mask)
    padded: dict[str, Any] = {name: pad(getattr(given, name)) for name in (*PER_TOKEN, "rollout_is_weights")}
    out = _padded_loss(pad(logprobs), given._replace(**padded), config, group, impl)
    return out._replace(logprobs=out.logprobs[index], entropy=None if entropy is None else out.entropy[index])


def _padded_loss(
    logprobs: Tensor, given: PolicyInputs, config: PolicyConfig, group: dist.ProcessGroup, impl: str
) -> LossOutput:
    """`context_parallel_loss` of checked, padded tensors: logprobs and all per token [B, S]."""
    old_logprobs, ref_logprobs, normalizer = given.old_logprobs, given.ref_logprobs, given.normalizer
    level, mode = config.importance_sampling_level, config.loss_agg_mode
    logp = logprobs.detach().to(torch.promote_types(logprobs.dtype, torch.float32))
    chosen = torch.ones_like(logp, dtype=torch.bool) if given.loss_mask is None else given.loss_mask != 0  # [B, S]
    weights = torch.ones_like(logp)  # [B, S]
    if given.rollout_is_weights is not None:
        weights = given.rollout_is_weights.detach()
        weights = (weights if weights.ndim == 2 else weights[:, None]).expand_as(logp)
    keep = chosen & weights.isfinite()  # [B, S] what lad_loss would keep: at sequence levels it gets other numbers
    for x in (old_logprobs, ref_logprobs if config.kl_coef != 0 else None):
        keep = keep if x is None else keep & x.detach().isfinite()
    d = torch.zeros_like(logp)  # [B, S] log-ratio, 0 where masked or equal, -inf included
    if old_logprobs is not None:
        d = torch.where(keep & (logp != old_logprobs), logp - old_logprobs.detach(), 0.0)
    sums = torch.stack([torch.where(keep, x, 0.0).double().sum(1) for x in (d, torch.ones_like(d), weights)])  # [3, B]
    if level != "token" or mode == "seq-mean-token-mean" or normalizer is None:
        dist.all_reduce(sums, group=group)
    counts = sums[1].clamp(min=1)  # [B]
    if normalizer is None:
        normalizer = (sums[1].sum() if mode == "token-mean" else (sums[1] > 0).sum()).clamp(min=1)
    share = (1 / counts if mode == "seq-mean-token-mean" else torch.ones_like(counts))[:, None].to(logp)  # [B, 1]
    new, old = logprobs, old_logprobs
    if level != "token":  # the sequence's own log-ratio at every token, with the gradient that reaches each of them
        total, slope = (sums[0], counts) if level == "sequence_sum" else (sums[0] / counts, torch.ones_like(counts))
        change = torch.where(logprobs.isfinite(), logprobs - logprobs.detach(), 0.0)  # [B, S] zeros with a gradient
        total = total[:, None].to(logp)  # [B, 1], new - old below, exactly; as log-probs neither may be above 0
        new = torch.where(total > 0, 0.0, total) + slope[:, None].to(logp) * change
        old = None if old_logprobs is None else torch.where(total > 0, -total, 0.0).expand_as(logp)
        weights = (sums[2] / counts)[:, None].to(logp).expand_as(logp)
    own = given._replace(old_logprobs=old, loss_mask=keep, normalizer=normalizer, rollout_is_weights=weights * share)
    local = replace(
        config, importance_sampling_level="token", loss_agg_mode="token-mean", kl_coef=0.0, entropy_coef=0.0
    )  # type: ignore[type-var]
    out = policy_loss(new, own._replace(ref_logprobs=None, entropy=None), local, impl)
    loss, metrics, many = out.loss, out.metrics, keep.sum().clamp(min=1)
    metrics["nonfinite_share"] = (chosen & ~keep).sum() / chosen.sum().clamp(min=1)
    each = (share / normalizer).expand_as(logp)[keep]  # [M] weight of a token
    if level != "token":
        metrics |= {"approx_kl_k1": -d.sum() / many, "approx_kl_k3": (d.expm1() - d).sum() / many}
    if config.kl_coef != 0:
        k3 = _k3(ref_logprobs.detach()[keep] - logprobs[keep], config.kl_clamp)  # [M]
        loss, metrics["kl_ref"] = loss + config.kl_coef * (each * k3).sum(), k3.detach().sum() / many
    entropy = given.entropy  # [B, S]
    if entropy is not None:
        loss = loss - config.entropy_coef * (each * entropy[keep]).sum()
        metrics["entropy"] = entropy.detach()[keep].sum() / many
        entropy = torch.where(chosen, entropy.detach(), 0.0)
    return LossOutput(loss, torch.where(chosen, logp, 0.0), entropy, given.advantages, metrics)


def _k3(gap: Tensor, bound: float | None) -> Tensor:  # [M] -> [M]
    """e^gap - 1 - gap; beyond the bound the bound, without a gradient."""
    k3 = torch.where(gap.isinf(), torch.inf, gap.expm1() - gap)
    if bound is None:
        return k3
    beyond = k3.detach() > bound
    return torch.where(beyond, bound, _k3(torch.where(beyond, 0.0, gap), None))  # no 0 * inf in the backward


def _check(logprobs: Tensor, given: PolicyInputs, ids: Tensor | None, config: PolicyConfig) -> None:
    """Check everything that the arithmetic before `lad_loss` relies on; `ids`: of packed input."""
    advantages, weights = given.advantages, given.rollout_is_weights
    shape, count = logprobs.shape, len(advantages)
    policy_loss = getattr(config, "policy_loss", None)
    if policy_loss in ("vespo", "luspo"):
        raise ValueError(
            f"policy_loss: expected one of ppo, cispo, reinforce and sapo where a sequence is spread over ranks, got "
            f"{policy_loss!r}, which weighs whole sequences; keep sequences whole, or use 'ppo'"
        )
    if logprobs.ndim != (2 if ids is None else 1):
        raise ValueError(
            f"logprobs: expected [B, S], or packed [S] with sequence_ids, got {list(shape)} "
            f"{'without' if ids is None else 'with'} sequence_ids"
        )
    if advantages.ndim != 1 or (ids is None and count != shape[0]):
        raise ValueError(f"advantages: expected [B], one per sequence, got {list(advantages.shape)} for {list(shape)}")
    for name, x in {**{name: getattr(given, name) for name in PER_TOKEN}, "sequence_ids": ids}.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} as logprobs, got {list(x.shape)}")
    if weights is not None and weights.shape != shape and (ids is not None or weights.shape != (count,)):
        raise ValueError(
            f"rollout_is_weights: expected {list(shape)} as logprobs, or with padded input [{count}], got "
            f"{list(weights.shape)}; for packed tokens pass weights[sequence_ids]"
        )
    for name, needed in (("ref_logprobs", config.kl_coef), ("entropy", config.entropy_coef)):
        if needed != 0 and getattr(given, name) is None:
            raise ValueError(f"{name}: needed because the config gives it a weight of {needed}, got None")
    if config.loss_agg_mode == "seq-mean-token-sum-norm" and given.normalizer is None:
        raise ValueError("normalizer: needed for loss_agg_mode='seq-mean-token-sum-norm', got None; pass B * length")
    if ids is not None and len(ids) and not bool((ids.diff() >= 0).all() & (ids[0] >= 0) & (ids[-1] < count)):
        raise ValueError(f"sequence_ids: expected to rise within [0, {count}) without falling; sort the tokens")


def global_normalizer(
    loss_mask: Tensor,  # [B, S], or int [B]
    loss_agg_mode: str,
    *,
    group: dist.ProcessGroup,
    context_group: dist.ProcessGroup | None = None,
) -> Tensor:  # []
    """The `normalizer` of a global batch: its loss tokens, or its sequences with at least one. At least 1.

    Args:
        loss_mask: of all micro-batches of one optimizer step together: [B, S], or the loss tokens [B] of each sequence.
        loss_agg_mode: the config's.
        group: data-parallel ranks, each with sequences of its own.
        context_group: ranks that share this rank's sequences, each with some of their tokens.

    Returns:
        int64 0-d tensor, the same on every rank.

    Raises:
        ValueError: a mask of packed tokens; seq-mean-token-sum-norm, whose divisor is a constant of your choice.
    """
    if loss_agg_mode == "seq-mean-token-sum-norm":
        raise ValueError("loss_agg_mode: 'seq-mean-token-sum-norm' divides by a constant; pass B * length of all ranks")
    if loss_mask.ndim == 1 and loss_mask.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"loss_mask: expected [B, S] or int64 [B] loss tokens per sequence, got {loss_mask.dtype} "
            f"{list(loss_mask.shape)}; for packed tokens pass the counts"
        )
    counts = (loss_mask != 0).sum(1) if loss_mask.ndim == 2 else loss_mask.long()  # [B]
    if context_group is not None:
        counts = counts.clone()
        dist.all_reduce(counts, group=context_group)
    total = counts.sum() if loss_agg_mode == "token-mean" else (counts > 0).sum()  # []
    dist.all_reduce(total, group=group)
    return total.clamp(min=1)


def group_advantages_across_ranks(
    rewards: Tensor,  # [B_r]
    group_ids: Tensor,  # [B_r]
    *,
    group: dist.ProcessGroup,
    scale: str = "group",
) -> Tensor:  # [B_r]
    """`group_advantages` of groups whose completions lie in several micro-batches and on several ranks.

    Args:
        rewards: floating point [B_r], those of all micro-batches of this rank; any number, 0 too.
        group_ids: int64 [B_r]; the same id on two ranks is the same group.
        scale: as for `group_advantages`.

    Returns:
        [B_r] float32 (float64 for float64 rewards): the advantages of this rank's completions.
    """
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: expected {list(rewards.shape)}, one per reward [B], got {list(group_ids.shape)}")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [rewards.new_zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, sizes[0] + len(rewards), group=group)
    lengths = torch.cat(sizes).tolist()
    mine = group_ids.new_zeros(2, max(lengths), dtype=torch.int64)  # [2, longest]
    mine[0, : len(rewards)], mine[1, : len(rewards)] = group_ids, rewards.detach().double().view(torch.int64)  # bits
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine, group=group)
    every = torch.cat([part[:, :n] for part, n in zip(parts, lengths)], 1)  # [2, B]
    advantages = group_advantages(every[1].view(torch.float64).to(rewards.dtype), group_ids=every[0], scale=scale)
    return advantages[sum(lengths[:rank]) :][: lengths[rank]]
