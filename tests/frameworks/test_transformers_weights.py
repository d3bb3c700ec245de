"""attach_fused_head and weights of the head that are sharded, absent, quantised or of another dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytest.importorskip("transformers", reason="transformers is not installed: weights that are refused are not tested")

from families import (
    HIDDEN,
    IDS,
    LOGPROB_TOLERANCE,
    MASK,
    VOCABULARY,
    fused,
    fused_logprobs,
    gradients,
    own_logprobs,
    tiny_model,
)

from lad_kernels.frameworks.transformers import attach_fused_head


class Wrapped(torch.Tensor):
    """A tensor that stands for other numbers, as quantised weights do."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def quantised():
    return nn.Parameter(torch.zeros(VOCABULARY, HIDDEN, dtype=torch.int8), requires_grad=False)


def subclass():
    return torch.Tensor._make_wrapper_subclass(Wrapped, (VOCABULARY, HIDDEN))


def shard():
    mesh = init_device_mesh("cpu", (1,))
    return nn.Parameter(distribute_tensor(torch.zeros(VOCABULARY, HIDDEN), mesh, [Shard(0)]))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (quantised, TypeError, "got torch.int8; keep the head unquantised"),
        (subclass, TypeError, "got Wrapped; keep it unquantised"),
        (shard, ValueError, "a DTensor with placements .* call through the wrapped model"),
        (lambda: torch.zeros(0), ValueError, r"got shape \[0\] on cpu; call through the wrapped model"),
        (lambda: torch.zeros(97, 32, device="meta"), ValueError, "on meta; .* do not offload"),
    ],
)
def test_weights_that_are_not_there_are_refused(weight, error, message, one_rank):
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    del model.lm_head.weight
    model.lm_head.weight = weight()
    with pytest.raises(error, match=message):
        fused_logprobs(model)
    assert "forward" not in model.lm_head.__dict__ and not model.lm_head._forward_hooks


def mixed(body, head, tied=False):
    model = tiny_model("llama", tie_word_embeddings=tied).eval().to(body)
    model.lm_head.to(head)
    attach_fused_head(model)
    return model


@pytest.mark.parametrize(("body", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_head_of_another_dtype_that_does_not_cast_is_refused(body, head):
    model = mixed(body, head)
    with pytest.raises(
        TypeError, match=rf"in one dtype, .* got {body} and {head}; call model.lm_head.to\({body}\), or"
    ):
        fused_logprobs(model)
    with torch.autocast("cpu", torch.bfloat16):  # both cures of the message
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=0.2)
    model.lm_head.to(body)
    torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=0.2)


def cast_like_trl(model, tied):
    """`cast_lm_head_to_fp32` of TRL's GRPOTrainer."""
    before, head = model.lm_head.weight.dtype, model.lm_head.float()
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight.float())
    if tied:
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.to(before))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("body", [torch.bfloat16, torch.float16])
def test_a_float32_head_on_a_16_bit_body(body, tied):
    model = tiny_model("llama", tie_word_embeddings=tied).eval().to(body)
    cast_like_trl(model, tied)
    attach_fused_head(model)
    own, seen = own_logprobs(model), []
    truth = gradients(model, own)

    def function(hidden, weight, **head):
        seen.append((hidden.dtype, weight.dtype))
        return fused(hidden, weight, **head)

    ours = model(input_ids=IDS, attention_mask=MASK, fused_head=function).result
    assert seen == [(torch.float32, torch.float32)]
    torch.testing.assert_close(ours, own, rtol=0, atol=LOGPROB_TOLERANCE * (1 + own.abs().max().item()))
    found = gradients(model, ours)
    error = max(((found[name] - g).abs().max() / g.abs().max()).item() for name, g in truth.items())
    assert truth.keys() == found.keys() and error < torch.finfo(body).eps
    without = tiny_model("llama", tie_word_embeddings=tied).eval().to(body)
    assert (own_logprobs(without) - own).abs().max() > 1e-3  # what the cast is for


def test_hidden_states_follow_the_head(monkeypatch):
    """A model over several devices (device_map); there is one device here, so the moves are only seen."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    plain = fused_logprobs(model)
    moved, to = [], torch.Tensor.to

    def seen(x, *args, **kwargs):
        if args and isinstance(args[0], torch.device):
            moved.append((list(x.shape), args[0]))
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", seen)
    assert torch.equal(fused_logprobs(model), plain)
    assert ([*IDS.shape, HIDDEN], model.lm_head.weight.device) in moved
