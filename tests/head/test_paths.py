"""Every path through the head against the specification: one pass, two pass, routed; what each drops and what it costs.

Float64 makes rounding negligible: paths that promise exactness must agree with the specification to 1e-9, and the error
of a routed gradient must be below its error bound.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss, linear_logprobs, reference
from lad_kernels.head import cost, dispatch, flops, memory, pytorch
from lad_kernels.head.records import BLOCK, LogitGradient, LogitTransform, Needs
from lad_kernels.head.routing import _draws, route
from lad_kernels.testing import FP32_TOLERANCE, make_inputs, relative_error

B, T, D, V = 6, 12, 24, 5 * BLOCK + 37
M = B * T


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: 30)  # several chunks, two sequences each


def batch(entropy: float | None = 0.5, *, drift: float | None = 0.3, seed: int = 0, **options) -> dict:
    """Keywords of `linear_lad_loss` in float64; drift None is on-policy. Two advantages are zero, one token masked."""
    x = make_inputs(M, D, V, dtype=torch.float64, entropy=entropy, masked=0.0, seed=seed, **options)
    gen = torch.Generator().manual_seed(seed + 1)
    logprobs = reference.linear_logprobs(x.hidden, x.weight, x.targets, bias=x.bias, **x.options).logprobs
    old = None if drift is None else (logprobs + drift * torch.randn(M, generator=gen)).clamp(max=0.0).view(B, T)
    advantages = torch.randn(B, generator=gen, dtype=torch.float64)
    advantages[:2] = 0
    mask = torch.ones(B, T)
    mask[2, -3:] = 0
    return dict(
        hidden_states=x.hidden.view(B, T, D),
        lm_head_weight=x.weight,
        target_ids=x.targets.view(B, T),
        old_logprobs=old,
        advantages=advantages,
        loss_mask=mask,
        bias=x.bias,
        **x.options,
    )


def run(loss, inputs: dict, dtype: torch.dtype = torch.float64, **more) -> tuple:
    """(output, {leaf: gradient})."""
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = ("hidden_states", "lm_head_weight") + (("bias",) if inputs["bias"] is not None else ())
    cast |= {k: cast[k].clone().requires_grad_() for k in leaves}
    out = loss(**cast, **more)
    out.loss.backward()
    return out, {k: cast[k].grad for k in leaves}


OBJECTIVES = {
    "js, tokens": LADConfig(),
    "sequences": LADConfig("hd", importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-mean"),
    "sequence sums": LADConfig("tv", eta=2.0, importance_sampling_level="sequence_sum"),
    "entropy": LADConfig("kl", entropy_coef=0.1),
    "reference policy": LADConfig(kl_coef=0.3),
    "clipped": GRPOConfig(epsilon_low=0.1, epsilon_high=0.1),
    "reinforce": GRPOConfig(policy_loss="reinforce"),
}
TRANSFORMS = {
    "plain": {},
    "all": dict(bias=True, logit_scale=0.7, softcap=9.0, temperature=0.8),
    "bias, temperatures": dict(bias=True, temperature=torch.linspace(0.5, 1.5, M, dtype=torch.float64).view(B, T)),
}


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_paths_equal_the_specification(objective, on_policy, path):
    """With tail_mass 0 every path is exact; zero-coefficient tokens are dropped, and masked ones."""
    config = dataclasses.replace(OBJECTIVES[objective], tail_mass=0.0)
    for options in TRANSFORMS.values():
        temperature = options.get("temperature", 1.0)
        scalar = {k: v for k, v in options.items() if k != "temperature" or not isinstance(v, Tensor)}
        inputs = batch(drift=None if on_policy else 0.3, **scalar) | {"temperature": temperature}
        inputs["ref_logprobs"] = torch.full((B, T), -1.5, dtype=torch.float64)
        lad = isinstance(config, LADConfig)
        spec = reference.linear_lad_loss if lad else reference.linear_grpo_loss
        truth, expected = run(spec, inputs, config=config)
        with dispatch.force(path):
            found, gradients = run(linear_lad_loss if lad else linear_grpo_loss, inputs, config=config, impl="torch")
        torch.testing.assert_close(found.loss, truth.loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.logprobs, truth.logprobs, rtol=1e-9, atol=1e-9)
        for leaf, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[leaf], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kernels_take_every_path(transform, on_policy, path, device, monkeypatch):
    """In float32 and exact, the Triton paths agree with the specification in float64; no token is left to dense."""
    monkeypatch.setattr(cost, "dense_share", lambda work: 2.0)  # never
    inputs = batch(None, drift=None if on_policy else 0.3, **TRANSFORMS["all"] if transform == "all" else {})
    inputs["temperature"] = TRANSFORMS[transform].get("temperature", 1.0)
    inputs["bias"] = inputs["bias"] if transform == "all" else None
    truth, expected = run(reference.linear_lad_loss, inputs)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with dispatch.force(path):
        found, gradients = run(
            linear_lad_loss, on_device, torch.float32, config=LADConfig(tail_mass=1e-9), impl="triton"
        )
    assert relative_error(found.logprobs.cpu(), truth.logprobs) < FP32_TOLERANCE
    for leaf, gradient in gradients.items():
        assert relative_error(gradient.cpu(), expected[leaf]) < FP32_TOLERANCE, leaf


def adversarial(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits made to order: hidden is the identity, so that z[n] = weight[:, n]. (hidden, weight, targets, c)."""
    gen = torch.Generator().manual_seed(3)
    n, v, theta = 40, 6 * BLOCK - 5, 3e-3
    block = torch.arange(v) // BLOCK
    c = torch.randn(n, generator=gen, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=gen)
    if name == "just under the threshold in every block":
        c = torch.ones(n, dtype=torch.float64)
        p = torch.full((n, v), 1.0, dtype=torch.float64) * (0.999 * theta) / BLOCK
        p[:, block == 0] = (1 - 0.999 * theta * 5) / BLOCK
        z, targets = p.log(), targets % BLOCK
    elif name == "uniform rows":
        z = torch.zeros(n, v, dtype=torch.float64)
    elif name == "one huge logit":
        z = torch.randn(n, v, generator=gen, dtype=torch.float64)
        z[torch.arange(n), targets] = 60.0
    elif name == "target in the coldest block":
        z = torch.randn(n, v, generator=gen, dtype=torch.float64) - 8.0 * block
        targets = v - 1 - targets % 100
    else:
        z = 3 * torch.randn(n, v, generator=gen, dtype=torch.float64)
        c = c * torch.logspace(-6, 6, n, dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64), z.T.contiguous(), targets, c


