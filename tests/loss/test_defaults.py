"""No result depends on PyTorch's default dtype, default device or gradient mode: bitwise those of a plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lad_kernels import (
    GRPOConfig,
    LADConfig,
    group_advantages,
    grpo_loss,
    lad_loss,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    profile_sparsity,
    reference,
)
from lad_kernels.head import dispatch
from lad_kernels.testing import make_inputs


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),  # a tensor made without a device holds nothing
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
PLAIN = dict(config=LADConfig(backward="dense"))
ROUTED = dict(config=LADConfig(backward="routed", tail_mass=0.05, target_norm="group"), normalizer=40.0)
KL = dict(config=GRPOConfig(kl_coef=0.1))
FEW = dict(group_size=2)


class Batch:
    """Four sequences of twelve tokens, V = 300."""

    def __init__(self, device: str) -> None:
        made = make_inputs(48, 16, 300, entropy=0.5, device=device)
        self.hidden, self.weight = made.hidden.view(4, 12, 16), made.weight  # [B, T, D], [V, D]
        self.ids, self.mask = made.targets.view(4, 12), made.loss_mask.view(4, 12)  # [B, T]
        generator = torch.Generator().manual_seed(1)
        self.old, self.ref = (-1 - torch.rand(2, 4, 12, generator=generator)).to(device)  # [B, T]
        self.rewards = torch.tensor([0.0, 1.0, 1.0, 0.25], device=device)  # [B]
        self.inputs = (self.hidden, self.weight, self.ids)
        self.leaves = (self.hidden, self.weight)

    def logprobs(self, **options) -> list[Tensor]:
        out = linear_logprobs(*self.inputs, loss_mask=self.mask, return_entropy=True, temperature=0.7, **options)
        return [*out, (out.logprobs + 0.1 * out.entropy).sum()]

    def linear(self, function: Callable, **options) -> list[Tensor]:
        out = function(
            *self.inputs,
            self.old,
            rewards=self.rewards,
            group_size=2,
            loss_mask=self.mask,
            ref_logprobs=self.ref,
            return_entropy=True,
            **options,
        )
        return [out.logprobs, *(out.metrics[name] for name in sorted(out.metrics)), out.loss]

    def packed(self, **options) -> list[Tensor]:
        bounds = torch.tensor([0, 12, 20, 36, 48], dtype=torch.int32, device=self.ids.device)  # [B + 1]
        hidden, ids, old, mask = self.hidden.flatten(0, 1), self.ids.flatten(), self.old.flatten(), self.mask.flatten()
        out = linear_lad_loss(
            hidden,
            self.weight,
            ids,
            old,
            rewards=self.rewards,
            group_size=2,
            loss_mask=mask,
            cu_seqlens=bounds,
            **options,
        )
        return [out.logprobs, out.loss]

    def one_pass(self, **options) -> list[Tensor]:
        with dispatch.force("one_pass"):
            out = linear_lad_loss(
                *self.inputs,
                None,
                rewards=self.rewards,
                group_size=2,
                loss_mask=self.mask,
                return_logprobs=False,
                config=LADConfig(backward="dense"),
                **options,
            )
        return [out.loss]

    def objective(self, function: Callable, **options) -> list[Tensor]:
        advantages = group_advantages(self.rewards, group_size=2)
        logprobs = self.ref * self.weight[0, 0].abs()  # [B, T], differentiable in the weight
        out = function(logprobs, self.old, advantages, loss_mask=self.mask, ref_logprobs=self.ref, **options)
        return [advantages, *(out.metrics[name] for name in sorted(out.metrics)), out.loss]

    def profile(self) -> list[Tensor]:
        found = profile_sparsity(*self.inputs, loss_mask=self.mask)
        shares = [found.kept_share, *(b.kept_share for b in found.buckets)]
        return [torch.tensor(shares, dtype=torch.float64, device=self.ids.device)]


RUNS: dict[str, Callable[[Batch], list[Tensor]]] = {
    "linear_logprobs": lambda b: b.logprobs(),
    "linear_logprobs, triton": lambda b: b.logprobs(impl="triton"),
    "linear_logprobs, reference": lambda b: b.logprobs(impl="reference"),
    "linear_lad_loss": lambda b: b.linear(linear_lad_loss, **PLAIN),
    "linear_lad_loss, routed": lambda b: b.linear(linear_lad_loss, **ROUTED),
    "linear_lad_loss, routed, triton": lambda b: b.linear(linear_lad_loss, **ROUTED, impl="triton"),
    "linear_lad_loss, reference": lambda b: b.linear(linear_lad_loss, impl="reference"),
    "linear_lad_loss, packed": lambda b: b.packed(),
    "linear_lad_loss, one pass": lambda b: b.one_pass(),
    "linear_lad_loss, one pass, triton": lambda b: b.one_pass(impl="triton"),
    "linear_grpo_loss": lambda b: b.linear(linear_grpo_loss, **KL),
    "linear_grpo_loss, triton": lambda b: b.linear(linear_grpo_loss, **KL, impl="triton"),
    "lad_loss": lambda b: b.objective(lad_loss),
    "lad_loss, triton": lambda b: b.objective(lad_loss, impl="triton"),
    "grpo_loss": lambda b: b.objective(grpo_loss, **KL),
    "grpo_loss, reference": lambda b: b.objective(reference.grpo_loss, **KL),
    "profile_sparsity": lambda b: b.profile(),
}


def outcome(run: Callable[[Batch], list[Tensor]], batch: Batch) -> list[Tensor]:
    """Outputs and, with gradients on, those of the last output; generators as at the start of every run."""
    torch.manual_seed(0)
    for leaf in batch.leaves:
        leaf.requires_grad_(torch.is_grad_enabled())
    found = run(batch)
    gradients = ()
    if found[-1].requires_grad:
        gradients = torch.autograd.grad(found[-1], batch.leaves, allow_unused=True)
    return [x.detach() for x in (*found, *gradients) if x is not None]


@pytest.mark.parametrize("name", RUNS)
def test_results_under_other_defaults(name, device):
    batch = Batch(device)
    plain, forward = outcome(RUNS[name], batch), RUNS[name](batch)
    assert all(x.isfinite().all() for x in plain)
    interpreted = "triton" in name and device == "cpu"  # seconds for each
    for kind in ("bfloat16", "meta") if interpreted else DEFAULTS:
        with DEFAULTS[kind]():
            found, wanted = outcome(RUNS[name], batch), plain
        if kind in ("no_grad", "inference_mode"):  # metrics of a backward are then missing
            found, wanted = [found[0], found[-1]], [forward[0], forward[-1]]
        assert len(found) == len(wanted), kind
        for i, (x, y) in enumerate(zip(found, wanted)):
            assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y), f"{kind}, output {i}"


@pytest.mark.parametrize("family", ["llama", "mpt", "gemma2"])
def test_attach_fused_head_under_other_defaults(family):
    pytest.importorskip("transformers", reason="transformers is not installed: attach_fused_head goes untested here")
    from families import fused_logprobs, gradients, tiny_model

    from lad_kernels.frameworks.transformers import attach_fused_head

    model = tiny_model(family).eval()
    attach_fused_head(model)
    plain = fused_logprobs(model)
    truth = gradients(model, plain)
    for kind, default in DEFAULTS.items():
        attach_fused_head(model).forget()
        with default():
            for _ in range(2):
                found = fused_logprobs(model)
                assert torch.equal(found, plain), kind
            if found.requires_grad:
                assert all(torch.equal(g, truth[name]) for name, g in gradients(model, found).items()), kind


def test_a_dependence_would_be_found(device):
    """Not by linspace, which transformers takes out of torch.device's hands for good when it loads a model."""
    batch = Batch(device)

    def depends() -> Tensor:
        return outcome(lambda b: [b.rewards.cpu() * (torch.arange(4.0) / 3)], batch)[0]

    plain = depends()
    with default_dtype(torch.bfloat16):
        assert not torch.equal(depends(), plain)
    with torch.device("meta"), pytest.raises(RuntimeError):
        depends()
