"""attach_fused_head and weights of the head that are sharded, absent, quantised or of another dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytest.importorskip("transformers", reason="transformers is not installed: weights that are refused are not tested")

from families import HIDDEN, VOCABULARY, fused_logprobs, own_logprobs, tiny_model

from integration.transformers import attach_fused_head


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


@pytest.mark.parametrize(("body", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_head_of_another_dtype_is_refused(body, head):
    model = tiny_model("llama", tie_word_embeddings=False).eval().to(body)
    model.lm_head.to(head)
    attach_fused_head(model)
    with pytest.raises(TypeError, match=f"lm_head.weight in one dtype, got {body} and {head}; cast one"):
        fused_logprobs(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=0.2)