ADVERSARIES = (
    "just under the threshold in every block",
    "uniform rows",
    "one huge logit",
    "target in the coldest block",
    "coefficients over twelve orders of magnitude",
)


def certify(name: str, theta: float, *, unbiased=False, entropy_gradient=False, route=route):
    """Route, and compare the routed gradient with the exact one and with its error bound; (error bound, dW error)."""
    torch.manual_seed(0)
    hidden, weight, targets, c = adversarial(name)
    plain = LogitTransform()
    out = pytorch.forward(hidden, weight, targets, None, plain, want_entropy=True, want_block_lse=True)
    g = 0.3 * c.flip(0) if entropy_gradient else None
    gradient = LogitGradient(c, -c if g is None else -c - g * out.entropy, g)
    routing, certificate = route(
        hidden, weight, targets, plain, out.lse, out.logprobs, out.block_lse, gradient, theta, unbiased=unbiased,
        dense_share=0.9 if theta else 2.0,
    )  # fmt: skip
    arguments = (hidden, weight, targets, None, plain, out.lse, gradient)
    needs = Needs(True, True, False)
    exact, routed = (pytorch.backward(*arguments, x, needs=needs) for x in (None, routing))
    for found, truth, bound in (
        (routed.hidden, exact.hidden, certificate.dhidden_bound),
        (routed.weight, exact.weight, certificate.dweight_bound),
    ):
        error, rounding = (found - truth).norm(), 1e-13 * truth.norm()
        print(f"{name}, theta {theta}: error {error:.2e} bound {bound:.2e}, pairs {certificate.pairs:.0f}")
        assert error <= bound + rounding
    return certificate, ((routed.weight - exact.weight).norm() / exact.weight.norm()).item()


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("theta", [0.0, 1e-4, 3e-3, 0.2])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_certified_bound(name, theta, unbiased, entropy_gradient):
    """The error of dH and dW is at most the error bound, for any data; printed with -s."""
    certificate, error = certify(name, theta, unbiased=unbiased, entropy_gradient=entropy_gradient)
    if theta == 0:
        assert certificate.dhidden_bound == certificate.dweight_bound == 0
    if name == ADVERSARIES[0] and theta == 3e-3 and not (unbiased or entropy_gradient):
        assert certificate.pairs == 40  # the target's block alone
        assert error > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_is_routed_within_its_bound(dtype, device, monkeypatch):
    """Peaked policy, in working precision: error against float64 within the bound plus the dense path's own error."""
    whole_from = cost.SPEEDS["cpu", 4].routed_efficiency  # on every device the same tokens are whole
    monkeypatch.setattr(cost, "dense_share", lambda work: whole_from)
    inputs = batch(0.4)
    inputs = {k: v.to(dtype).double() if k in ("hidden_states", "lm_head_weight") else v for k, v in inputs.items()}
    _, truth = run(reference.linear_lad_loss, inputs)
    cast = {k: v.to(dtype) if k in ("hidden_states", "lm_head_weight") else v for k, v in inputs.items()}
    cast = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast.items()}
    results = {}
    for path in ("two_pass", "routed"):
        leaves = {k: cast[k].clone().requires_grad_() for k in ("hidden_states", "lm_head_weight")}
        with dispatch.force(path):
            out = linear_lad_loss(**cast | leaves, config=LADConfig(tail_mass=1e-2))
        out.loss.backward()
        results[path] = out.metrics, {k: v.grad.double().cpu() for k, v in leaves.items()}
    metrics, routed = results["routed"]
    assert (results["two_pass"][0]["routed_share"], metrics["routed_share"]) == (0, 1)
    dense = results["two_pass"][1]
    assert metrics["kept_share"] < 0.5
    assert 0 < metrics["dropped_mass_mean"] < metrics["dropped_mass_max"] <= 2
    for leaf, bound in (("hidden_states", "dhidden_bound"), ("lm_head_weight", "dweight_bound")):
        error, rounding = (routed[leaf] - truth[leaf]).norm(), (dense[leaf] - truth[leaf]).norm()
        assert error > 2 * rounding  # something was dropped
        assert error <= metrics[bound].cpu() + 2 * rounding


