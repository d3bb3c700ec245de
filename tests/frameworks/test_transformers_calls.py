"""State of one call of attach_fused_head on a shared module: threads, nested calls, exceptions, replicas, compiling."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: shared modules are not tested")

from families import IDS, MASK, compare, fused, fused_logprobs, own_logprobs, tiny_model

from lad_kernels import linear_logprobs
from lad_kernels.frameworks.transformers import attach_fused_head

BATCHES = [torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def score(model, ids):
    """Log-probs [2, 8] of the ids' own tokens; the function waits, so that calls of threads overlap."""

    def function(hidden, weight, **head):
        threading.Event().wait(0.002)
        return linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], **head).logprobs

    return model(input_ids=ids, fused_head=function).result


def plain(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "mpt"])  # mpt: the first call is repeated, since its config misleads
def test_threads_that_share_a_model(family):
    model = tiny_model(family).eval().requires_grad_(False)
    attach_fused_head(model)
    twin = tiny_model(family).eval().requires_grad_(False)
    attach_fused_head(twin)
    jobs = [(f, ids) for _ in range(10) for ids in BATCHES for f in (score, plain)]
    truth = [f(twin, ids) for f, ids in jobs[: 2 * len(BATCHES)]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0](model, job[1]), jobs))
    wrong = [i for i, x in enumerate(found) if not torch.equal(x, truth[i % len(truth)])]
    assert not wrong, f"{len(wrong)} of {len(jobs)}"


def test_scoring_beside_training():
    """Gradients of one thread, log-probs without gradients of the other."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)

    def train(ids):
        return torch.autograd.grad(score(model, ids).sum(), model.lm_head.weight)[0]

    def scored(ids):
        with torch.no_grad():
            return score(model, ids)

    jobs = [(f, ids) for _ in range(8) for ids in BATCHES for f in (train, scored)]
    truth = [f(ids) for f, ids in jobs[: 2 * len(BATCHES)]]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: job[0](job[1]), jobs))
    assert all(torch.equal(x, truth[i % len(truth)]) for i, x in enumerate(found))


def test_nested_calls():
    """The function may call the model, plainly and with a function of its own; so may a hook in its body."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    seen = []

    def function(hidden, weight, **head):
        seen.append((plain(model, BATCHES[1]), score(model, BATCHES[2]), model.lm_head(hidden)))
        return fused(hidden, weight, **head)

    def in_the_body(module, args, out):
        if not busy:
            busy.append(True)
            seen.append((plain(model, BATCHES[1]), score(model, BATCHES[2]), plain(model, IDS)))

    truth = (plain(model, BATCHES[1]), score(model, BATCHES[2]), plain(model, IDS))
    outer = fused_logprobs(model)
    busy: list[bool] = []
    model.model.layers[0].register_forward_hook(in_the_body)
    found = model(input_ids=IDS, attention_mask=MASK, fused_head=function).result
    assert torch.equal(found, outer) and len(seen) == 2
    for logits, logprobs, _ in seen:
        assert torch.equal(logits, truth[0]) and torch.equal(logprobs, truth[1])
    assert torch.equal(seen[0][2], truth[2]) and seen[1][2].shape == truth[2].shape


def test_exceptions_leave_nothing_behind():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    before = plain(model, IDS)

    def failing(hidden, weight, **head):
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            model(input_ids=IDS, fused_head=failing)
        assert torch.equal(plain(model, IDS), before)
        compare(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_call(reentrant):
    """The backward runs the call again, in whatever thread it is."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    truth = torch.autograd.grad(fused_logprobs(model).sum(), model.lm_head.weight)[0]
    anchor = torch.ones((), requires_grad=True)

    def call(anchor):
        return anchor * fused_logprobs(model)

    for p in model.parameters():
        p.grad = None
    torch.utils.checkpoint.checkpoint(call, anchor, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, truth)


def replicas(model, monkeypatch, factors):
    """nn.DataParallel's replicas, weights multiplied by a factor each; there is one device, nothing is sent."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional=False: device)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[factors[d] * x for x in tensors] for d in devices],
    )
    return replicate.replicate(model, list(range(len(factors))))


@pytest.mark.parametrize("patched", [False, True])
def test_replicas_run_on_their_own_weights(patched, monkeypatch):
    factors = [1.0, 1.05, 0.9]
    model = tiny_model("llama").eval()
    truth = []
    for factor in factors:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in (*twin.parameters(), *twin.buffers()):
                p.mul_(factor)
        truth.append((own_logprobs(twin), plain(twin, IDS)))
    if patched:  # as accelerate does
        inner = model.forward.__func__
        model.forward = (lambda self, *args, **kwargs: inner(self, *args, **kwargs)).__get__(model)
    attach_fused_head(model)
    fused_logprobs(model)
    parts = replicas(model, monkeypatch, factors)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda part: (fused_logprobs(part), plain(part, IDS)), parts))
    for (ours, logits), (own, expected) in zip(found, truth):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (truth[0][0] - truth[1][0]).abs().max() > 0.05
    gradient = torch.autograd.grad(found[1][0].sum(), model.lm_head.weight)[0]  # through the replica's weight
    assert gradient.abs().max() > 0


def test_results_of_data_parallel_are_refused_by_name(monkeypatch):
    gather = importlib.import_module("torch.nn.parallel.scatter_gather")
    monkeypatch.setattr(gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim))  # for CUDA alone
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    out = model(input_ids=IDS, fused_head=fused)
    with pytest.raises(TypeError, match=r"got nn\.DataParallel, whose gather cannot; use DistributedDataParallel"):
        nn.parallel.gather([out, out], "cpu")


def test_a_copy_of_a_copy():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    fused_logprobs(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert type(twin.lm_head) is nn.Linear
    with torch.no_grad():
        twin.lm_head.weight.mul_(1.1)
    compare(twin)
    head = pickle.loads(pickle.dumps(model.lm_head))
    assert type(head) is nn.Linear and torch.equal(head.weight, model.lm_head.weight)


def test_detach_restores_the_head():
    model = tiny_model("llama").eval()
    head = attach_fused_head(model)
    fused_logprobs(model)
    assert type(model.lm_head) is not nn.Linear and repr(model.lm_head) == repr(nn.Linear(32, 97, bias=False))
    head.detach()
    assert type(model.lm_head) is nn.Linear and not model._forward_hooks
    assert "forward" not in model.lm_head.__dict__


def test_a_head_that_is_patched_later():
    """accelerate and TRL put a forward on the head itself."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    before = fused_logprobs(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden)
    assert torch.equal(fused_logprobs(model), before)
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    assert torch.equal(model.lm_head(torch.ones(32)), 2 * own(torch.ones(32)))
    with pytest.raises(ValueError, match="expected the head, Linear, to be hidden W"):
        fused_logprobs(model)
    del model.lm_head.forward
    assert torch.equal(fused_logprobs(model), before)


def test_plain_forwards_compile_without_a_graph_break():
    model = tiny_model("llama", num_hidden_layers=1).eval().requires_grad_(False)
    attach_fused_head(model)
    before = fused_logprobs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = plain(model, IDS)
    for _ in range(2):
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits)
        loose = torch.compile(model, backend="eager")
        torch.testing.assert_close(fused_logprobs(loose), before, rtol=0, atol=1e-5)
        torch.testing.assert_close(loose(input_ids=IDS).logits, logits)
