"""Cases of `distributed_worker.py` where the head itself is sharded: FSDP1 around it alone, transformers' tp_plan."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.distributed as dist
from distributed_wrappers import FLOAT32, batch, plain_logprobs
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lad_kernels import linear_lad_loss, linear_logprobs
from lad_kernels.frameworks.transformers import attach_fused_head
from lad_kernels.testing import make_inputs, relative_error


def tiny_llama() -> LlamaForCausalLM:
    """V and all that tensor parallelism splits can be divided by two and three."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=72,
        hidden_size=48,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def fused_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    def function(hidden: Tensor, weight: Tensor, **head) -> Tensor:
        return linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], **head).logprobs

    return model(input_ids=ids, fused_head=function).result


def fsdp1_around_the_head() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for orig in (False, True):
        model = tiny_llama()
        truth = copy.deepcopy(model).double()
        attach_fused_head(model)
        model.lm_head = FullyShardedDataParallel(model.lm_head, use_orig_params=orig, device_id=torch.device("cpu"))
        for _ in range(2):
            model.zero_grad()
            truth.zero_grad()
            ids = batch(rank, 0)["ids"]
            with torch.no_grad():
                assert relative_error(fused_logprobs(model, ids), plain_logprobs(truth, ids)) < FLOAT32
            fused_logprobs(model, ids).exp().sum().backward()
            for r in range(ranks):
                (plain_logprobs(truth, batch(r, 0)["ids"]).exp().sum() / ranks).backward()
            whole = truth.lm_head.weight.grad.flatten()
            size = -(-len(whole) // ranks)
            local = nn.functional.pad(whole, (0, size * ranks - len(whole))).view(ranks, size)[rank]
            found = next(model.lm_head.parameters()).grad.flatten()
            assert relative_error(found, local[: len(found)]) < FLOAT32


def tensor_parallel_plan() -> None:
    """All ranks have the same tokens; the head's rows are local, everything else is as without the plan."""
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        return
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_llama()
    truth = copy.deepcopy(model).double()
    model.tp_plan = dict(model.tp_plan)
    apply_tensor_parallelism(model, mesh)
    assert model.lm_head.weight.to_local().shape[0] == 72 // dist.get_world_size()
    attach_fused_head(model)
    ids = batch(0, 0)["ids"]
    for _ in range(2):
        model.zero_grad()
        truth.zero_grad()
        with torch.no_grad():
            assert relative_error(fused_logprobs(model, ids), plain_logprobs(truth, ids)) < FLOAT32
        fused_logprobs(model, ids).exp().sum().backward()
        plain_logprobs(truth, ids).exp().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        for name, p in truth.named_parameters():
            g = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            error = relative_error(g, p.grad)
            assert error < FLOAT32, f"{name}: {error:.2e}"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    attach_fused_head(adapted)
    with pytest.raises(TypeError, match="got default; load the model without tp_plan"):
        fused_logprobs(adapted, ids)


def another_plan() -> None:
    """torch's ColwiseParallel on the head is refused; without the head in the plan it works, as the message says."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = batch(0, 0)["ids"]
    truth = plain_logprobs(tiny_llama().double(), ids)
    body = {"model.layers.*.mlp.up_proj": ColwiseParallel(), "model.layers.*.mlp.gate_proj": ColwiseParallel()}
    body["model.layers.*.mlp.down_proj"] = RowwiseParallel()
    for plan in (body | {"lm_head": ColwiseParallel()}, body):
        model = tiny_llama()
        attach_fused_head(model)
        parallelize_module(model, mesh, plan)
        if "lm_head" in plan:
            with pytest.raises(ValueError, match="leave the head out of the plan of parallelize_module"):
                fused_logprobs(model, ids)
        else:
            assert relative_error(fused_logprobs(model, ids), truth) < FLOAT32


def compiled_calls() -> None:
    """Rows over ranks, in one compiled graph: the bits of eager mode; collectives run inside the operators."""
    x, rank, ranks = make_inputs(20, 24, 60), dist.get_rank(), dist.get_world_size()
    head = dict(loss_mask=x.loss_mask, vocab_group=dist.group.WORLD)

    def step(h: Tensor, w: Tensor) -> Tensor:  # [N, D], [V_r, D]
        scores = linear_logprobs(h, w, x.targets, **head).logprobs.sum()
        return scores + linear_lad_loss(h, w, x.targets, advantages=x.hidden[:, 0], **head).loss

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        rows = x.weight[60 * rank // ranks : 60 * (rank + 1) // ranks]
        leaves = [t.detach().clone().requires_grad_() for t in (x.hidden, rows)]
        loss = call(*leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *found))


CASES = [compiled_calls, fsdp1_around_the_head, tensor_parallel_plan, another_plan]
