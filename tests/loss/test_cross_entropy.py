"""linear_cross_entropy against PyTorch's of stored logits: every option, path and backend, and what it reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lad_kernels import linear_cross_entropy, reference
from lad_kernels.head import cost, dispatch, memory
from lad_kernels.head.records import BLOCK
from lad_kernels.testing import FP32_TOLERANCE, make_inputs, relative_error

B, T, D, V = 4, 9, 24, 3 * BLOCK + 37
N = B * T
REDUCTIONS = ("mean", "sum", "none")
TRANSFORMS = {
    "plain": {},
    "bias, scale, temperatures": dict(bias=True, logit_scale=0.7, temperature=torch.linspace(0.5, 1.5, N).view(B, T)),
    "softcap": dict(bias=True, softcap=9.0),
}
OPTIONS = {
    f"smoothing {s}, z {z}{', weights' * w}": dict(label_smoothing=s, z_loss=z, weighted=bool(w))
    for s, z, w in itertools.product((0.0, 0.1), (0.0, 1e-2), (0, 1))
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: 11)


def batch(
    transform: str = "plain", *, weighted: bool = False, entropy: float | None = 0.5, seed: int = 0, **more
) -> dict:
    """Keywords in float64; six targets are ignored, their hidden states NaN, and with weights two tokens weigh 0."""
    options = dict(TRANSFORMS[transform])
    biased, temperature = options.pop("bias", False), options.pop("temperature", 1.0)
    x = make_inputs(N, D, V, dtype=torch.float64, entropy=entropy, bias=biased, masked=0.0, seed=seed)
    targets, hidden = x.targets.clone(), x.hidden.clone()
    targets[[0, 3, 4, 17, 18, 35]] = -100
    hidden[targets == -100] = torch.nan
    weights = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).view(B, T)
    weights[1, :2] = 0
    return dict(
        hidden_states=hidden.view(B, T, D),
        lm_head_weight=x.weight,
        target_ids=targets.view(B, T),
        bias=x.bias,
        temperature=temperature,
        token_weights=weights if weighted else None,
        **options,
        **more,
    )


def run(loss, inputs: dict, dtype: torch.dtype = torch.float64, device="cpu", **more) -> tuple:
    """(loss, stats, {leaf: gradient}), for an upstream gradient that is not 1."""
    cast = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    floating = ("hidden_states", "lm_head_weight", "bias")
    cast |= {k: cast[k].detach().to(dtype).clone().requires_grad_() for k in floating if cast[k] is not None}
    found, stats = loss(**cast, **more, return_stats=True)
    upstream = torch.linspace(0.5, 2.0, found.numel(), dtype=torch.float64).view(found.shape).to(found)
    (found * upstream).sum().backward()
    return found.detach(), stats, {k: cast[k].grad for k in floating if cast[k] is not None}


def check(inputs: dict, path: str, impl: str, dtype, device, options: dict, **ours) -> None:
    """By the rule: twice the error of stored logits in this dtype, or float32's; `ours` are no options of truth."""
    floating = [k for k in ("hidden_states", "lm_head_weight", "bias") if inputs[k] is not None]
    rounded = inputs | {k: inputs[k].to(dtype).double() for k in floating}
    truth, expected_stats, expected = run(reference.linear_cross_entropy, rounded, **options)
    contract = run(reference.linear_cross_entropy, rounded, torch.float32, **options)[2]
    with dispatch.force(path):
        found, stats, gradients = run(linear_cross_entropy, rounded, dtype, device, impl=impl, **options, **ours)
    least = 1e-10 if dtype == torch.float64 else FP32_TOLERANCE
    assert relative_error(found.cpu(), truth) < least
    torch.testing.assert_close(stats.logprobs.cpu().double(), expected_stats.logprobs, rtol=0, atol=20 * least)
    torch.testing.assert_close(stats.entropy.cpu().double(), expected_stats.entropy, rtol=0, atol=20 * least)
    assert torch.equal(stats.correct.cpu(), expected_stats.correct)
    torch.testing.assert_close(stats.z_loss.cpu().double(), expected_stats.z_loss, rtol=10 * least, atol=0)
    assert stats.token_accuracy.item() == pytest.approx(expected_stats.token_accuracy.item(), rel=1e-6)
    ignored = inputs["target_ids"] == -100
    for leaf, gradient in gradients.items():
        allowed = least if dtype == torch.float64 else 2 * relative_error(contract[leaf].to(dtype), expected[leaf])
        assert relative_error(gradient.cpu(), expected[leaf]) <= max(least, allowed), leaf
    assert not gradients["hidden_states"].cpu()[ignored].count_nonzero()


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_float64(options, reduction, path):
    """Exact on every path, and PyTorch's number where the options are PyTorch's."""
    given = dict(OPTIONS[options])
    weighted = given.pop("weighted")
    for transform in TRANSFORMS:
        if (transform == "softcap" and given["label_smoothing"]) or (reduction == "none" and path != "two_pass"):
            continue
        x = batch(transform, weighted=weighted)
        check(x, path, "torch", torch.float64, "cpu", {**given, "reduction": reduction})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_pytorchs(reduction, smoothing):
    x = batch()
    keep = x["target_ids"].flatten() != -100
    z = x["hidden_states"].flatten(0, 1)[keep] @ x["lm_head_weight"].T  # [M, V]; PyTorch has 0 * NaN where ignored
    expected = cross_entropy(z, x["target_ids"].flatten()[keep], reduction=reduction, label_smoothing=smoothing)
    found = linear_cross_entropy(**x, reduction=reduction, label_smoothing=smoothing)
    found = found.flatten()[keep] if reduction == "none" else found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("options", ["smoothing 0.0, z 0.0", "smoothing 0.1, z 0.01, weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(dtype, options, path, device, monkeypatch):
    """Used up to .90 of what is allowed; all pairs are kept one by one where they are routed."""
    monkeypatch.setattr(cost, "dense_share", lambda work: 2.0)  # never
    given = dict(OPTIONS[options])
    weighted = given.pop("weighted")
    x = batch("bias, scale, temperatures", weighted=weighted, entropy=None)
    x["bias"] = x["bias"] if dtype == torch.float32 else None  # with a 16-bit bias there is no one pass
    check(x, path, "triton", dtype, device, given, tail_mass=1e-9)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("path", dispatch.PATHS)
def test_accuracy_counts_the_likeliest_word(path, impl, device):
    """A hit, a miss by a little, a tie, a miss in the last block; also under a negative scale and a softcap."""
    z = torch.zeros(4, V)
    z[0, 5], z[1, 7], z[1, 300], z[2, 3], z[2, 140], z[3, 0], z[3, V - 1] = 2.0, 1.0, 1.001, 1.5, 1.5, 1.0, 4.0
    targets = torch.tensor([5, 7, 3, 0])
    for options, sign in (({}, 1.0), ({"softcap": 20.0}, 1.0), ({"logit_scale": -1.0}, -1.0)):
        hidden, weight = torch.eye(4, 8, device=device), torch.zeros(V, 8, device=device)
        weight[:, :4] = sign * z.T.to(device)
        leaf = weight.requires_grad_()
        with dispatch.force(path):
            _, stats = linear_cross_entropy(hidden, leaf, targets.to(device), impl=impl, return_stats=True, **options)
        assert stats.token_accuracy == 0.5, options
        assert stats.correct.tolist() == [True, False, True, False], options


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_token_counts(impl, device):
    x = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch().items()}
    leaf = x["lm_head_weight"].float().requires_grad_()
    x |= dict(
        hidden_states=x["hidden_states"].float(), lm_head_weight=leaf, target_ids=torch.full_like(x["target_ids"], 7)
    )
    loss, stats = linear_cross_entropy(**x, ignore_index=7, impl=impl, return_stats=True)
    loss.backward()
    assert (loss.item(), stats.token_accuracy.item()) == (0, 0)
    x["token_weights"] = torch.zeros_like(x["target_ids"], dtype=torch.float32)
    x["target_ids"] = torch.zeros_like(x["target_ids"]).masked_fill(x["hidden_states"].isnan().any(-1), 7)
    loss = linear_cross_entropy(**x, ignore_index=7, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.count_nonzero()


@pytest.mark.parametrize(("path", "passes"), [("one_pass", 6), ("two_pass", 8)])
def test_flops(path, passes):
    """Ignored tokens cost nothing; those that weigh 0 the forward, and that only for statistics."""
    x = batch(weighted=True)
    x["hidden_states"].requires_grad_(), x["lm_head_weight"].requires_grad_()
    with dispatch.force(path):
        _, stats = linear_cross_entropy(**x, return_stats=True)
    kept, live = N - 6, N - 6 - int((x["token_weights"][x["target_ids"] != -100] == 0).sum())
    assert stats.metrics["head_flops"] == D * V * (passes * live + 2 * (kept - live))


def test_routed_within_its_bound():
    x = batch(entropy=0.3)
    with dispatch.force("routed"):
        _, stats, found = run(linear_cross_entropy, x, tail_mass=1e-2)
    truth = run(reference.linear_cross_entropy, x)[2]
    for leaf, bound in (("hidden_states", "dhidden_bound"), ("lm_head_weight", "dweight_bound")):
        error = (found[leaf] - truth[leaf]).norm()
        assert 1e-6 < error <= 0.5 * stats.metrics[bound] * 1.0001  # the upstream gradient is 0.5
    assert stats.metrics["kept_share"] < 0.7


def test_parts_of_a_batch_add_up():
    """Gradient accumulation: sums over parts, divided by the whole batch's number of tokens."""
    x, whole = batch(), None
    count = (x["target_ids"] != -100).sum()
    _, _, whole = run(linear_cross_entropy, x)
    total = torch.zeros_like(x["lm_head_weight"])
    for part in (slice(0, 1), slice(1, 4)):
        leaf = x["lm_head_weight"].clone().requires_grad_()
        some = x | dict(hidden_states=x["hidden_states"][part], target_ids=x["target_ids"][part], lm_head_weight=leaf)
        (0.5 * linear_cross_entropy(**some, reduction="sum") / count).backward()
        total += leaf.grad
    torch.testing.assert_close(total, whole["lm_head_weight"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_a_second_backward_gives_the_same(path):
    x = batch()
    leaf = x["lm_head_weight"].requires_grad_()
    with dispatch.force(path):
        loss = linear_cross_entropy(**x, label_smoothing=0.1, z_loss=1e-3)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-14)


REFUSED = {
    "label_smoothing: expected a number in [0, 1), got 1.0": dict(label_smoothing=1.0),
    "label_smoothing: expected a finite number >= 0, got -0.1": dict(label_smoothing=-0.1),
    "label_smoothing: expected 0 with a softcap": dict(label_smoothing=0.1, softcap=9.0),
    "z_loss: expected a finite number >= 0": dict(z_loss=-1.0),
    "reduction: expected one of 'mean', 'sum', 'none', got 'sums'; did you mean 'sum'?": dict(reduction="sums"),
    "reduction: 'none' has no routed backward": dict(reduction="none", tail_mass=1e-3),
    "ignore_index: expected an integer, got None": dict(ignore_index=None),
    "token_weights: expected [4, 9] as target_ids": dict(token_weights=torch.ones(B)),
    "token_weights: expected finite factors >= 0": dict(token_weights=-torch.ones(B, T)),
    "token_weights: expected a constant": dict(token_weights=torch.ones(B, T, requires_grad=True)),
    "tail_mass: expected a finite number >= 0": dict(tail_mass=-1.0),
    "backward: expected one of": dict(backward="sparse"),
    "target_ids: expected ids in": dict(ignore_index=-1),
    "double backward": dict(create_graph=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    options, x = dict(REFUSED[message]), batch()
    again = options.pop("create_graph", False)
    leaf = x["lm_head_weight"].requires_grad_()

    def call() -> None:
        torch.autograd.grad(linear_cross_entropy(**{**x, **options}), leaf, create_graph=again)

    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        call()
    assert message in str(error.value)