@pytest.mark.parametrize("path", ["two_pass", "routed"])
def test_a_loss_scaler_comes_before_float16(path, device):
    """Gradients of about 1e-8: rounded before the factor of a loss scaler they would be gone. Measured: 5.5e-3."""
    inputs = batch(0.4) | {"bias": None}
    _, truth = run(reference.linear_lad_loss, inputs, normalizer=1e8)
    cast = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = {k: cast[k].half().requires_grad_() for k in ("hidden_states", "lm_head_weight")}
    with dispatch.force(path):
        config = LADConfig(tail_mass=1e-4, backward="routed" if path == "routed" else "auto")
        out = linear_lad_loss(**cast | leaves, impl="triton", config=config, normalizer=1e8)
    (out.loss * 2.0**24).backward()
    assert out.metrics["routed_share"] == (path == "routed")
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad.double().cpu() / 2**24, truth[name]) < 1.1e-2


def test_no_tail_mass_is_dense_bit_for_bit():
    inputs = batch()
    results = [
        run(linear_lad_loss, inputs, torch.float32, config=LADConfig(backward=backward, tail_mass=0.0))
        for backward in ("auto", "routed", "dense")
    ]
    for out, gradients in results[:2]:
        assert out.metrics["dhidden_bound"] == 0
        for leaf in gradients:
            assert torch.equal(gradients[leaf], results[2][1][leaf])


