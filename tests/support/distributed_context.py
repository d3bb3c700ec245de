"""Cases of `distributed_worker.py`: context parallelism against one process with the whole batch, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed_vocabulary import FLOAT64, POLICIES, losses_of, policy_batch, whole
from torch import Tensor

from lad_kernels import GRPOConfig, LADConfig, LossOutput, group_advantages, reference
from lad_kernels.frameworks import distributed
from lad_kernels.testing import relative_error


def context_truth(config: LADConfig | GRPOConfig, kw: dict, logp: Tensor, entropy: Tensor) -> tuple:
    """Loss of the whole batch in one process, its gradient by log-prob and by entropy [B, T]."""
    leaf, other = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    spec = reference.lad_loss if isinstance(config, LADConfig) else reference.grpo_loss
    out = spec(leaf, entropy=other, config=config, **kw)
    grads = torch.autograd.grad(out.loss, (leaf, other), allow_unused=True, materialize_grads=True)
    metrics = losses_of(config)[1](logp, entropy=entropy, config=config, **kw).metrics  # the specification has fewer
    return out._replace(metrics=metrics | out.metrics), *grads


def context_parallel() -> None:
    """Every policy at every level and aggregation: shares add up to the loss, gradients are those of one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    head, kw = policy_batch(torch.float64)
    ids, temperature = kw.pop("target_ids"), kw.pop("temperature")
    kw["advantages"] = group_advantages(kw.pop("rewards"), group_size=3)
    scored = reference.linear_logprobs(**head, target_ids=ids, temperature=temperature, return_entropy=True)
    logp, entropy = scored.logprobs, scored.entropy
    logp[~kw["loss_mask"]] = torch.nan  # masked tokens may hold anything
    empty = [0, 0, *range(2, ranks), 7]  # the first rank has no token at all
    for bounds in ([0, *(3 + r for r in range(ranks - 1)), 7], empty):
        part = slice(*bounds[rank:][:2])
        for name, base in POLICIES.items():
            for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
                for on_policy, normalizer in ((False, None), (True, 5.0)):
                    config = replace(base, loss_agg_mode=mode)
                    given = {**kw, "normalizer": normalizer or (9.0 if "norm" in mode else None)}
                    if on_policy:
                        given |= {"old_logprobs": None, "rollout_is_weights": kw["rollout_is_weights"][:, 0]}
                    truth, *grads = context_truth(config, given, logp, entropy)
                    local = {k: v[:, part] if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in given.items()}
                    compare_context(truth, grads, config, local, logp[:, part], entropy[:, part], (name, mode), part)


def compare_context(truth, grads, config, local, logp, entropy, what, part) -> None:
    """Padded and packed, both against the truth."""
    leaf, other = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    out = distributed.context_parallel_loss(leaf, entropy=other, config=config, group=dist.group.WORLD, **local)
    found = torch.autograd.grad(out.loss, (leaf, other), allow_unused=True, materialize_grads=True)
    total = out.loss.detach().clone()
    dist.all_reduce(total)
    assert relative_error(total, truth.loss.detach()) < FLOAT64, what
    sequence_ids = torch.arange(len(logp)).repeat_interleave(logp.shape[1])
    flat = {k: v.flatten() if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in local.items()}
    if local["rollout_is_weights"].ndim == 1:
        flat["rollout_is_weights"] = local["rollout_is_weights"][sequence_ids]
    leaf2, other2 = logp.flatten().requires_grad_(), entropy.flatten().requires_grad_()
    packed = distributed.context_parallel_loss(
        leaf2, entropy=other2, config=config, group=dist.group.WORLD, sequence_ids=sequence_ids, **flat
    )
    again = torch.autograd.grad(packed.loss, (leaf2, other2), allow_unused=True, materialize_grads=True)
    assert all(torch.allclose(a.flatten(), b, rtol=1e-12, atol=0) for a, b in zip(found, again)), what
    check_metrics(out, truth, local["loss_mask"], what)
    for grad, expected in zip(found, grads):
        scale = expected.abs().max()
        assert ((grad - expected[:, part]).abs() <= FLOAT64 * scale).all(), what


def check_metrics(out: LossOutput, truth: LossOutput, mask: Tensor, what: object) -> None:
    """Means over this rank's tokens average to those of all tokens; the loss above its start adds up."""
    keys = sorted({"ratio_mean", "approx_kl_k1", "approx_kl_k3", "entropy", "kl_ref"} & set(truth.metrics))
    means = torch.stack([out.metrics[key] for key in keys] + [torch.ones((), dtype=torch.float64)]) * mask.sum()
    sums = torch.cat([means, out.metrics["loss_above_start"][None]])  # [keys + 2]
    dist.all_reduce(sums)
    expected = torch.stack([truth.metrics[key] for key in keys])
    assert torch.allclose(sums[:-2] / sums[-2], expected, rtol=1e-11, atol=1e-13), what
    assert torch.allclose(sums[-1], truth.metrics["loss_above_start"], rtol=1e-11, atol=1e-13), what


