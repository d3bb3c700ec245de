"""Tokens that do not count although no mask excludes them: bad numbers of an engine, padding beyond the last bound."""

from __future__ import annotations

import math

import pytest
import torch

from lad_kernels import GRPOConfig, LADConfig, grpo_loss, lad_loss, linear_grpo_loss, linear_lad_loss, packing
from lad_kernels.head import dispatch, memory
from lad_kernels.objective.config import AGGREGATIONS, LEVELS
from lad_kernels.testing import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: inf - inf
IMPLS = ("reference", "torch", "triton")
BOUNDS = (0, 4, 4, 9, 10)  # an empty sequence, and one of a single token
N, B, D, V = BOUNDS[-1], len(BOUNDS) - 1, 16, 40
BAD = [1, 6]  # of sequences 0 and 2
LAD = LADConfig(kl_coef=0.2, entropy_coef=0.1, eta=1.0)


def given(device="cpu", dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    """Packed log-probs with every input of an engine."""
    gen = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(N, generator=gen, dtype=torch.float64) - 0.5
    noise = lambda: 0.3 * torch.randn(N, generator=gen, dtype=torch.float64)  # noqa: E731
    kw = dict(
        logprobs=logp,
        old_logprobs=logp - noise().abs(),
        ref_logprobs=logp - noise().abs(),
        entropy=noise().abs(),
        rollout_is_weights=noise().exp(),
        advantages=torch.tensor([1.0, -0.5, -0.7, 0.4]),
    )
    kw = {k: v.to(device, dtype) for k, v in kw.items()}
    return kw | {"cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32, device=device)}


def measure(kw, config, impl) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    logp = kw["logprobs"].clone().requires_grad_()
    loss = lad_loss if isinstance(config, LADConfig) else grpo_loss
    out = loss(**(kw | {"logprobs": logp}), config=config, impl=impl)
    out.loss.backward()
    return out.loss.detach(), logp.grad, out.metrics


def assert_same(found, truth, ignored=("nonfinite_share",)) -> None:
    for a, b in zip(found[:2], truth[:2]):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert found[2].keys() == truth[2].keys()
    for name in found[2].keys() - set(ignored):
        torch.testing.assert_close(found[2][name], truth[2][name], rtol=1e-5, atol=1e-6, msg=name)


CONFIGS = {
    **{
        f"{level}, {mode}": LADConfig(importance_sampling_level=level, loss_agg_mode=mode, kl_coef=0.2, eta=1.0)
        for level in LEVELS
        for mode in AGGREGATIONS[:3]
    },
    "entropy": LAD,
    "clamp": LADConfig(log_ratio_clamp=0.1, kl_coef=0.2),
    "gspo": GRPOConfig(importance_sampling_level="sequence", epsilon_low=1e-2, kl_coef=0.1),
    "cispo": GRPOConfig(policy_loss="cispo", kl_coef=0.1),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_number_of_an_engine_is_as_if_masked(name, impl, device):
    """NaN or an infinity in any input of a token, also of all tokens of a sequence."""
    kw = given(device)
    mask = torch.ones(N, dtype=torch.bool, device=device)
    mask[BAD] = False
    truth = measure(kw | {"loss_mask": mask}, CONFIGS[name], impl)
    assert truth[2]["nonfinite_share"] == 0
    for key, value in (("old_logprobs", -math.inf), ("ref_logprobs", math.nan), ("rollout_is_weights", math.inf)):
        spoiled = kw[key].clone()
        spoiled[BAD] = value
        found = measure(kw | {key: spoiled}, CONFIGS[name], impl)
        assert_same(found, truth)
        assert not found[1][BAD].count_nonzero()
        torch.testing.assert_close(found[2]["nonfinite_share"].item(), len(BAD) / N)
    weights = torch.tensor([math.nan, 1.0, 0.5, 2.0], device=device)
    mask[:4], mask[6] = False, True
    found = measure(kw | {"rollout_is_weights": weights}, CONFIGS[name], impl)
    truth = measure(kw | {"rollout_is_weights": weights.nan_to_num(7.0), "loss_mask": mask}, CONFIGS[name], impl)
    assert_same(found, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ("old_logprobs", "ref_logprobs"))
def test_log_probs_are_by_token_also_where_there_are_as_many_sequences(name, impl, device):
    logp = torch.tensor([-1.0, -2.0, -1.5, -0.5], device=device)
    kw = dict(logprobs=logp, old_logprobs=logp - 0.1, ref_logprobs=logp - 0.2, advantages=torch.ones(4, device=device))
    kw |= dict(cu_seqlens=torch.tensor([0, 2, 2, 4, 4], dtype=torch.int32, device=device))
    for bad in range(4):
        mask = torch.arange(4, device=device) != bad
        broken = kw[name].masked_fill(~mask, math.nan)
        found = measure(kw | {name: broken}, LADConfig(kl_coef=0.2), impl)
        assert_same(found, measure(kw | {"loss_mask": mask}, LADConfig(kl_coef=0.2), impl))
        assert found[2]["nonfinite_share"] == 0.25


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tokens_do_not_count_as_dropped(impl, device):
    kw, mask = given(device), torch.ones(N, dtype=torch.bool, device=device)
    mask[BAD[0]] = False
    kw["old_logprobs"][BAD] = math.nan
    metrics = measure(kw | {"loss_mask": mask}, LAD, impl)[2]
    torch.testing.assert_close(metrics["nonfinite_share"].item(), 1 / (N - 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_everything_dropped_is_a_differentiable_zero(impl, device):
    kw = given(device)
    loss, grad, metrics = measure(kw | {"old_logprobs": torch.full_like(kw["logprobs"], -math.inf)}, LAD, impl)
    assert loss == 0 and not grad.count_nonzero() and metrics["nonfinite_share"] == 1
    assert all(value.isfinite() for value in metrics.values()), metrics


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", [LADConfig(), LADConfig(importance_sampling_level="sequence"), GRPOConfig()])
def test_nan_of_the_policy_itself_propagates(config, impl, device):
    kw = given(device)
    kw["logprobs"][2] = math.nan
    loss, grad, _ = measure(kw, config, impl)
    assert loss.isnan() and grad[2].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_that_are_not_used_drop_nothing(impl, device):
    kw = given(device)
    truth = measure(kw | {"ref_logprobs": None}, LADConfig(), impl)
    found = measure(kw | {"ref_logprobs": torch.full_like(kw["logprobs"], math.nan)}, LADConfig(), impl)
    assert_same(found, truth, ignored=())


def heads(device) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    rand = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    kw = given(device)
    kw |= dict(hidden_states=rand(N, D).to(device), lm_head_weight=rand(V, D).to(device))
    kw |= dict(target_ids=torch.randint(0, V, (N,), generator=gen).to(device))
    return {k: v for k, v in kw.items() if k not in ("logprobs", "entropy")}


def linear(kw, config, impl):
    leaves = {k: kw[k].clone().requires_grad_() for k in ("hidden_states", "lm_head_weight")}
    loss = linear_lad_loss if isinstance(config, LADConfig) else linear_grpo_loss
    out = loss(**(kw | leaves), config=config, impl=impl)
    out.loss.backward()
    return out, *(x.grad for x in leaves.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("known", (False, True))
def test_a_bad_number_through_the_head(known, path, impl, device):
    kw, mask = heads(device), torch.ones(N, dtype=torch.bool, device=device)
    mask[BAD] = False
    key = "rollout_is_weights" if known else "old_logprobs"
    kw = kw | {"old_logprobs": None} if known else kw
    config = LADConfig(eta=1.0, kl_coef=0.0 if known else 0.1, tail_mass=1e-9)
    spoiled = kw[key].clone()
    spoiled[BAD] = torch.tensor([math.nan, -math.inf], device=device)
    with dispatch.force(path):
        truth = linear(kw | {"loss_mask": mask}, config, impl)
        found = linear(kw | {key: spoiled}, config, impl)
    for a, b in zip((found[0].loss, *found[1:]), (truth[0].loss, *truth[1:])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not found[1][BAD].count_nonzero()
    torch.testing.assert_close(found[0].metrics["nonfinite_share"].item(), len(BAD) / N)


END = 9  # the last bound of a batch whose last token is padding
PADDED = (0, 4, 4, 9)


def cut(kw, garbage: bool):
    """The batch with and without tokens beyond its last bound, of 3 sequences; `garbage`: NaN and -100 in them."""
    bounds = torch.tensor(PADDED, dtype=torch.int32, device=kw["cu_seqlens"].device)
    whole = {k: v for k, v in kw.items() if torch.is_tensor(v) and k not in ("lm_head_weight", "advantages")}
    short = kw | {k: v[:END] for k, v in whole.items()} | {"cu_seqlens": bounds, "advantages": kw["advantages"][:3]}
    padded = {k: v.clone() for k, v in whole.items()}
    if garbage:
        for v in padded.values():
            v[END:] = math.nan if v.is_floating_point() else -100
    return kw | padded | {"cu_seqlens": bounds, "advantages": kw["advantages"][:3]}, short


@pytest.mark.parametrize("read", (True, False), ids=("values read", "values not read"))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ("token, token-mean", "sequence, seq-mean-token-mean", "entropy", "cispo"))
def test_padding_beyond_the_last_bound_does_not_count(name, impl, read, device, monkeypatch):
    """Also where no value may be read, as on an accelerator; the mean was over the padding too there."""
    monkeypatch.setattr(packing, "_host_reads", lambda bounds: read)
    padded, short = cut(given(device), garbage=True)
    truth = measure(short, CONFIGS[name], impl)
    found = measure(padded, CONFIGS[name], impl)
    assert not found[1][END:].count_nonzero()
    assert_same((found[0], found[1][:END], found[2]), truth, ignored=())
    masked = measure(padded | {"loss_mask": torch.ones(N, device=device)}, CONFIGS[name], impl)
    assert_same((masked[0], masked[1][:END], masked[2]), truth, ignored=())


@pytest.mark.parametrize("read", (True, False), ids=("values read", "values not read"))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("on_policy", (True, False))
def test_padding_through_the_head(on_policy, path, impl, read, device, monkeypatch):
    config = LADConfig(eta=1.0, tail_mass=1e-9, loss_agg_mode="token-mean" if on_policy else "seq-mean-token-mean")
    check_padding(config, on_policy, path, impl, read, device, monkeypatch)


@pytest.mark.parametrize("rows", (128, 5), ids=("one chunk", "several chunks"))
@pytest.mark.parametrize("read", (True, False), ids=("values read", "values not read"))
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_behind_whole_sequences(impl, read, rows, device, monkeypatch):
    """Chunks of one pass are of whole sequences there, and have the padding too where it could not be dropped first."""
    monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: rows)
    config = LADConfig(eta=1.0, importance_sampling_level="sequence")
    check_padding(config, False, "one_pass", impl, read, device, monkeypatch)


def check_padding(config, on_policy, path, impl, read, device, monkeypatch):
    """Hidden states are garbage too where the padding can be dropped first."""
    monkeypatch.setattr(packing, "_host_reads", lambda bounds: read)
    padded, short = cut(heads(device), garbage=True)
    if not read:
        padded["hidden_states"] = padded["hidden_states"].nan_to_num(3.0)
    given = {"old_logprobs": None} if on_policy else {}
    with dispatch.force(path):
        truth = linear(short | given, config, impl)
        found = linear(padded | given, config, impl)
    assert_same((found[0].loss, found[1][:END], {}), (truth[0].loss, truth[1], {}))
    assert_same((found[0].loss, found[2], {}), (truth[0].loss, truth[2], {}))
    assert not found[1][END:].count_nonzero() and not found[0].logprobs[END:].count_nonzero()
    assert_same(
        (found[0].loss, found[0].loss, found[0].metrics),
        (truth[0].loss, truth[0].loss, truth[0].metrics),
        ignored=("head_flops", "kept_share", "dropped_mass_mean", "dropped_mass_max"),
    )


@pytest.mark.parametrize("backward", ("exact", "tail dropped"))
@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_hidden_states_of_a_dropped_token_may_be_anything(impl, path, backward, device):
    """Its own gradient is 0, and those of the others are what they are without it."""
    x = make_inputs(60, 32, 600, dtype=torch.float32, device=device, entropy=0.5, masked=0.0)
    old, advantages = torch.full((60,), -1.0, device=device), torch.arange(60, device=device) % 3 - 1.0
    old[[3, 40]] = torch.nan
    config = LADConfig(tail_mass=0.0 if backward == "exact" else 1e-3, tail="drop")

    def gradients(number: float, path: str) -> tuple[torch.Tensor, ...]:  # [N, D], [V, D]
        hidden = x.hidden.detach().clone()
        hidden[[3, 40]] = number
        hidden, weight = hidden.requires_grad_(), x.weight.detach().clone().requires_grad_()
        with dispatch.force(path):
            out = linear_lad_loss(hidden, weight, x.targets, old, advantages=advantages, config=config, impl=impl)
        assert out.metrics["nonfinite_share"] == torch.tensor(2 / 60)
        assert all(value.isfinite() for value in out.metrics.values())
        return torch.autograd.grad(out.loss, (hidden, weight))

    gives_way = (impl, path) == ("triton", "one_pass")  # to two passes, where a row is NaN
    (dh, dw), (dh_true, dw_true) = gradients(torch.nan, path), gradients(0.0, "two_pass" if gives_way else path)
    assert not dh[[3, 40]].any()
    assert torch.equal(dh, dh_true)
    assert torch.equal(dw, dw_true)
