"""The caller's autocast only casts inputs: no product or sum of ours runs under it.

Under torch.autocast `@`, `vecdot`, `mv` and others round their operands to 16 bits, forward and in a backward that is
called inside the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lad_kernels import (
    GRPOConfig,
    LADConfig,
    group_advantages,
    grpo_loss,
    lad_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    linear_policy_loss,
    profile_sparsity,
)
from lad_kernels.head import dispatch
from lad_kernels.testing import make_inputs

B, T, D, V = 2, 16, 24, 300  # few sequences: each is a program of the objective, a second in the interpreter
N = B * T
# What the public functions do to floating tensors before and after: check, cast and move them.
OUTSIDE = {
    "__eq__", "__get__", "__len__", "__set__", "abs", "clone", "detach", "element_size", "expand", "ge", "gt",
    "index_copy", "index_select", "is_floating_point", "isfinite", "lt", "ne", "new_zeros", "numel", "reshape",
    "stride", "to", "view",
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Refuses work on floating tensors of a device while autocast is on for it, inside our operators too."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.seen, self.inside = device, 0, Inside(self)

    def __enter__(self):
        self.inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.inside.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.look(func, args, kwargs)
        return func(*args, **(kwargs or {}))

    def look(self, func: Callable, args: tuple, kwargs: dict | None) -> None:
        name = func.__name__.partition(".")[0]
        floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves((args, kwargs)))
        if floating and name not in OUTSIDE and getattr(func, "namespace", None) != "lad_kernels":
            self.seen += 1
            if torch.is_autocast_enabled(self.device):
                raise AssertionError(f"{name} runs under autocast")


class Inside(TorchDispatchMode):
    """Runs the function of an operator of ours where its watch sees it; modes end at operators."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "lad_kernels":
            return func(*args, **(kwargs or {}))
        with self, Again(self.watch):
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))