def context_refusals() -> None:
    logp, adv, world = torch.zeros(3, 4), torch.zeros(3), dist.group.WORLD
    call = lambda *a, **k: distributed.context_parallel_loss(*a, group=world, **k)  # noqa: E731
    for args, kw, message in (
        ((logp, logp, logp), {}, r"advantages: expected \[B\]"),
        ((logp, logp[:, :1], adv), {}, r"old_logprobs: expected \[3, 4\]"),
        ((logp[0], None, adv), {}, r"logprobs: expected \[B, S\], or packed"),
        ((logp[0], None, adv), {"sequence_ids": torch.tensor([0, 2, 1, 1])}, "sequence_ids: expected to rise"),
        ((logp, None, adv), {"config": LADConfig(kl_coef=1.0)}, "ref_logprobs: needed"),
        ((logp, None, adv), {"config": LADConfig(loss_agg_mode="seq-mean-token-sum-norm")}, "normalizer: needed"),
        ((logp, None, adv), {"rollout_is_weights": torch.ones(4)}, "rollout_is_weights: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*args, **kw)
    for mask, mode, message in (
        (torch.ones(4, dtype=torch.bool), "token-mean", "pass the counts"),
        (logp, "seq-mean-token-sum-norm", "divides by a constant"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.global_normalizer(mask, mode, group=world)


def shifting() -> None:
    """Padded and packed: putting the slices together gives the shift of the whole, also at the ranks' edges."""
    ids = torch.arange(10, 10 + 2 * 7).view(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
    mine = distributed.shift_and_shard(ids, mask, dist.group.WORLD)
    targets, kept, inputs = (
        whole(x.T.contiguous()).T[:, :7] for x in (mine.target_ids, mine.loss_mask, mine.input_ids)
    )
    assert torch.equal(inputs, ids)
    assert torch.equal(kept, torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]]) != 0)
    assert torch.equal(targets[kept], torch.cat([ids[0, 2:], ids[1, 1:4]]))
    cu = torch.tensor([0, 3, 3, 8])
    mine = distributed.shift_and_shard(ids.flatten()[:8], torch.ones(8), dist.group.WORLD, cu_seqlens=cu)
    targets, kept, sequences = (whole(x) for x in (mine.target_ids, mine.loss_mask, mine.sequence_ids))
    assert torch.equal(targets[kept], torch.tensor([11, 12, 14, 15, 16, 17]))
    assert sequences.tolist() == [0, 0, 0, *[2] * (len(sequences) - 3)]
    mine = distributed.shift_and_shard(ids.flatten(), torch.ones(14), dist.group.WORLD, cu_seqlens=cu)  # 6 of padding
    targets, kept, sequences = (whole(x) for x in (mine.target_ids, mine.loss_mask, mine.sequence_ids))
    assert torch.equal(targets[kept], torch.tensor([11, 12, 14, 15, 16, 17]))
    assert sequences.tolist() == [0, 0, 0, *[2] * (len(sequences) - 3)]
    with pytest.raises(ValueError, match="input_ids, loss_mask, cu_seqlens: expected"):
        distributed.shift_and_shard(ids, mask[:, 1:], dist.group.WORLD)


def normalizers() -> None:
    rank, ranks, world = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    mask = torch.zeros(3, 4)
    mask[: rank + 1, : rank + 1] = 1  # rank + 1 sequences of rank + 1 tokens
    tokens, sequences = sum((r + 1) ** 2 for r in range(ranks)), sum(range(1, ranks + 1))
    for x in (mask, mask.sum(1).long()):
        assert distributed.global_normalizer(x, "token-mean", group=world) == tokens
        assert distributed.global_normalizer(x, "seq-mean-token-mean", group=world) == sequences
    alone = dist.new_subgroups(1)[0]
    context = {"group": alone, "context_group": world}  # the same sequences on all ranks
    assert distributed.global_normalizer(mask, "token-mean", **context) == tokens
    assert distributed.global_normalizer(mask, "seq-mean-token-sum", **context) == ranks
    assert distributed.global_normalizer(0 * mask, "token-mean", group=world) == 1


def groups_span_ranks() -> None:
    """Groups on several ranks, a different number of completions on each, one rank without any."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gen = torch.Generator().manual_seed(2)
    rewards, ids = torch.rand(12, generator=gen), torch.randint(4, (12,), generator=gen) + (1 << 60)
    rewards[3] = torch.nan
    for bounds in ([0, *(5 + r for r in range(ranks - 1)), 12], [0, *[0] * (ranks - 1), 12]):
        part = slice(*bounds[rank:][:2])
        for scale in ("group", "batch", "none", "loo"):
            found = distributed.group_advantages_across_ranks(
                rewards[part], ids[part], group=dist.group.WORLD, scale=scale
            )
            truth = reference.group_advantages(rewards.double(), group_ids=ids, scale=scale)[part]
            assert ((found - truth).abs() < 1e-6).all(), scale  # rewards are float32; measured: 1e-7
    with pytest.raises(ValueError, match="group_ids: expected"):
        distributed.group_advantages_across_ranks(rewards, ids[1:], group=dist.group.WORLD)


CASES = [context_parallel, context_refusals, shifting, normalizers, groups_span_ranks]
