"""linear_lad_loss, linear_grpo_loss, lad_loss, grpo_loss and group_advantages against the float64 specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_kernels import (
    GRPOConfig,
    LADConfig,
    LADLoss,
    group_advantages,
    grpo_loss,
    lad_loss,
    linear_grpo_loss,
    linear_lad_loss,
    reference,
)
from lad_kernels.objective.config import ADVANTAGE_SCALES, AGGREGATIONS, DIVERGENCES, LEVELS
from lad_kernels.testing import relative_error

IMPLS = ("torch", "triton")
B, T, D, V = 6, 9, 24, 150
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6}  # float32: measured 1.2e-6 (PyTorch), 8e-7 (Triton)


def batch(dtype=torch.float64, device="cpu", seed=0, padded=True):
    """A padded batch, or the same tokens packed with an empty and a one-token sequence, as keyword arguments."""
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(B, T, generator=gen) > 0.3
    mask[1] = False
    mask[2] = torch.arange(T) == 4
    old = -4 * torch.rand(B, T, generator=gen, dtype=torch.float64) - 1
    kw = dict(
        hidden_states=rand(B, T, D),
        lm_head_weight=rand(V, D) / 2,
        bias=rand(V),
        target_ids=torch.where(mask, torch.randint(0, V, (B, T), generator=gen), -100),
        old_logprobs=old,
        loss_mask=mask,
        ref_logprobs=old + 0.2 * rand(B, T),
    )
    if not padded:
        kw = {k: v.flatten(0, 1) if k not in ("lm_head_weight", "bias") else v for k, v in kw.items()}
        kw["cu_seqlens"] = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in kw.items()}


def run(loss, kw, **more):
    leaves = {k: kw[k].detach().clone().requires_grad_() for k in ("hidden_states", "lm_head_weight", "bias")}
    out = loss(**{**kw, **leaves}, **more)
    return out, torch.autograd.grad(out.loss, list(leaves.values()))


def compare(kw, config, impl, **more):
    """Our loss, gradients, advantages and metrics against the specification in float64."""
    lad = isinstance(config, LADConfig)
    ours, grads = run(linear_lad_loss if lad else linear_grpo_loss, kw, config=config, impl=impl, **more)
    double = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    kw64, more64 = ({k: double(v) for k, v in d.items()} for d in (kw, more))
    spec = reference.linear_lad_loss if lad else reference.linear_grpo_loss
    truth, truths = run(spec, kw64, config=config, **more64)
    allowed = TOLERANCE[kw["hidden_states"].dtype]
    errors = {"loss": relative_error(ours.loss, truth.loss)}
    errors |= {name: relative_error(a, b) for name, a, b in zip(("dH", "dW", "dbias"), grads, truths)}
    assert all(e <= allowed for e in errors.values()), errors
    torch.testing.assert_close(ours.advantages.double(), truth.advantages, rtol=allowed, atol=allowed)
    for name, value in truth.metrics.items():
        torch.testing.assert_close(ours.metrics[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)
    assert not grads[0].reshape(B * T, D)[~kw["loss_mask"].reshape(-1)].count_nonzero()


LAD = {
    **{
        f"{d}-{level}": LADConfig(divergence=d, importance_sampling_level=level, eta=1.0)
        for d in DIVERGENCES
        for level in LEVELS
    },
    **{
        f"js-{agg}-{level}": LADConfig(loss_agg_mode=agg, importance_sampling_level=level)
        for agg in AGGREGATIONS
        for level in LEVELS
    },
    "kl centered": LADConfig(divergence="kl", centered=True),
    "rkl centered": LADConfig(divergence="rkl", centered=True, eta=1.0),
    "target norm": LADConfig(target_norm="group"),
    "clamps": LADConfig(log_ratio_clamp=0.5, target_clamp=1.0),
    "clamps, sequence": LADConfig(log_ratio_clamp=4.0, importance_sampling_level="sequence"),
    "bounds": LADConfig(epsilon_low=0.1, epsilon_high=0.1),
    "bounds, sequence": LADConfig(epsilon_low=0.02, epsilon_high=0.02, importance_sampling_level="sequence"),
    "kl to reference": LADConfig(kl_coef=0.3),
    "entropy bonus": LADConfig(entropy_coef=0.2, kl_coef=0.1, loss_agg_mode="seq-mean-token-mean"),
}
GRPO = {
    **{
        f"ppo-{agg}-{level}": GRPOConfig(loss_agg_mode=agg, importance_sampling_level=level)
        for agg in AGGREGATIONS
        for level in LEVELS
    },
    "dapo": GRPOConfig(epsilon_high=0.28),
    "dual clip": GRPOConfig(dual_clip=1.5),
    "dr grpo": GRPOConfig(advantage_scale="none", loss_agg_mode="seq-mean-token-sum-norm"),
    "gspo": GRPOConfig(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
    "cispo": GRPOConfig(policy_loss="cispo"),
    "rloo": GRPOConfig(policy_loss="reinforce", advantage_scale="loo"),
    "sapo": GRPOConfig(policy_loss="sapo", loss_agg_mode="seq-mean-token-mean"),
    "sapo of the mean": GRPOConfig(policy_loss="sapo", importance_sampling_level="sequence"),
    "vespo": GRPOConfig(policy_loss="vespo", importance_sampling_level="sequence_sum", log_ratio_clamp=2.0),
    "luspo": GRPOConfig(policy_loss="luspo", importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-sum"),
    "everything": GRPOConfig(kl_coef=0.1, entropy_coef=0.1, log_ratio_clamp=0.7, advantage_scale="batch"),
}


@pytest.mark.parametrize("name", LAD)
def test_lad_float64(name):
    compare(batch(), LAD[name], "torch", rewards=torch.randn(B, dtype=torch.float64).sort().values, group_size=3)


@pytest.mark.parametrize("name", GRPO)
def test_grpo_float64(name):
    compare(batch(), GRPO[name], "torch", rewards=torch.arange(B, dtype=torch.float64) % 3, group_size=3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name", ("js-token", "hd-sequence", "tv-sequence_sum", "entropy bonus", "target norm", "clamps", "bounds")
)
def test_lad_float32(name, impl, device):
    kw = batch(torch.float32, device, padded=False)
    compare(kw, LAD[name], impl, rewards=torch.tensor([1.0, 0, 0, 1, 1, 0], device=device), group_size=3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ("dapo", "dual clip", "gspo", "cispo", "rloo", "everything", "sapo", "vespo", "luspo"))
def test_grpo_float32(name, impl, device):
    kw = batch(torch.float32, device)
    compare(kw, GRPO[name], impl, rewards=torch.tensor([1.0, 0, 0, 1, 1, 0], device=device), group_size=3)


@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_groups_rollout_weights_and_token_advantages(impl, device):
    dtype = torch.float64 if impl == "torch" else torch.float32
    kw = batch(dtype, device, padded=False)
    rewards = torch.tensor([1.0, 0.5, -1, torch.nan, 2, 0.25], dtype=dtype, device=device)
    ids = torch.tensor([4, 9, 4, 9, 4, 1], device=device)
    weights = torch.rand(B, dtype=dtype, device=device, generator=None)
    compare(kw, LADConfig(eta=1.0), impl, rewards=rewards, group_ids=ids, rollout_is_weights=weights)
    by_token = torch.randn(B * T, dtype=dtype).to(device)
    compare(kw, GRPOConfig(), impl, advantages=by_token, rollout_is_weights=by_token.abs())
    sequence = LADConfig(importance_sampling_level="sequence", eta=1.0)
    compare(kw, sequence, impl, advantages=by_token, rollout_is_weights=weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_per_token_advantages_when_kept_tokens_equal_sequences(impl, device):
    """Four sequences and four kept tokens: a length cannot tell per-token from per-sequence values."""
    gen = torch.Generator().manual_seed(5)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, :2], mask[2, 1], mask[3, 2] = True, True, True
    logp, old, adv = (torch.randn(4, 3, generator=gen).sub(2) for _ in range(3))
    ours = lad_loss(
        logp.to(device), old.to(device), adv.to(device), loss_mask=mask.to(device), config=LADConfig(eta=2.0), impl=impl
    )
    spec = reference.lad_loss(logp.double(), old.double(), adv.double(), loss_mask=mask, config=LADConfig(eta=2.0))
    torch.testing.assert_close(ours.loss.cpu().double(), spec.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_on_policy_ratio_is_exactly_one(impl, device):
    kw = batch(torch.float32, device)
    kw["old_logprobs"] = None
    out, grads = run(linear_lad_loss, kw, advantages=torch.randn(B, device=device), impl=impl)
    assert out.metrics["ratio_mean"].item() == 1
    assert out.metrics["approx_kl_k1"].item() == 0
    assert out.metrics["loss_above_start"].item() == 0
    assert grads[0].count_nonzero()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", [LADConfig(entropy_coef=0.1), GRPOConfig(importance_sampling_level="sequence")])
def test_all_masked_is_a_differentiable_zero(impl, config, device):
    kw = batch(torch.float32, device)
    kw["loss_mask"] = torch.zeros_like(kw["loss_mask"])
    kw["target_ids"] = torch.full_like(kw["target_ids"], -100)
    loss = linear_lad_loss if isinstance(config, LADConfig) else linear_grpo_loss
    out, grads = run(loss, kw, advantages=torch.randn(B, device=device), config=config, impl=impl)
    assert out.loss.item() == 0
    assert not any(g.count_nonzero() for g in grads)
    assert all(m.isfinite() for m in out.metrics.values())


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 4e-6)], ids=str)
def test_gradient_accumulation_equals_one_large_batch(mode, dtype, allowed):
    """Three micro-batches of two sequences with the global normalizer.

    float32 measured: 2.4e-7 with kernels that give a token the same logits whatever tokens stand beside it, 2.2e-6 with
    others (SSE), as far as each side is from float64.
    """
    kw, adv = batch(dtype), torch.randn(B, dtype=dtype)
    lengths = kw["loss_mask"].sum(1)
    total = {"token-mean": lengths.sum().item(), "seq-mean-token-sum-norm": B * T}.get(mode, (lengths > 0).sum().item())
    config = LADConfig(loss_agg_mode=mode, importance_sampling_level="sequence", entropy_coef=0.1, kl_coef=0.1)
    whole, grads = run(linear_lad_loss, kw, advantages=adv, config=config)
    value, parts = 0.0, None
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        micro = {k: v if k in ("lm_head_weight", "bias") else v[rows] for k, v in kw.items()}
        out, g = run(linear_lad_loss, micro, advantages=adv[rows], config=config, normalizer=total)
        value = value + out.loss
        parts = [g[0], g[1], g[2]] if parts is None else [torch.cat([parts[0], g[0]]), parts[1] + g[1], parts[2] + g[2]]
    assert relative_error(value.detach(), whole.loss.detach()) <= allowed
    for a, b in zip(parts, grads):
        assert relative_error(a, b) <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_and_backward_twice(impl, device):
    kw = batch(torch.float32, device)
    h = kw.pop("hidden_states").requires_grad_()
    out = linear_lad_loss(h, advantages=torch.randn(B, device=device), impl=impl, **kw)
    (once,) = torch.autograd.grad(out.loss, h, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3 * out.loss, h)
    assert relative_error(scaled, -3 * once) <= 1e-6


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_head_and_objective_can_be_called_apart(impl, device):
    """lad_loss on linear_logprobs gives what linear_lad_loss gives."""
    from lad_kernels import linear_logprobs

    kw = batch(torch.float32, device)
    config = LADConfig(entropy_coef=0.1, importance_sampling_level="sequence")
    adv = torch.randn(B, device=device)
    whole, grads = run(linear_lad_loss, kw, advantages=adv, config=config, impl=impl)
    leaves = [kw[k].detach().clone().requires_grad_() for k in ("hidden_states", "lm_head_weight", "bias")]
    lp = linear_logprobs(
        *leaves[:2], kw["target_ids"], bias=leaves[2], loss_mask=kw["loss_mask"], return_entropy=True, impl=impl
    )
    apart = lad_loss(
        lp.logprobs, kw["old_logprobs"], adv, loss_mask=kw["loss_mask"], config=config, entropy=lp.entropy, impl=impl
    )
    torch.testing.assert_close(apart.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(apart.loss, leaves), grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_grpo_loss_on_logprobs(device):
    logp = torch.tensor([-1.0, -2.0], device=device, requires_grad=True)
    out = grpo_loss(logp, torch.tensor([-1.1, -2.0], device=device), torch.tensor([1.0, -1.0], device=device))
    out.loss.backward()
    ratio = torch.tensor([0.1, 0.0]).exp()
    torch.testing.assert_close(logp.grad.cpu(), torch.tensor([-1.0, 1.0]) * ratio / 2)


def test_module_binds_constants(device):
    kw = batch(torch.float32, device)
    adv = torch.randn(B, device=device)
    module = LADLoss(LADConfig(eta=1.0), temperature=0.7)
    a = module(advantages=adv, **kw).loss
    b = linear_lad_loss(advantages=adv, config=LADConfig(eta=1.0), temperature=0.7, **kw).loss
    assert torch.equal(a, b)
    assert "eta=1.0" in repr(module)


def test_autocast(device):
    """float32 parameters under autocast: the head runs in bfloat16, gradients come back in float32."""
    kw = batch(torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, grads = run(linear_lad_loss, kw, advantages=torch.ones(B, device=device))
    rounded = {**kw, "hidden_states": kw["hidden_states"].bfloat16(), "lm_head_weight": kw["lm_head_weight"].bfloat16()}
    same = linear_lad_loss(advantages=torch.ones(B, device=device), **rounded)
    assert torch.equal(out.loss, same.loss)
    assert all(g.dtype == torch.float32 for g in grads)


def test_torch_compile_of_a_step(device):
    """A compiled step that contains the call: a clean graph break, same numbers."""
    kw = batch(torch.float32, device)
    adv = torch.randn(B, device=device)
    proj = torch.nn.Linear(D, D, device=device)

    def step(h):
        return (
            linear_lad_loss(
                torch.tanh(proj(h)), advantages=adv, **{k: v for k, v in kw.items() if k != "hidden_states"}
            ).loss
            * 2
        )

    eager = step(kw["hidden_states"])
    compiled = torch.compile(step, backend="aot_eager")(kw["hidden_states"])
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    compiled.backward()
    assert proj.weight.grad.count_nonzero()


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_advantages(scale, device):
    rewards = torch.tensor([100.01, 99.99, 100.0, 5, 5, 5, torch.nan, 1, torch.inf, 3.0, -2.0], device=device)
    ids = torch.tensor([2, 2, 2, 0, 0, 0, 7, 7, 7, 7, 11], device=device)
    got = group_advantages(rewards, group_ids=ids, scale=scale)
    want = reference.group_advantages(rewards.double(), group_ids=ids, scale=scale)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert not got[3:7].count_nonzero()  # equal rewards, an unscorable one
    assert got[8] == 0  # infinite
    assert got[10] == 0  # a group of one


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.floats(-100, 100, width=32)), min_size=1, max_size=40),
    st.sampled_from(ADVANTAGE_SCALES),
)
def test_advantages_of_any_ragged_groups(members, scale):
    ids = torch.tensor([m[0] for m in members])
    rewards = torch.tensor([m[1] for m in members], dtype=torch.float64)
    got = group_advantages(rewards, group_ids=ids, scale=scale)
    want = reference.group_advantages(rewards, group_ids=ids, scale=scale)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_config_is_immutable_and_comparable():
    assert replace(LADConfig(), eta=0.5) == LADConfig(eta=0.5)
    with pytest.raises(AttributeError):
        LADConfig().eta = 1.0


@pytest.mark.parametrize("policy_loss", ["reinforce", "cispo", "vespo", "ppo"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_value_does_not_depend_on_what_else_is_returned(policy_loss, grad):
    """On-policy, where gradients are known before the head and the value of some losses is not."""
    level = "sequence_sum" if policy_loss == "vespo" else "token"
    config = GRPOConfig(policy_loss=policy_loss, importance_sampling_level=level)
    kw = batch() | {"old_logprobs": None, "advantages": torch.linspace(-1, 1, B, dtype=torch.float64), "config": config}
    kw.pop("ref_logprobs")
    with torch.set_grad_enabled(grad):
        if grad:
            kw["hidden_states"].requires_grad_()
        truth = reference.linear_grpo_loss(**kw).loss
        for wanted in (False, True):
            torch.testing.assert_close(
                linear_grpo_loss(**kw, return_logprobs=wanted).loss, truth, rtol=1e-10, atol=1e-12
            )
