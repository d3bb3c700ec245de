"""What autograd keeps for a backward: all of it, in sight of hooks and of selective checkpointing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_operators import OPS, Batch, D, V, lad, results
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lad_kernels import linear_logprobs
from lad_kernels.head import Head, dispatch
from lad_kernels.testing import FP32_TOLERANCE, relative_error


@pytest.mark.parametrize("save", (True, False))
def test_selective_checkpointing_can_save_log_probs(save, monkeypatch):
    forward, count = Head.forward, []
    monkeypatch.setattr(Head, "forward", lambda *a, **k: (count.append(1), forward(*a, **k))[1])
    b, model = Batch(), nn.Linear(D, D)
    x = b.hidden.detach().nan_to_num(0.0)

    def score(x: Tensor) -> Tensor:
        return linear_logprobs(model(x), b.weight, b.targets).logprobs

    def policy(ctx, op, *args, **kwargs):
        wanted = save and op is OPS.linear_logprobs.default
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    checkpoint(score, x, use_reentrant=False, context_fn=contexts).sum().backward()
    ours, b.weight.grad = b.weight.grad, None
    score(x).sum().backward()
    assert torch.equal(ours, b.weight.grad)
    assert len(count) - 1 == (1 if save else 2)


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_autograd_saves_all_that_a_backward_needs(path):
    """Hooks on saved tensors can move everything elsewhere, and nothing is kept beside them."""
    b, stored = Batch(6, 9), []

    def pack(x: Tensor) -> int:
        stored.append(x.detach().clone())
        return len(stored) - 1

    with dispatch.force(path):
        expected = dict(results(lad, b))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: stored[i].clone()):
            loss, _ = lad(b)
    assert any(x.shape == (V, D) for x in stored)
    state = [vars(loss.grad_fn), vars(loss.grad_fn.layout), vars(loss.grad_fn.plan), vars(loss.grad_fn.plan.gradient)]
    assert max(x.numel() for x in tree_leaves(state) if isinstance(x, Tensor)) == 1
    for x in b.parameters():
        x.grad = None
    loss.backward()
    assert torch.equal(b.hidden.grad, expected["gradient 0"])
    assert torch.equal(b.weight.grad, expected["gradient 1"])


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_a_graph_that_is_kept_gives_its_gradients_twice(path):
    b = Batch(6, 9)
    with dispatch.force(path):
        loss, _ = lad(b)
    first = torch.autograd.grad(3 * loss, (b.hidden, b.weight), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, (b.hidden, b.weight))
    for x, y, copy in zip(first, second, copies):
        assert torch.equal(x, copy)
        assert relative_error(y, x.double()) <= FP32_TOLERANCE  # 3.6e-7 after one pass, whose own are given away
