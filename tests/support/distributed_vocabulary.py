"""Cases of `distributed_worker.py`: heads whose vocabulary is sharded over the ranks, and the losses on them.

Data come from seeds, so every rank has the whole batch and compares its part with one process in float64.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import CASES as HEADS
from conditions import WIDENING, rounded_inside
from torch import Tensor

from lad_kernels import (
    GRPOConfig,
    LADConfig,
    LossOutput,
    checks,
    grpo_loss,
    lad_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    linear_policy_loss,
    reference,
)
from lad_kernels.head import vocab_parallel
from lad_kernels.testing import (
    CONTRACT_MARGIN,
    FP32_TOLERANCE,
    HeadInputs,
    HeadOutputs,
    check_outputs,
    make_inputs,
    relative_error,
    run_head,
)

FLOAT64 = 1e-13  # largest relative error of float64 against one process; measured: 4e-15 at most


def whole(x: Tensor) -> Tensor:
    """Parts of any length [n_r, ...] -> [n, ...], in rank order."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def splits(vocabulary: int) -> list[list[int]]:
    """Row bounds by rank: uneven, one row, no rows; and no rows on the first rank."""
    ranks = dist.get_world_size()
    last = [0, vocabulary - 1, vocabulary] if ranks == 2 else [0, 1, 1, vocabulary]
    return [[0, *(vocabulary * r // ranks + 3 for r in range(1, ranks)), vocabulary], last, [0, *last[:-2], vocabulary]]


def shard(inputs: HeadInputs, bounds: list[int]) -> HeadInputs:
    rows = slice(*bounds[dist.get_rank() :][:2])
    return replace(inputs, weight=inputs.weight[rows], bias=None if inputs.bias is None else inputs.bias[rows])


def sharded_run(inputs: HeadInputs, bounds: list[int], entropy_upstream: Tensor | None, impl: str) -> HeadOutputs:
    """`run_head` with the vocabulary spread over the ranks; dW and dbias put together again."""
    head = lambda *a, **k: linear_logprobs(*a, **k, vocab_group=dist.group.WORLD, impl=impl)  # noqa: E731
    out = run_head(head, shard(inputs, bounds), entropy_upstream=entropy_upstream)
    dbias = None if out.dbias is None else whole(out.dbias)
    return replace(out, dweight=whole(out.dweight), dbias=dbias)


def check_head(name: str, dtype: torch.dtype, bounds: int, impl: str = "torch") -> None:
    inputs = make_inputs(**HEADS[name], dtype=dtype)
    upstream = torch.randn(len(inputs.hidden), generator=torch.Generator().manual_seed(1))
    found = sharded_run(inputs, splits(len(inputs.weight))[bounds], upstream, impl)
    if dtype != torch.float64:
        report = check_outputs(found, inputs, entropy_upstream=upstream)
        if dtype == torch.bfloat16 and impl == "torch":  # parts of dH are summed before the one rounding
            error, twice = report["dH"]
            assert error <= 0.51 * twice, report
        return
    truth = run_head(reference.linear_logprobs, inputs, entropy_upstream=upstream)
    for field in ("logprobs", "entropy", "dhidden", "dweight", "dbias"):
        if getattr(truth, field) is not None:
            assert relative_error(getattr(found, field), getattr(truth, field)) < FLOAT64, field


def heads_exact() -> None:
    for name in ("two tiles and a remainder", "every transform", "peaked policy", "negative scale", "one token"):
        for bounds in range(3):
            check_head(name, torch.float64, bounds)


def heads_rounded() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("every transform", "peaked policy"):
            check_head(name, dtype, 0)


def heads_in_triton() -> None:
    check_head("smallest vocabulary", torch.float32, 0, "triton")  # shards of one row, and in three processes none
    check_head("bias", torch.bfloat16, 2, "triton")


def heads_in_chunks() -> None:
    """Several all-reduces of dH, and a sum of dW over the chunks; some tokens have no gradient."""
    before, vocab_parallel.CHUNK = vocab_parallel.CHUNK, 16
    try:
        check_head("every transform", torch.float64, 1)
        check_head("peaked policy", torch.bfloat16, 0)
    finally:
        vocab_parallel.CHUNK = before


def ranks_agree_bitwise() -> None:
    inputs = make_inputs(**HEADS["every transform"])
    found = sharded_run(inputs, splits(len(inputs.weight))[0], inputs.upstream, "torch")
    for x in (found.logprobs, found.entropy, found.dhidden):
        assert all(torch.equal(x, other) for other in whole(x[None]))


def a_common_part_of_all_logits_cancels() -> None:
    """Logits about 3,000 that float32 holds exactly: results as about 0, since no large numbers are subtracted."""
    inputs = make_inputs(20, 16, 40, bias=True)
    grid = {name: (16 * getattr(inputs, name)).round() / 16 for name in ("hidden", "weight", "bias")}
    near = replace(inputs, **grid)
    far = replace(near, bias=near.bias + 3000)
    near, far = (sharded_run(x, splits(40)[0], inputs.upstream, "torch") for x in (near, far))
    for name in ("logprobs", "entropy", "dhidden", "dweight", "dbias"):
        assert relative_error(getattr(far, name), getattr(near, name)) <= FP32_TOLERANCE, name


def everything_masked() -> None:
    inputs = make_inputs(20, 16, 40, bias=True)
    inputs = replace(inputs, loss_mask=torch.zeros(20, dtype=torch.bool))
    found = sharded_run(inputs, splits(40)[1], inputs.upstream, "torch")
    for x in (found.logprobs, found.entropy, found.dhidden, found.dweight, found.dbias):
        assert x.shape[0] in (20, 40) and not x.any()


def targets_of_no_rank() -> None:
    """Probability 0, as on one device, where no value may be read; -100 was taken for row 0 of the first rank."""
    inputs, absent = make_inputs(6, 16, 40, masked=0.0), torch.tensor([1, 4])
    targets = inputs.targets.index_put((absent,), torch.tensor([-100, 43]))
    with mock.patch.object(checks, "may_read", return_value=False):
        found = sharded_run(replace(inputs, targets=targets), splits(40)[0], inputs.upstream, "torch").logprobs
    expected = sharded_run(inputs, splits(40)[0], inputs.upstream, "torch").logprobs
    assert torch.equal(found, expected.index_fill(0, absent, -torch.inf))


def policy_batch(dtype: torch.dtype) -> tuple[dict, dict]:
    """(tensors of the head, keywords of the loss): 6 sequences of 7 tokens, two groups, one of equal rewards."""
    gen = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    head = dict(hidden_states=rand(6, 7, 24), lm_head_weight=rand(83, 24) / 3, bias=rand(83))
    ids = torch.randint(83, (6, 7), generator=gen)
    logp = reference.linear_logprobs(*list(head.values())[:2], ids, bias=head["bias"], temperature=0.7).logprobs
    mask = torch.rand(6, 7, generator=gen) < 0.8
    mask[4] = False
    kw = dict(
        target_ids=ids,
        old_logprobs=(logp + 0.3 * rand(6, 7)),
        rewards=torch.tensor([1.0, 0, 1, 0, 0, 0]),
        group_size=3,
        loss_mask=mask,
        ref_logprobs=logp + 0.2 * rand(6, 7),
        rollout_is_weights=rand(6, 7).exp(),
    )
    return cast(head, dtype), cast(kw, dtype) | {"temperature": 0.7}


def cast(values: dict, dtype: torch.dtype) -> dict:
    """Floating tensors of a dict in another dtype, as new tensors."""
    floating = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
    return {k: x.to(dtype, copy=True) if floating(x) else x for k, x in values.items()}


POLICIES = {
    "lad": LADConfig(eta=0.5, kl_coef=0.1, entropy_coef=0.02),
    "lad, sequence": LADConfig("hd", eta=1.0, importance_sampling_level="sequence"),
    "lad, sum": LADConfig(importance_sampling_level="sequence_sum", target_norm="group", kl_coef=0.2, eta=1.0),
    "lad, bounds": LADConfig(eta=1.0, importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.02),
    "lad, norm": LADConfig("kl", eta=1.0, loss_agg_mode="seq-mean-token-sum-norm", target_clamp=0.7),
    "grpo": GRPOConfig(kl_coef=0.1, entropy_coef=-0.02, loss_agg_mode="seq-mean-token-mean"),
    "gspo": GRPOConfig(epsilon_low=0.05, epsilon_high=0.05, importance_sampling_level="sequence"),
    "gspo, sum": GRPOConfig(importance_sampling_level="sequence_sum", log_ratio_clamp=0.4, dual_clip=1.2),
    "cispo": GRPOConfig(policy_loss="cispo", loss_agg_mode="seq-mean-token-sum"),
    "reinforce": GRPOConfig(policy_loss="reinforce", loss_agg_mode="seq-mean-token-mean", kl_coef=0.3),
}


def losses_of(config: LADConfig | GRPOConfig) -> tuple:
    """(with the head, on log-probs, the reference with the head)."""
    if isinstance(config, LADConfig):
        return linear_lad_loss, lad_loss, reference.linear_lad_loss
    return linear_grpo_loss, grpo_loss, reference.linear_grpo_loss


def loss_and_gradients(loss, head: dict, kw: dict, config, **more) -> tuple[LossOutput, dict[str, Tensor]]:
    leaves = {k: x.detach().clone().requires_grad_() for k, x in head.items()}
    out = loss(**leaves, **kw, config=config, **more)
    (3 * out.loss).backward()
    return out, {"loss": out.loss.detach(), **{k: x.grad for k, x in leaves.items()}}


def neighbour(values: dict, gen: torch.Generator) -> dict:
    """Float32 tensors of a dict, each number off by up to one rounding of itself; rewards are exact."""
    noise = lambda x: 2.0**-24 * (2 * torch.rand(x.shape, generator=gen, dtype=torch.float64) - 1)  # noqa: E731
    moves = lambda k, x: isinstance(x, Tensor) and x.is_floating_point() and k != "rewards"  # noqa: E731
    return {k: (x * (1 + noise(x))).float() if moves(k, x) else x for k, x in values.items()}


def allowances(spec, head: dict, kw: dict, config) -> dict[str, float]:
    """Relative errors that `spec` may have in float32: the rule of `lad_kernels.testing`, at least the condition.

    The contract's error is the largest of these inputs and of four neighbours; the condition is how far the truth
    moves when inputs and log-sum-exps do, by one rounding each. One input alone may be lucky: a loss is one number, a
    sum that nearly cancels.
    """
    gen = torch.Generator().manual_seed(0)
    exact = lambda h, k: loss_and_gradients(spec, cast(h, torch.float64), cast(k, torch.float64), config)[1]  # noqa: E731
    here = exact(head, kw)
    allowed: dict[str, float] = {}
    for i in range(5):
        h, k = (head, kw) if i == 0 else (neighbour(head, gen), neighbour(kw, gen))
        truth = exact(h, k)
        for name, x in loss_and_gradients(spec, h, k, config)[1].items():
            allowed[name] = max(allowed.get(name, FP32_TOLERANCE), CONTRACT_MARGIN * relative_error(x, truth[name]))
        with rounded_inside(2.0**-24, gen):
            moved = exact(h, k)
        for name, x in moved.items():
            allowed[name] = max(allowed[name], WIDENING * relative_error(x, here[name]))
    return allowed


def vocabulary_parallel_losses() -> None:
    """Loss, metrics and gradients of both objectives, on-policy too, where tokens with c = 0 are known in advance.

    float32 may be as far off as the rule of `lad_kernels.testing` says: twice the reference in float32.
    """
    for name, config in POLICIES.items():
        for dtype in (torch.float64, torch.float32):
            for on_policy in (False, True):
                head, kw = policy_batch(dtype)
                kw |= {"old_logprobs": None} if on_policy else {}
                loss, _, spec = losses_of(config)
                truth, expected = loss_and_gradients(spec, cast(head, torch.float64), cast(kw, torch.float64), config)
                allowed = allowances(spec, head, kw, config) if dtype == torch.float32 else {}
                rows = slice(*splits(83)[on_policy][dist.get_rank() :][:2])
                mine = {k: x if k == "hidden_states" else x[rows] for k, x in head.items()}
                out, found = loss_and_gradients(loss, mine, kw, config, vocab_group=dist.group.WORLD)
                for key, x in found.items():
                    x = whole(x) if key in ("lm_head_weight", "bias") else x
                    tolerance = allowed.get(key, FLOAT64)
                    error = relative_error(x, expected[key])
                    assert error <= tolerance, f"{name}, on-policy {on_policy}, {key}: {error:.1e} of {tolerance:.1e}"
                for key in {"ratio_mean", "ess", "entropy", "kl_ref", "clip_share"} & set(truth.metrics):
                    assert abs(out.metrics[key] - truth.metrics[key]) < 1e-5, (name, key)
                assert (out.metrics["head_flops"] > 0) == (len(mine["bias"]) > 0)


def cross_entropy_and_own_losses() -> None:
    """linear_cross_entropy with weights and a z-loss, and an objective with a learnt parameter, in float64."""
    head, kw = policy_batch(torch.float64)
    targets = kw["target_ids"].masked_fill(~kw["loss_mask"], -100)  # [B, T]
    rows = slice(*splits(83)[1][dist.get_rank() :][:2])
    mine = {k: x if k == "hidden_states" else x[rows] for k, x in head.items()}
    weights, ranks = kw["rollout_is_weights"], {"vocab_group": dist.group.WORLD}  # [B, T]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def objective(logprobs, entropy, tokens):
        ratio = (logprobs - tokens.take(kw["old_logprobs"])).exp()  # [m]
        return -(scale * ratio * tokens.take(weights) + 0.1 * entropy).sum() / 30

    def gradients(call, leaves: dict) -> dict[str, Tensor]:
        leaves = {k: x.detach().clone().requires_grad_() for k, x in leaves.items()}
        value = call(**leaves)
        (value * torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
        return {"value": value.detach(), **{k: x.grad for k, x in leaves.items()}}

    for reduction in ("mean", "sum", "none"):
        given = {"target_ids": targets, "reduction": reduction, "z_loss": 0.01, "token_weights": weights}
        truth = gradients(functools.partial(reference.linear_cross_entropy, **given), head)
        compare(gradients(functools.partial(linear_cross_entropy, **given, **ranks), mine), truth)
    given = {
        "target_ids": kw["target_ids"],
        "loss_mask": kw["loss_mask"],
        "objective": objective,
        "return_entropy": True,
    }
    own = lambda **x: linear_policy_loss(**given, **x).loss  # noqa: E731
    truth, slope = gradients(functools.partial(own, impl="reference"), head), scale.grad.clone()
    scale.grad = None
    compare(gradients(functools.partial(own, **ranks), mine), truth)
    assert relative_error(scale.grad, slope) < FLOAT64
    for name, options in (("label_smoothing", {"label_smoothing": 0.1}), ("return_stats", {"return_stats": True})):
        with pytest.raises(ValueError, match=f"{name}: not built for a head that vocab_group spreads over ranks"):
            linear_cross_entropy(**mine, target_ids=targets, **options, **ranks)


def compare(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Of this rank, dW and dbias of its rows, against one process with all of them."""
    for name, x in found.items():
        x = whole(x) if name in ("lm_head_weight", "bias") else x
        assert relative_error(x, truth[name]) < FLOAT64, name


def refusals() -> None:
    """What cannot be right is refused on every rank, before anything is computed."""
    rank, world = dist.get_rank(), dist.group.WORLD
    inputs = make_inputs(8, 4, 10, masked=0.0)
    h, w, y = inputs.hidden, inputs.weight, inputs.targets
    call = lambda *a, **k: linear_logprobs(*a, **{"vocab_group": world, **k})  # noqa: E731
    with pytest.raises(ValueError, match="vocab_group: expected the same tokens that take part on every rank"):
        call(h[: 8 - rank], w, y[: 8 - rank])
    with pytest.raises(ValueError, match=r"the same target_ids on every rank, got .* on ranks \[0\] and \[1"):
        call(h, w, (y + rank) % 10)
    with pytest.raises(ValueError, match="the same target_ids"):  # in another order
        call(h, w, y.flip(0) if rank == 0 else y)
    with pytest.raises(ValueError, match="the same arguments that need a gradient"):
        call(h, w.clone().requires_grad_(rank == 0), y)
    with pytest.raises(ValueError, match="the same dtype"):
        call(*((h, w) if rank else (h.double(), w.double())), y)
    with pytest.raises(ValueError, match="expected 2 rows or more on all ranks together, got 1"):
        call(h, w[: int(rank == 0)], y * 0)
    with pytest.raises(ValueError, match=rf"ids in \[0, {10 * dist.get_world_size()}\)"):
        call(h, w, y + 10 * dist.get_world_size())
    with pytest.raises(ValueError, match="vocab_group: expected None with impl='reference'"):
        call(h, w, y, impl="reference")
    with pytest.raises(ValueError, match="vocab_group: expected None, got a group; the reference"):
        reference.linear_logprobs(h, w, y, vocab_group=world)
    with pytest.raises(TypeError, match=r"vocab_group: expected a torch\.distributed\.ProcessGroup.*got int"):
        call(h, w, y, vocab_group=3)
    with pytest.raises(ValueError, match=r"vocab_group: expected None with config\.backward='routed'"):
        linear_lad_loss(h, w, y, advantages=torch.ones(8), config=LADConfig(backward="routed"), vocab_group=world)


SETTINGS = {
    "temperature": 1.3,
    "softcap": 20.0,
    "logit_scale": 0.5,
    "config": LADConfig(eta=0.3),
    "return_entropy": True,
    "return_logprobs": False,
    "normalizer": 3.0,
    "old_logprobs": None,
    "impl": "torch",
}


def disagreements() -> None:
    """What differs on one rank is named there and everywhere, instead of wrong numbers or an abort."""
    rank, world = dist.get_rank(), dist.group.WORLD
    inputs = make_inputs(8, 4, 10, masked=0.0)
    h, w, y = inputs.hidden, inputs.weight, inputs.targets
    old, mask = torch.full((8,), -2.0), torch.arange(8) < 6
    given = {"advantages": torch.arange(8.0), "loss_mask": mask, "vocab_group": world, "config": LADConfig()}

    def call(**changed) -> None:
        options = {"hidden_states": h, "old_logprobs": old} | given | (changed if rank == 1 else {})
        linear_lad_loss(options.pop("hidden_states"), w, y, **options)

    apart = r"\[0\] and \[1\]" if dist.get_world_size() == 2 else r"\[0, 2\] and \[1\]"
    named = "vocab_group: expected the same {} on every rank, got different ones on ranks " + apart
    for name, other in SETTINGS.items():
        with pytest.raises(ValueError, match=named.format(name)):
            call(**{name: other})
    shifted = {
        "hidden_states": h + 1e-6 * mask[:, None],
        "advantages": given["advantages"][[1, 0, *range(2, 8)]],
        "old_logprobs": old - 1,
    }
    for name, other in shifted.items():
        with pytest.raises(ValueError, match=named.format(f"values of {name}")):
            call(**{name: other})
    call(hidden_states=torch.where(mask[:, None], h, torch.nan), old_logprobs=torch.where(mask, old, torch.nan))
    for reduction in ("none", "mean"):
        with pytest.raises(ValueError, match=named.format("z_loss")):
            linear_cross_entropy(h, w, y, reduction=reduction, z_loss=0.1 * (rank == 1), vocab_group=world)
    with pytest.raises(ValueError, match=r"the same function on every rank, got different ones on ranks \[0\] and \[1"):
        call() if rank else linear_logprobs(h, w, y, loss_mask=mask, vocab_group=world)


CASES = [
    cross_entropy_and_own_losses,
    disagreements,
    heads_exact,
    heads_rounded,
    heads_in_triton,
    heads_in_chunks,
    ranks_agree_bitwise,
    a_common_part_of_all_logits_cancels,
    everything_masked,
    targets_of_no_rank,
    vocabulary_parallel_losses,
    refusals,
]
