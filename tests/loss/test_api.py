"""Names, signatures and error messages: each is an interface that others rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import lad_kernels
from lad_kernels import (
    GRPOConfig,
    LADConfig,
    checks,
    group_advantages,
    lad_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    reference,
)

FUNCTIONS = ("linear_logprobs", "group_advantages", "lad_loss", "grpo_loss", "linear_lad_loss", "linear_grpo_loss")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_signature(name):
    ours, spec = (inspect.signature(getattr(m, name)).parameters for m in (lad_kernels, reference))
    assert list(ours) == list(spec)
    for key in ours:
        assert ours[key].kind == spec[key].kind, key
        if key != "impl":
            assert ours[key].default == spec[key].default, key


def test_every_public_name_exists_and_is_documented():
    for name in lad_kernels.__all__:
        assert inspect.getdoc(getattr(lad_kernels, name)), name


def test_import_needs_neither_triton_nor_a_gpu():
    """In a process where importing triton fails, the package imports and computes."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, importlib.util as u\n"
        "real = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else real(n, *a)\n"
        "from lad_kernels import linear_logprobs as f\n"
        "h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])\n"
        "assert f(h, w, y).logprobs.shape == (3,)\n"
        "try: f(h, w, y, impl='triton')\n"
        "except RuntimeError as e: assert 'not installed' in str(e), e\n"
        "else: raise SystemExit('a forced path must raise')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def good(**changes):
    """Arguments of linear_lad_loss for two sequences of three tokens, with changes."""
    kw = dict(
        hidden_states=torch.randn(2, 3, 8),
        lm_head_weight=torch.randn(11, 8),
        target_ids=torch.randint(0, 11, (2, 3)),
        old_logprobs=-torch.rand(2, 3),
        advantages=torch.tensor([1.0, -1.0]),
    )
    return {**kw, **changes}


