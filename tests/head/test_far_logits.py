"""Logits far apart, far from zero and infinite: a policy at temperature 0.1, a masked vocabulary, a common offset."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lad_kernels import GRPOConfig, LinearLogprobs, linear_grpo_loss, linear_logprobs
from lad_kernels.head import dispatch, pytorch
from lad_kernels.testing import (
    CONTRACT_MARGIN,
    FP32_TOLERANCE,
    HeadInputs,
    check_head,
    of_probabilities,
    relative_error,
    run_head,
)

IMPLS = ("torch", "triton")
GAPS = (-200.0, -88.3, -84.0, 20.0, 84.0, 87.0, 88.0, 88.3, 88.6, 88.8, 103.0, 200.0)  # e^88.7 leaves float32
SLAB = 128  # columns
N, D, V = 9, 16, 3 * SLAB - 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """The PyTorch path cuts this vocabulary into three slabs."""
    monkeypatch.setattr(pytorch, "TILE_BYTES", 4 * SLAB * N)


def make(levels: tuple[float, ...], dtype: torch.dtype, seed: int = 0) -> HeadInputs:
    """Logits of slab i lie about levels[i]; the targets fall into every slab."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=gen)
    weight = torch.randn(V, D, generator=gen) / D**0.5
    bias = torch.tensor(levels).repeat_interleave(SLAB)[:V]
    targets = torch.arange(N) % 3 * SLAB + torch.randint(0, SLAB - 5, (N,), generator=gen)
    upstream = torch.randn(N, generator=gen)
    mask = torch.ones(N, dtype=torch.bool)
    return HeadInputs(*(x.to(DEVICE) for x in (hidden, weight, bias, targets, mask, upstream)), {}).cast(dtype)


def head(impl: str):
    return lambda *args, **options: linear_logprobs(*args, impl=impl, **options)