def test_unbiased_tail_has_the_exact_mean():
    """The mean of 400 unbiased gradients is the exact one within its standard error; a dropped tail lies far off.

    Draws depend on the bits of the inputs: hidden states are moved by 1e-12, which the gradient does not see.
    """
    inputs, config = batch(), LADConfig(tail_mass=0.2)
    _, exact = run(linear_lad_loss, inputs, config=LADConfig(backward="dense"))
    draws, hidden = [], inputs["hidden_states"]
    with dispatch.force("routed"):
        _, dropped = run(linear_lad_loss, inputs, config=dataclasses.replace(config, tail="drop"))
        for i in range(400):
            draws.append(run(linear_lad_loss, inputs | {"hidden_states": hidden * (1 + i * 1e-12)}, config=config)[1])
    for leaf in exact:
        seen = torch.stack([d[leaf] for d in draws])  # [400, ...]
        off = (seen.mean(0) - exact[leaf]).norm()
        noise = (seen.var(0).sum() / len(draws)).sqrt()
        assert off < 1.5 * noise
        assert (dropped[leaf] - exact[leaf]).norm() > 3 * noise


def test_draws_are_uniform_independent_and_reproducible():
    lse = torch.linspace(3.0, 3.001, 512)
    u = _draws(lse, slice(5, 205)).double()  # [200, 512]
    assert torch.equal(u, _draws(lse, slice(5, 205)).double())
    assert torch.equal(u[:3].float(), _draws(lse, slice(5, 8)))
    share = torch.histc(u, 64, 0, 1) / u.numel() * 64
    assert (share - 1).abs().max() < 0.15  # 1,600 draws a bin: 2.5 % standard deviation
    rows, columns = torch.corrcoef(u), torch.corrcoef(u.T)
    assert (rows - torch.eye(200)).abs().max() < 0.25
    assert (columns - torch.eye(512)).abs().max() < 0.4
    same = _draws(torch.full((512,), 3.0), slice(0, 200)).double()  # repeated sequences draw apart
    assert (torch.corrcoef(same.T) - torch.eye(512)).abs().max() < 0.4


def test_nothing_that_is_not_a_number_is_dropped():
    inputs = batch()
    inputs["hidden_states"][3, 4] = torch.nan
    with dispatch.force("routed"):
        _, gradients = run(linear_lad_loss, inputs, config=LADConfig(tail_mass=1e-2))
    assert gradients["hidden_states"][3, 4].isnan().all()
    assert gradients["lm_head_weight"].isnan().any()


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_a_second_backward_gives_the_same_gradient(path):
    inputs = batch()
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden_states", "lm_head_weight")}
    with dispatch.force(path):
        out = linear_lad_loss(**inputs | leaves)
    first = torch.autograd.grad(out.loss, list(leaves.values()), 3 * torch.ones(()).double(), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(out.loss, list(leaves.values()), retain_graph=True)
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c, rtol=1e-9, atol=1e-12)


def test_log_probs_that_nobody_wants_are_not_computed():
    """On-policy, a third of the advantages zero: those tokens skip even the forward."""
    inputs = batch(drift=None)
    shown, expected = run(linear_lad_loss, inputs, config=LADConfig(backward="dense"))
    out, gradients = run(linear_lad_loss, inputs, config=LADConfig(backward="dense"), return_logprobs=False)
    assert out.logprobs is None
    torch.testing.assert_close(out.loss, shown.loss, rtol=1e-12, atol=0)
    for leaf in gradients:
        torch.testing.assert_close(gradients[leaf], expected[leaf], rtol=1e-9, atol=1e-12)
    assert out.metrics["head_flops"] < shown.metrics["head_flops"]
    with torch.no_grad():
        out = linear_lad_loss(**inputs, return_logprobs=False)
    assert out.metrics["head_flops"] == 0
    torch.testing.assert_close(out.loss, shown.loss, rtol=1e-12, atol=0)