def packed(**changes):
    kw = {k: v.flatten(0, 1) if k not in ("lm_head_weight", "advantages") else v for k, v in good().items()}
    return {**kw, "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32), **changes}


BAD = {
    "hidden rank": (good(hidden_states=torch.randn(8)), ValueError, r"hidden_states: expected \[N, D\]"),
    "hidden dtype": (good(hidden_states=torch.ones(2, 3, 8, dtype=torch.int64)), TypeError, "hidden_states: expected float16"),
    "not a tensor": (good(hidden_states=[[1.0]]), TypeError, "hidden_states: expected a torch.Tensor, got list"),
    "weight rank": (good(lm_head_weight=torch.randn(88)), ValueError, "lm_head_weight: expected .*gathered first"),
    "weight transposed": (good(lm_head_weight=torch.randn(8, 11)), ValueError, "not transposed"),
    "weight dtype": (good(lm_head_weight=torch.randn(11, 8).half()), TypeError, "inside torch.autocast"),
    "vocabulary of one": (good(lm_head_weight=torch.randn(1, 8)), ValueError, "at least 2 rows, got 1"),
    "other device": (good(lm_head_weight=torch.randn(11, 8, device="meta")), ValueError, "expected device cpu"),
    "target shape": (good(target_ids=torch.zeros(2, 4, dtype=torch.long)), ValueError, "target_ids: .*already shifted|old_logprobs: expected"),
    "target dtype": (good(target_ids=torch.zeros(2, 3)), TypeError, "target_ids: expected int64 or int32"),
    "target too large": (good(target_ids=torch.full((2, 3), 11)), ValueError, r"ids in \[0, 11\).*got 11"),
    "target padding": (good(target_ids=torch.full((2, 3), -100)), ValueError, "loss_mask = target_ids != -100"),
    "bias size": (good(bias=torch.zeros(8)), ValueError, r"bias: expected \[11\], got \[8\]"),
    "temperature zero": (good(temperature=0.0), ValueError, "temperature: expected a finite number > 0"),
    "temperature shape": (good(temperature=torch.ones(3)), ValueError, r"temperature: expected a number or one per token \[2, 3\] or one per sequence \[2, 1\]"),
    "softcap": (good(softcap=-1.0), ValueError, "softcap: expected a finite number > 0 or None"),
    "logit scale": (good(logit_scale=float("nan")), ValueError, "logit_scale: expected a finite number"),
    "old shape": (good(old_logprobs=torch.zeros(6)), ValueError, r"old_logprobs: expected \[2, 3\]"),
    "mask shape": (good(loss_mask=torch.ones(2)), ValueError, r"loss_mask: expected \[2, 3\]"),
    "neither": (good(advantages=None), ValueError, "expected exactly one, got neither"),
    "both": (good(rewards=torch.zeros(2)), ValueError, "expected exactly one, got both"),
    "advantages shape": (good(advantages=torch.zeros(3)), ValueError, r"advantages: expected \[2\] \(one per sequence\)"),
    "advantages dtype": (good(advantages=torch.tensor([1, 2])), TypeError, "advantages: expected a floating dtype"),
    "rewards count": (good(advantages=None, rewards=torch.zeros(3), group_size=3), ValueError, "got 3 for 2 sequences"),
    "group size": (good(advantages=None, rewards=torch.zeros(2), group_size=3), ValueError, "divisor of the 2 rewards"),
    "group size kind": (good(advantages=None, rewards=torch.zeros(2), group_size=0), ValueError, "integer >= 2, got 0"),
    "no groups": (good(advantages=None, rewards=torch.zeros(2)), ValueError, "group_size, group_ids: .*got neither"),
    "group ids": (good(advantages=None, rewards=torch.zeros(2), group_ids=torch.zeros(3)), ValueError, r"int64 \[2\]"),
    "cu_seqlens of padded": (good(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens: expected None for padded"),
    "cu_seqlens falls": (packed(cu_seqlens=torch.tensor([0, 7, 6])), ValueError, "without falling"),
    "cu_seqlens end": (packed(cu_seqlens=torch.tensor([0, 3, 7])), ValueError, "to at most N = 6"),
    "no sequence": (packed(cu_seqlens=torch.tensor([0]), advantages=torch.zeros(0)), ValueError, "expected a sequence"),
    "cu_seqlens dtype": (packed(cu_seqlens=torch.tensor([0.0, 3, 6])), ValueError, r"int32 \[B \+ 1\]"),
    "packed rewards": (packed(cu_seqlens=None, advantages=None, rewards=torch.zeros(2), group_size=2), ValueError, "without cu_seqlens"),
    "packed level": (packed(cu_seqlens=None, advantages=torch.zeros(6), config=LADConfig(importance_sampling_level="sequence")), ValueError, "cu_seqlens: needed"),
    "packed norm": (packed(config=LADConfig(loss_agg_mode="seq-mean-token-sum-norm")), ValueError, "normalizer: needed"),
    "normalizer": (good(normalizer=0.0), ValueError, "normalizer: expected a finite number > 0"),
    "no reference": (good(config=LADConfig(kl_coef=0.1)), ValueError, "ref_logprobs: needed because config.kl_coef"),
    "rollout weights": (good(rollout_is_weights=torch.ones(5)), ValueError, "rollout_is_weights: expected"),
    "fractional mask": (good(loss_mask=torch.full((2, 3), 0.5)), ValueError, "loss_mask: expected zeros and ones"),
    "temperature with grad": (good(temperature=torch.ones((), requires_grad=True)), ValueError, "temperature: expected a constant"),
    "config of the sibling": (good(config=GRPOConfig()), TypeError, "config: expected LADConfig, got GRPOConfig; .*linear_grpo_loss"),
    "no config": (good(config=None), TypeError, "config: expected LADConfig, got NoneType"),
    "rewards elsewhere": (good(advantages=None, rewards=torch.zeros(2, device="meta"), group_size=2), ValueError, "rewards: expected device cpu"),
    "impl": (good(impl="cuda"), ValueError, "impl: expected one of 'auto'"),
    "target norm by token": (good(advantages=torch.zeros(2, 3), config=LADConfig(target_norm="group"), group_size=2), ValueError, "one per sequence"),
    "float64 in triton": (good(hidden_states=torch.randn(2, 3, 8).double(), lm_head_weight=torch.randn(11, 8).double(), impl="triton"), RuntimeError, "float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    kw, error, message = BAD[name]
    h, w = kw["hidden_states"], kw["lm_head_weight"]
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in (h, w)]
    with pytest.raises(error, match=message):
        linear_lad_loss(**kw)
    for a, b in zip((h, w), before):
        assert not isinstance(a, torch.Tensor) or a.is_meta or torch.equal(a, b)


def test_the_arguments_that_the_bad_ones_vary_are_good():
    assert linear_lad_loss(**good()).loss.isfinite()
    torch.testing.assert_close(linear_lad_loss(**packed()).loss.shape, torch.Size([]))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"eta": 0.0}, "eta: expected a finite number > 0, got 0.0"),
        ({"eta": float("nan")}, "eta: expected a finite number"),
        ({"eta": float("inf")}, "eta: expected a finite number"),
        ({"divergence": "jsd"}, "did you mean 'js'"),
        ({"importance_sampling_level": "seq"}, "did you mean 'sequence'"),
        ({"loss_agg_mode": "token_mean"}, "did you mean 'token-mean'"),
        ({"advantage_scale": "groups"}, "did you mean 'group'"),
        ({"kl_coef": -1.0}, "kl_coef: expected a finite number >= 0"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp"),
        ({"tail_mass": -0.1}, "tail_mass"),
        ({"epsilon_low": -0.1}, "epsilon_low: expected a finite number >= 0, got -0.1"),
        ({"epsilon_high": float("inf")}, "epsilon_high: expected a finite number >= 0, got inf"),
        ({"backward": "sparse"}, "backward"),
        ({"target_norm": "batch"}, "target_norm"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_lad_config(kw, message):
    with pytest.raises(ValueError, match=message):
        LADConfig(**kw)


def test_bad_grpo_config():
    with pytest.raises(ValueError, match="dual_clip: expected a finite number > 1"):
        GRPOConfig(dual_clip=0.5)
    with pytest.raises(ValueError, match="dual_clip: expected None with policy_loss='cispo'"):
        GRPOConfig(policy_loss="cispo", dual_clip=2.0)
    with pytest.raises(ValueError, match="needs 'token'"):
        GRPOConfig(policy_loss="cispo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="'vespo' needs 'sequence_sum', got 'token'"):
        GRPOConfig(policy_loss="vespo")
    with pytest.raises(ValueError, match="'luspo' needs 'sequence', got 'token'"):
        GRPOConfig(policy_loss="luspo")
    with pytest.raises(ValueError, match=r"loss_agg_mode: .*needs 'seq-mean-token-sum', got 'token-mean'"):
        GRPOConfig(policy_loss="luspo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="sapo_temperature_neg: expected a finite number > 0"):
        GRPOConfig(sapo_temperature_neg=0)
    with pytest.raises(TypeError, match="eta: expected a number"):
        LADConfig(eta="0.25")


def test_int32_targets_on_every_path(device):
    kw = good(target_ids=torch.randint(0, 11, (2, 3), dtype=torch.int32))
    kw = {k: v.to(device) for k, v in kw.items()}
    values = [linear_lad_loss(**kw, impl=impl).loss for impl in ("torch", "triton", "reference")]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[0], values[2], rtol=1e-6, atol=1e-6)


def test_entropy_bonus_without_entropy():
    with pytest.raises(ValueError, match=r"entropy: needed because config\.entropy_coef"):
        lad_loss(torch.zeros(3), None, torch.zeros(3), config=LADConfig(entropy_coef=0.1))


def test_rewards_of_wrong_rank():
    with pytest.raises(ValueError, match=r"rewards: expected \[B\]"):
        group_advantages(torch.zeros(2, 2), group_size=2)


def test_integer_overflow_is_refused():
    like, cu = torch.empty(2**31, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="expected int64 for N = 2147483648 tokens, got int32"):
        checks.layout(like, "target_ids", cu)


def test_sharded_weight_is_refused():
    class DTensor(torch.Tensor):
        placements = ("Shard(0)",)

        def full_tensor(self):
            raise AssertionError("never gathered behind the user's back")

    weight = torch.randn(11, 8).as_subclass(DTensor)
    with pytest.raises(TypeError, match=r"lm_head_weight: .*DTensor.*Partial\('avg'\)"):
        linear_lad_loss(**good(lm_head_weight=weight))


def test_double_backward_is_refused():
    kw = good(hidden_states=torch.randn(2, 3, 8, requires_grad=True))
    for loss in (linear_lad_loss(**kw).loss, linear_grpo_loss(**kw).loss):
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, kw["hidden_states"], create_graph=True)
    logp = linear_logprobs(kw["hidden_states"], kw["lm_head_weight"], kw["target_ids"]).logprobs
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(logp.sum(), kw["hidden_states"], create_graph=True)


def test_torch_func_is_refused():
    kw = good()
    h = kw.pop("hidden_states")
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: linear_lad_loss(x, **kw).loss)(h)


def test_forward_mode_is_refused():
    """Its tangents would be lost without a word."""
    x = torch.randn(4, 8)
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(torch.randn(3, 8), torch.ones(3, 8))
        for function in (linear_logprobs, partial(linear_cross_entropy, reduction="none")):
            with pytest.raises(RuntimeError, match="hidden_states: forward-mode derivatives are not supported"):
                function(hidden, x, torch.arange(3))
            function(hidden.detach(), x, torch.arange(3))
        spec = linear_logprobs(hidden, x, torch.arange(3), impl="reference").logprobs
        assert forward_ad.unpack_dual(spec).tangent is not None


def test_value_checks_have_a_switch(monkeypatch):
    """What needs a host sync runs on the CPU always, elsewhere when asked."""
    on_device = torch.zeros(1, device="meta")
    assert not checks.may_read(on_device)
    monkeypatch.setattr(checks, "_always_read_values", False)
    checks.validate_values(True)
    assert checks.may_read(on_device)
    assert checks.may_read(torch.zeros(1))
