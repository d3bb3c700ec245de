"""Compiled and captured on a GPU; without one tests/device counts the syncs of a call, and test_operators compiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lad_kernels import linear_grpo_loss, linear_lad_loss, linear_logprobs
from lad_kernels.testing import make_inputs, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; lost: a capture, and Inductor on CUDA")
N, D, V = 512, 256, 4096


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets, old log-probs and advantages [N]."""
    x = make_inputs(N, D, V, dtype=torch.bfloat16, device="cuda", entropy=2.0, masked=0.0, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    old = linear_logprobs(x.hidden, x.weight, x.targets).logprobs + 0.1 * torch.randn(N, generator=gen).cuda()
    return x.hidden, x.weight, x.targets, old, torch.randn(N, generator=gen).cuda()


def loss(function, hidden, weight, targets, old, advantages, **options) -> Tensor:
    if function is linear_logprobs:
        return (function(hidden, weight, targets, **options).logprobs * advantages).mean()
    return function(hidden, weight, targets, old, advantages=advantages, **options).loss


@pytest.mark.parametrize("function", (linear_lad_loss, linear_grpo_loss, linear_logprobs), ids=lambda f: f.__name__)
def test_a_graph_is_replayed_on_other_data(function):
    """Bit for bit what the same call gives outside the graph."""
    static = [x.detach().clone() for x in batch()]
    leaves = [x.requires_grad_() for x in static[:2]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before the capture
        torch.autograd.grad(loss(function, *static, capturable=True), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(function, *static, capturable=True)
        gradients = torch.autograd.grad(value, leaves)
    for seed in (1, 2):
        given = batch(seed)
        with torch.no_grad():
            for old, new in zip(static, given):
                old.copy_(new)
        graph.replay()
        again = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(given)]
        expected = loss(function, *again, capturable=True)
        assert torch.equal(value, expected)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, again[:2])):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("function", (linear_lad_loss, linear_grpo_loss, linear_logprobs), ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_on_the_device(mode, function):
    given = batch()
    leaves = [x.requires_grad_() for x in given[:2]]
    found, compiled = [], torch.compile(loss, fullgraph=True, mode=mode)
    for call in (compiled, compiled, compiled, loss):  # in the mode of graphs a warm-up, a capture, a replay
        value = call(function, *given)
        found.append([x.clone() for x in (value, *torch.autograd.grad(value, leaves))])
    for ours, theirs in zip(*found[-2:]):
        assert relative_error(ours, theirs.double()) <= 2e-3  # bfloat16 gradients that a factor rounds once more