class Again(TorchFunctionMode):
    """A watch that is on already."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.watch.look(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def test_the_watch_refuses_a_product(device):
    a = torch.ones(2, 2, device=device)
    with Watch(device) as watch:
        a @ a
        with torch.autocast(device, torch.bfloat16), pytest.raises(AssertionError, match="matmul"):
            a @ a
    assert watch.seen == 2


def batch(device: str) -> dict:
    """Keywords of `linear_lad_loss` in float32, with everything an objective may want."""
    x = make_inputs(N, D, V, entropy=1.0, masked=0.0, bias=True)
    gen = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(B, T, generator=gen)
    given = dict(
        hidden_states=x.hidden.view(B, T, D),
        lm_head_weight=x.weight,
        bias=x.bias,
        target_ids=x.targets.view(B, T),
        old_logprobs=old,
        ref_logprobs=old - 0.3,
        rewards=torch.randn(B, generator=gen),
        group_size=2,
        loss_mask=(torch.rand(B, T, generator=gen) > 0.2).float(),
        temperature=0.5 + torch.rand(B, T, generator=gen),
        rollout_is_weights=torch.rand(B, T, generator=gen),
    )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


LEAVES = ("hidden_states", "lm_head_weight", "bias")
Leaves = dict[str, Tensor]


def of_log_probs(impl: str, path: str, given: dict, leaves: Leaves) -> list[Tensor]:
    names = ("target_ids", "temperature", "loss_mask")
    return list(linear_logprobs(**leaves, **{k: given[k] for k in names}, return_entropy=True, impl=impl))


def of_a_loss(config: LADConfig | GRPOConfig) -> Callable:
    def call(impl: str, path: str, given: dict, leaves: Leaves) -> list[Tensor]:
        loss = linear_lad_loss if isinstance(config, LADConfig) else linear_grpo_loss
        with dispatch.force(path) if path != "asked" else contextlib.nullcontext():
            out = loss(**given | leaves, config=config, return_entropy=True, impl=impl)
        # flops are counted, and those of the backward are not there yet
        return [out.loss, out.logprobs, out.entropy, *(v for k, v in out.metrics.items() if k != "head_flops")]

    return call


def of_cross_entropy(reduction: str) -> Callable:
    def call(impl: str, path: str, given: dict, leaves: Leaves) -> list[Tensor]:
        targets = given["target_ids"].masked_fill(given["loss_mask"] == 0, -100)
        with dispatch.force(path):
            options = dict(token_weights=given["rollout_is_weights"], label_smoothing=0.1, z_loss=0.01)
            loss, stats = linear_cross_entropy(
                **leaves,
                **options,
                target_ids=targets,
                temperature=given["temperature"],
                reduction=reduction,
                impl=impl,
                return_stats=True,
            )
        return [loss, *stats[:-1]]

    return call


def of_an_objective(impl: str, path: str, given: dict, leaves: Leaves) -> list[Tensor]:
    def objective(logprobs, entropy, tokens):
        ratio = (logprobs - tokens.take(given["old_logprobs"])).exp()  # [m]
        return (ratio @ ratio + 0.1 * entropy.sum()) / N

    names = ("target_ids", "temperature", "loss_mask")
    with dispatch.force(path):
        out = linear_policy_loss(
            **leaves, **{k: given[k] for k in names}, objective=objective, return_entropy=True, impl=impl
        )
    return [out.loss, out.logprobs, out.entropy]


TAIL = dict(tail_mass=1e-2, tail="drop")
CALLS = {  # what is called, on which path
    "log-probs": (of_log_probs, ""),
    "one pass": (of_a_loss(LADConfig(kl_coef=0.3)), "one_pass"),
    "two passes, entropy and reference policy": (of_a_loss(LADConfig(kl_coef=0.3, entropy_coef=0.1)), "two_pass"),
    "two passes, sequences": (
        of_a_loss(GRPOConfig(importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-mean")),
        "two_pass",
    ),
    "cross-entropy, one pass": (of_cross_entropy("mean"), "one_pass"),
    "cross-entropy by token": (of_cross_entropy("none"), "two_pass"),
    "an objective": (of_an_objective, "two_pass"),
    "routed, tail dropped": (of_a_loss(LADConfig(target_norm="group", **TAIL)), "routed"),
    "routed, entropy, as asked": (of_a_loss(LADConfig(entropy_coef=0.1, tail_mass=1e-2, backward="routed")), "asked"),
}


# Whether autocast is on in the forward, in a backward, and in another one, which after one pass computes again.
PLACES = [(True, True, False), (False, True, True)]


def differentiate(watch: Watch, outputs: list[Tensor], leaves: list[Tensor], autocast: torch.autocast) -> list[Tensor]:
    """Gradients, for an upstream gradient that is not 1."""
    wanted = [x for x in outputs if x.requires_grad]
    upstream = [torch.linspace(-1, 1.5, x.numel(), device=x.device).view_as(x) for x in wanted]
    before = watch.seen
    with autocast:  # the engine itself: `torch.autograd.grad` hides what it runs from the watch
        grads = torch.autograd.Variable._execution_engine.run_backward(
            tuple(wanted), tuple(upstream), True, False, tuple(leaves), allow_unreachable=False, accumulate_grad=False
        )
    assert watch.seen > before
    return list(grads)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16"), ("triton", "float32"), ("triton", "bfloat16")],
)
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_bit_of_a_head(name, impl, dtype, device):
    """Float32 inputs are cast by the public function; everything after is as without autocast."""
    call, path = CALLS[name]
    given, kind = batch(device), getattr(torch, dtype)
    low = torch.bfloat16 if dtype == "float32" else kind
    head = {k: given.pop(k) for k in LEAVES}  # [B, T, D], [V, D], [V]
    head |= {k: head[k].to(kind) for k in LEAVES[:2]}

    def run(*on: bool, rounded: bool = False) -> list[Tensor]:
        leaves = {k: v.clone().requires_grad_() for k, v in head.items()}
        used = {k: v.to(low) if rounded and k != "bias" else v for k, v in leaves.items()}
        inside = lambda on: torch.autocast(device, low, enabled=on)  # noqa: E731
        with Watch(device) as watch:
            with inside(on[0]):
                outputs = call(impl, path, given, used)
            found = [differentiate(watch, outputs, list(leaves.values()), inside(backward)) for backward in on[1:]]
        return [x.detach() for x in outputs] + found[0] + found[1]

    plain = {rounded: run(False, False, False, rounded=rounded) for rounded in {False, dtype == "float32"}}
    for place in PLACES:
        for ours, truth in zip(run(*place), plain[place[0] and dtype == "float32"]):
            assert ours.dtype == truth.dtype
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss", [lad_loss, grpo_loss])
def test_autocast_changes_no_bit_of_an_objective(loss, impl, dtype, device):
    """Log-probs that are given, entropy and a reference policy; advantages of rewards."""
    given, kind = batch(device), getattr(torch, dtype)
    names = ("old_logprobs", "ref_logprobs", "rollout_is_weights")
    rest = {k: given[k].to(kind) for k in names} | {"loss_mask": given["loss_mask"]}
    config = (LADConfig if loss is lad_loss else GRPOConfig)(kl_coef=0.2, entropy_coef=0.1)

    def run(*on: bool) -> list[Tensor]:
        leaves = [(rest["old_logprobs"] + x).requires_grad_() for x in (0.1, 3.0)]  # log-probs and entropy [B, T]
        inside = lambda on: torch.autocast(device, torch.bfloat16, enabled=on)  # noqa: E731
        with Watch(device) as watch:
            with inside(on[0]):
                advantages = group_advantages(given["rewards"].to(kind), group_size=2)  # [B]
                out = loss(leaves[0], advantages=advantages, entropy=leaves[1], config=config, impl=impl, **rest)
            grads = differentiate(watch, [out.loss], leaves, inside(on[1]))
        return [out.loss.detach(), out.logprobs, *out.metrics.values(), advantages, *grads]

    plain = run(False, False)
    for place in PLACES:
        for ours, truth in zip(run(*place), plain):
            assert ours.dtype == truth.dtype
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def test_autocast_changes_no_bit_of_advantages(scale, device):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0)).to(device)
    plain = group_advantages(rewards, group_size=4, scale=scale)
    with Watch(device), torch.autocast(device, torch.bfloat16):
        found = group_advantages(rewards, group_size=4, scale=scale)  # [B]
    assert torch.equal(found, plain)


def test_autocast_changes_no_bit_of_a_profile(device):
    x = make_inputs(N, D, V, dtype=torch.bfloat16, entropy=1.0, masked=0.0, device=device)
    given = dict(coefficients=x.upstream, bias=None, impl="torch")
    plain = profile_sparsity(x.hidden, x.weight, x.targets, **given)
    with Watch(device), torch.autocast(device, torch.bfloat16):
        assert profile_sparsity(x.hidden, x.weight, x.targets, **given) == plain


def test_the_reference_has_no_rounded_products(device):
    """impl='reference' promises float32 too."""
    x = make_inputs(N, D, V, dtype=torch.bfloat16, entropy=1.0, masked=0.0, device=device)
    given = dict(advantages=x.upstream, config=LADConfig(kl_coef=0.1), ref_logprobs=-x.upstream.abs())

    def score() -> tuple[Tensor, ...]:
        losses = linear_lad_loss(x.hidden, x.weight, x.targets, impl="reference", **given)
        return *linear_logprobs(x.hidden, x.weight, x.targets, impl="reference")[::2], losses.loss, losses.logprobs

    plain = score()
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, score(), plain))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_entropy_in_16_bits(impl, device):
    """Error of an entropy of 7 nats against float64: 8e-7 and 1.2e-6 measured; 1.3e-2 if its moment were rounded."""
    x = make_inputs(64, 32, 3000, dtype=torch.bfloat16, masked=0.0, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = linear_logprobs(x.hidden, x.weight, x.targets, return_entropy=True, impl=impl).entropy
    truth = linear_logprobs(
        x.hidden.double(), x.weight.double(), x.targets, return_entropy=True, impl="reference"
    ).entropy
    error = (found - truth).abs().max().item()
    print(f"{impl}: {error:.1e} at {truth.mean().item():.1f} nats")
    assert error < 2e-5