def in_place(out: tuple, a: tuple, b: tuple, **_) -> int:
    return 2 * a[0] * a[1] * b[1]


def counting() -> FlopCounterMode:
    """torch's own count, which leaves out products that are added in place unless told of them."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


LIVE = M - 3 - 2 * T  # not masked, advantage not zero
FLOPS = {  # path, on-policy: products of D x V per token that takes part
    ("one_pass", False): 6 * (M - 3) - 4 * 2 * T,  # the dead rows of a chunk are left out of its gradient products
    ("one_pass", True): 2 * (M - 3) + 4 * LIVE,
    ("two_pass", False): 2 * (M - 3) + 6 * LIVE,
    ("two_pass", True): 2 * (M - 3) + 6 * LIVE,
}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("path", ["one_pass", "two_pass", "routed"])
def test_flops_are_those_of_the_formula_and_of_torch(path, on_policy):
    """PPO's coefficient is exactly 0 where A = 0, off-policy too. torch counts the products that it dispatches."""
    inputs, config = batch(drift=None if on_policy else 0.1), GRPOConfig(tail_mass=1e-2, epsilon_low=9, epsilon_high=9)
    with dispatch.force(path), counting() as torch_counts:
        out, _ = run(linear_grpo_loss, inputs, torch.float32, config=config)
    counted = out.metrics["head_flops"]
    assert counted == torch_counts.get_total_flops()
    if path != "routed":
        assert counted == FLOPS[path, on_policy] * D * V
        kept = LIVE if on_policy or path == "two_pass" else M - 3
        assert out.metrics["kept_share"] == pytest.approx(kept / (M - 3))
    else:
        pairs = out.metrics["kept_share"] * (M - 3) * -(-V // BLOCK)
        bound = 2 * (M - 3) * D * V + 6 * D * BLOCK * pairs
        assert bound * 0.9 < counted <= bound * (1 + 1e-6)  # pairs of the last, partial block are narrower


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("path", dispatch.PATHS)
def test_metrics_are_final_when_they_are_returned(path, impl, device):
    """`head_flops` holds the backward's products before it has run: those that are then launched."""
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch(drift=0.1).items()}
    inputs |= {k: v.float() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    leaves = [inputs[k].requires_grad_() for k in ("hidden_states", "lm_head_weight")]
    one_thread = torch.autograd.set_multithreading_enabled(False)  # that of the tally
    with dispatch.force(path), flops.counting() as tally, one_thread:
        out = linear_grpo_loss(**inputs, config=GRPOConfig(tail_mass=1e-2), impl=impl)
        before = {name: x.clone() for name, x in out.metrics.items()}
        torch.autograd.grad(out.loss, leaves)
    assert before.keys() == out.metrics.keys()
    assert all(torch.equal(x, out.metrics[name]) for name, x in before.items())
    assert tally[0] == before["head_flops"] > 0


def test_score_alone():
    inputs = batch()
    with torch.no_grad():
        out = linear_lad_loss(**inputs)
    assert out.metrics["head_flops"] == 2 * (M - 3) * D * V
    assert "kept_share" not in out.metrics


def test_log_probs_of_dead_tokens_stay_out_of_the_backward():
    """linear_logprobs: tokens whose upstream gradient is zero cost nothing in the backward."""
    x = make_inputs(M, D, V, masked=0.0)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    upstream = torch.where(torch.arange(M) < 10, 1.0, 0.0)
    out = linear_logprobs(hidden, weight, x.targets)
    with flops.counting() as tally:  # PyTorch's counter does not look into an operator
        (out.logprobs * upstream).sum().backward()
    assert tally[0] == 6 * 10 * D * V
    assert hidden.grad[10:].count_nonzero() == 0