def gradients(loss_of, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss_of(*leaves).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("gap", GAPS)
def test_gaps_between_slabs(gap, dtype):
    """Log-probs, entropy and every gradient, whichever slab comes first."""
    for order in itertools.permutations((0.0, gap / 2, gap)):
        inputs = make(order, dtype)
        upstream = torch.linspace(-1, 1, N, device=DEVICE)
        if dtype != torch.float64:
            check_head(head("torch"), inputs, entropy_upstream=upstream)
            continue
        ours, truth = (run_head(head(impl), inputs, entropy_upstream=upstream) for impl in ("torch", "reference"))
        for x, y in zip(vars(ours).values(), vars(truth).values()):
            assert relative_error(x, y) < 1e-13


@pytest.mark.parametrize("gap", (-88.3, 88.3, 200.0))
def test_gaps_between_blocks_in_kernels(gap):
    """float32 alone: the epilogue, where exponentials are, is the same in 16 bits."""
    for order in ((0.0, gap, gap / 2), (gap, gap / 2, 0.0)):
        check_head(head("triton"), make(order, torch.float32), entropy_upstream=torch.linspace(-1, 1, N, device=DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("gap", (-88.3, 84.0, 88.3, 200.0))
def test_gaps_on_every_path(gap, path, impl):
    """REINFORCE with weights of both signs, whose coefficients every path can take."""
    if impl == "triton" and path == "one_pass" and abs(gap) > 60:
        pytest.skip("one pass in Triton hands log-probs below -44 to two passes, which the other cases run")
    inputs = make((0.0, gap, gap / 2), torch.float32)

    def loss(impl):
        config = GRPOConfig(policy_loss="reinforce", tail_mass=0.0, backward="routed" if path == "routed" else "auto")
        return lambda h, w, b: (
            linear_grpo_loss(
                h,
                w,
                inputs.targets,
                advantages=inputs.upstream.to(h.dtype),
                bias=b,
                normalizer=1.0,
                config=config,
                impl=impl,
            ).loss
        )

    given = (inputs.hidden, inputs.weight, inputs.bias)
    with dispatch.force(path):
        ours = gradients(loss(impl), *given)
    truth = gradients(loss("reference"), *(x.double() for x in given))
    contract = gradients(loss("reference"), *given)
    for x, y, z in zip(ours, truth, contract):
        assert relative_error(x, y) <= max(CONTRACT_MARGIN * relative_error(z, y), FP32_TOLERANCE)


@pytest.mark.parametrize("offset", (-200.0, 200.0, 3000.0))
def test_a_common_offset_costs_nothing(offset):
    """All logits share it, so it cancels; rounding lse would put one error into all probabilities of a token.

    Against `log_softmax` of stored float32 logits, which cannot know them better: measured 0.99 to 1.00 of its errors
    at all offsets, and 1.3 to 3.0 with a gradient from one rounded lse.
    """
    gen = torch.Generator().manual_seed(1)
    tokens, vocabulary = 64, 4000
    hidden = 3 * torch.randn(tokens, 32, generator=gen)
    weight = torch.randn(vocabulary, 32, generator=gen) / 32**0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=gen)
    bias, upstream = torch.full((vocabulary,), offset), torch.randn(tokens, generator=gen)
    inputs = HeadInputs(hidden, weight, bias, targets, torch.ones(tokens, dtype=torch.bool), upstream, {})

    def plain(hidden, weight, targets, *, bias, **_) -> LinearLogprobs:
        log_p = (hidden @ weight.T + bias).log_softmax(-1)  # [N, V], relative to the largest logit inside
        return LinearLogprobs(log_p.gather(1, targets[:, None])[:, 0], None, None)

    ours, stored = run_head(head("torch"), inputs), run_head(plain, inputs)
    truth = run_head(plain, inputs.cast(torch.float64))
    for name in ("logprobs", "dhidden", "dweight", "dbias"):
        exact = getattr(truth, name)
        assert relative_error(getattr(ours, name), exact) <= 1.1 * relative_error(getattr(stored, name), exact), name


@pytest.mark.parametrize("path", dispatch.PATHS[1:])
def test_a_common_offset_of_some_tokens(path):
    """Logits about 3,000 that float32 holds exactly, and tokens without a gradient: gradients as about 0."""
    x = make((0.0, 0.5, 1.0), torch.float32)
    hidden, weight, bias = ((16 * y).round() / 16 for y in (x.hidden, x.weight, x.bias))
    advantages = torch.where(torch.arange(N, device=DEVICE) % 3 == 0, 0.0, x.upstream)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        config = GRPOConfig(tail_mass=0.0, backward="routed" if path == "routed" else "auto")
        old = torch.full((N,), -3.0, device=DEVICE)
        return linear_grpo_loss(h, w, x.targets, old, advantages=advantages, bias=b, config=config, impl="torch").loss

    with dispatch.force(path):
        near, far = (gradients(loss, hidden, weight, bias + offset) for offset in (0, 3000))
    for found, truth in zip(far, near):
        assert relative_error(found, truth) <= FP32_TOLERANCE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("excluded", ("some", "first slab", "last slab"))
def test_a_bias_of_minus_infinity_excludes_a_word(excluded, impl):
    """Probability 0, no part in the entropy, a gradient of exactly zero; the others are as if it did not exist."""
    inputs = make((0.0, 1.0, 2.0), torch.float32)
    gone = {"some": slice(3, None, 7), "first slab": slice(0, SLAB), "last slab": slice(2 * SLAB, None)}[excluded]
    kept = torch.ones(V, dtype=torch.bool, device=DEVICE)
    kept[gone] = False
    targets = kept.nonzero()[torch.arange(N, device=DEVICE) * 11, 0]
    masked = HeadInputs(
        inputs.hidden,
        inputs.weight,
        inputs.bias.masked_fill(~kept, -torch.inf),
        targets,
        inputs.loss_mask,
        inputs.upstream,
        {},
    )
    place = kept.cumsum(0) - 1
    small = HeadInputs(
        inputs.hidden, inputs.weight[kept], inputs.bias[kept], place[targets], inputs.loss_mask, inputs.upstream, {}
    )
    upstream = torch.linspace(-1, 1, N, device=DEVICE)
    ours = run_head(head(impl), masked, entropy_upstream=upstream)
    truth = run_head(head("reference"), small.cast(torch.float64), entropy_upstream=upstream)
    contract = run_head(head("reference"), small, entropy_upstream=upstream)
    assert not ours.dweight[~kept].any()
    assert not ours.dbias[~kept].any()
    ours = type(ours)(ours.logprobs, ours.entropy, ours.dhidden, ours.dweight[kept], ours.dbias[kept])
    for name, x in vars(ours).items():
        naive = relative_error(getattr(contract, name), getattr(truth, name))
        allowed = max(CONTRACT_MARGIN * naive, FP32_TOLERANCE, of_probabilities(torch.full((N,), 8.0)))
        assert relative_error(x, getattr(truth, name)) <= allowed, name
    reference = run_head(head("reference"), masked.cast(torch.float64), entropy_upstream=upstream)
    for x, y in zip(
        vars(reference).values(),
        vars(run_head(head("torch"), masked.cast(torch.float64), entropy_upstream=upstream)).values(),
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_an_excluded_target(impl):
    """Log-prob -inf; the gradient is the formula's, 1[j = y] - p_j with p_y = 0, and finite."""
    inputs = make((0.0, 0.0, 0.0), torch.float32)
    bias = inputs.bias.index_fill(0, inputs.targets[:1], -torch.inf)
    h, w, b = (x.clone().requires_grad_() for x in (inputs.hidden, inputs.weight, bias))
    out = linear_logprobs(h, w, inputs.targets, bias=b, return_entropy=True, impl=impl)
    assert out.logprobs[0] == -torch.inf
    assert out.entropy.isfinite().all()
    out.logprobs.backward(torch.eye(N, device=DEVICE)[0])
    p = (inputs.hidden.double() @ inputs.weight.double().T + bias).softmax(-1)  # [N, V]
    dz = torch.nn.functional.one_hot(inputs.targets[0], V) - p[0]
    torch.testing.assert_close(b.grad.double(), dz, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(h.grad[0].double(), dz @ inputs.weight.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_nothing_but_excluded_words(impl):
    """There is no distribution, and the results say so."""
    inputs = make((-torch.inf,) * 3, torch.float32)
    out = linear_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, return_entropy=True, impl=impl
    )
    assert out.logprobs.isnan().all()
    assert out.entropy.isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_temperatures_changed_before_the_backward_are_noticed(impl):
    inputs = make((0.0, 0.0, 0.0), torch.float32)
    temperature = torch.full((N,), 0.7, device=DEVICE)
    hidden = inputs.hidden.clone().requires_grad_()
    given = (hidden, inputs.weight, inputs.targets)
    losses = (
        linear_logprobs(*given, temperature=temperature, impl=impl).logprobs.sum(),
        linear_grpo_loss(
            *given, -inputs.upstream.abs(), advantages=inputs.upstream, temperature=temperature, impl=impl
        ).loss,
    )
    temperature.mul_(2)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
