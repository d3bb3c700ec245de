"""Known failures of similar packages that no other test covers; docs/numerics.md lists all of them."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lad_kernels import GRPOConfig, LADConfig, checks, linear_grpo_loss, linear_lad_loss, linear_logprobs, reference
from lad_kernels.head import cost, dispatch
from lad_kernels.testing import CONTRACT_MARGIN, FP32_TOLERANCE, relative_error

ROOT = Path(__file__).resolve().parents[2]
LONG = 65_536 + 70  # tokens: more than one axis of a CUDA grid holds


def inputs(n: int, d: int, v: int, device: str, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=gen), torch.randn(v, d, generator=gen)
    targets = torch.randint(0, v, (n,), generator=gen)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_more_tokens_than_a_grid_axis_holds(impl, device):
    if impl == "triton" and device == "cpu" and os.environ.get("SOAK") != "1":
        pytest.skip("70 s in the interpreter: SOAK=1, or a GPU; until then grids of this length go unlaunched")
    hidden, weight, targets = inputs(LONG, 4, 9, device)
    gen = torch.Generator().manual_seed(1)
    advantages, old = torch.randn(LONG, generator=gen).to(device), -2 * torch.ones(LONG, device=device)

    def run(dtype, impl):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        out = linear_lad_loss(h, w, targets, old.to(dtype), advantages=advantages.to(dtype), normalizer=1, impl=impl)
        return out.logprobs, *torch.autograd.grad(out.loss, (h, w))

    exact, contract = run(torch.float64, "reference"), run(torch.float32, "reference")
    for x, truth, single in zip(run(torch.float32, impl), exact, contract):
        assert relative_error(x, truth) <= max(FP32_TOLERANCE, CONTRACT_MARGIN * relative_error(single, truth))


def test_more_logits_than_32_bits_count(device):
    """N V = 2.1e9: a hundred tokens at the end, whose gradient is wanted, against the same ones alone."""
    n, v = 65_600, 32_800
    assert n * v > 2**31
    hidden, weight, targets = inputs(n, 2, v, device)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprobs(h, w, targets)
    out.logprobs[-100:].sum().backward()

    def few(dtype) -> tuple[Tensor, ...]:
        h_few, w_few = (x.to(dtype, copy=True).requires_grad_() for x in (hidden[-100:], weight))
        logprobs = linear_logprobs(h_few, w_few, targets[-100:], impl="reference").logprobs
        return logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (h_few, w_few))

    ours = out.logprobs[-100:].detach(), h.grad[-100:], w.grad
    for x, truth, contract in zip(ours, few(torch.float64), few(torch.float32)):
        assert relative_error(x, truth) < max(FP32_TOLERANCE, CONTRACT_MARGIN * relative_error(contract, truth))
    assert not h.grad[:-100].any()
    some = torch.arange(0, n, 997)
    exact = reference.linear_logprobs(hidden[some].double(), weight.double(), targets[some])
    assert relative_error(out.logprobs[some].detach(), exact.logprobs) < FP32_TOLERANCE


class Syncs(TorchFunctionMode):
    """Counts what makes the host wait for a device: values read, and shapes that values decide."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        if name in self.READS or by_mask:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


SYNCS = {  # (path, ratio 1): host syncs of forward and backward with a loss_mask, as docs/numerics.md counts them
    ("two_pass", False): 1 + 1,
    ("two_pass", True): 1 + 1,
    ("one_pass", False): 1 + 1,
    ("one_pass", True): 1 + 1 + 1,
    ("routed", False): 1 + 1 + 1,  # the rule keeps every pair: no routing, so tokens are dropped after all
    ("routed", True): 1 + 1 + 1,
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize(("path", "on_policy"), SYNCS)
def test_host_syncs_are_those_of_the_page(path, on_policy, mask_dtype, device, monkeypatch):
    """A mask: one. Tokens with c = 0 dropped: one. One pass: one. Routing: one. Nothing else reads the device."""
    monkeypatch.setattr(checks, "may_read", lambda x: False)  # as on an accelerator
    monkeypatch.setattr(cost, "architecture", lambda device, triton: "sm_90")
    hidden, weight, targets = inputs(150, 16, 300, device)
    mask = (torch.arange(150, device=device) % 5 != 0).to(mask_dtype)
    old = None if on_policy else torch.full((150,), -5.0, device=device)
    advantages = torch.arange(150, device=device) % 3 - 1.0
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    config = GRPOConfig(policy_loss="reinforce", tail_mass=1e-3)
    with dispatch.force(path), Syncs() as syncs:
        out = linear_grpo_loss(h, w, targets, old, advantages=advantages, loss_mask=mask, config=config, impl="triton")
        out.loss.backward()
    assert sum(syncs.counts.values()) == SYNCS[path, on_policy], syncs.counts


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_backward_in_another_thread(impl, path, device):
    """Autograd runs the backward of CUDA tensors in a thread of its own: nothing of the forward's thread is needed."""
    hidden, weight, targets = inputs(150, 16, 300, device)
    old, advantages = torch.full((150,), -5.0, device=device), torch.ones(150, device=device)

    def loss() -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        config = LADConfig(tail_mass=1e-3)
        with dispatch.force(path):
            return h, w, linear_lad_loss(h, w, targets, old, advantages=advantages, config=config, impl=impl).loss

    h, w, here = loss()
    here.backward()
    h2, w2, there = loss()
    thread = threading.Thread(target=there.backward)
    thread.start()
    thread.join()
    assert torch.equal(h.grad, h2.grad)
    assert torch.equal(w.grad, w2.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_that_pad_the_vocabulary(impl, device):
    """They are words like any other, as in the model's own logits; a slice of the weight takes them away."""
    hidden, weight, targets = inputs(40, 16, 200, device)
    real = 170
    targets = targets % real
    padded = linear_logprobs(hidden, weight, targets, impl=impl)
    weight.requires_grad_()
    out = linear_logprobs(hidden, weight[:real], targets, impl=impl)
    assert (out.logprobs > padded.logprobs).all()
    out.logprobs.sum().backward()
    assert weight.grad[:real].any()
    assert not weight.grad[real:].any()
    if device == "cpu":
        with pytest.raises(ValueError, match=r"target_ids: expected ids in \[0, 170\)"):
            linear_logprobs(hidden, weight[:real], targets.index_fill(0, targets.new_zeros(1), real), impl=impl)


def test_every_test_that_the_table_names_exists():
    """docs/numerics.md: `tests/FILE.py::NAME` of each known failure."""
    named = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", (ROOT / "docs" / "numerics.md").read_text())
    assert len(named) >= 22
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
