"""Cases of `distributed_worker.py` with real models: FSDP2, DDP and PEFT around a fused head.

Every case trains two steps of two micro-batches, with a scoring pass in between, and compares the gradient of every
parameter, the head's above all, with one process in float64 that reads the model's own logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs, reference
from lad_kernels.frameworks.distributed import global_normalizer
from lad_kernels.frameworks.transformers import attach_fused_head
from lad_kernels.testing import relative_error

CONFIG = LADConfig(eta=0.5)
MICRO_BATCHES, STEPS, LEARNING_RATE = 2, 2, 0.5
# A parameter's gradient, relative error; a lost reduction makes it 0.4 or more. Measured: 2.7e-6, with LoRA 7.3e-6.
FLOAT32 = 2e-5
# In bfloat16 (parameters cast, gradients reduced in float32): over the error of the same model in one process in
# bfloat16, which is 0.09 at most; measured: 0.95 for the head, 1.9 elsewhere (a norm). Log-probs; measured: 4.3e-3.
HEAD_MARGIN, BFLOAT16_MARGIN, BFLOAT16_LOGPROBS = 2.0, 3.0, 1e-2


def tiny_model(tied: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def batch(rank: int, micro: int) -> dict[str, Tensor]:
    """Two sequences of six tokens; ranks have different numbers of loss tokens."""
    gen = torch.Generator().manual_seed(10 * rank + micro)
    ids = torch.randint(67, (2, 6), generator=gen)
    mask = torch.rand(2, 5, generator=gen) < (0.9 if rank else 0.5)
    mask[0, 0] = True
    old = -3 + 0.5 * torch.randn(2, 5, generator=gen)
    return dict(ids=ids, mask=mask, old=old, advantages=torch.randn(2, generator=gen))


def tokens_of_step() -> Tensor:
    masks = torch.cat([batch(dist.get_rank(), micro)["mask"] for micro in range(MICRO_BATCHES)])
    return global_normalizer(masks, "token-mean", group=dist.group.WORLD)


def fused_loss(data: dict[str, Tensor], normalizer: Tensor) -> Callable:
    return lambda h, w, **head: linear_lad_loss(
        h[:, :-1], w, data["ids"][:, 1:], data["old"], advantages=data["advantages"], loss_mask=data["mask"],
        normalizer=normalizer, config=CONFIG, **head,
    ).loss  # fmt: skip


def plain_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    logp = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)  # [B, T - 1, V]
    return logp.gather(-1, ids[:, 1:, None])[..., 0]


def plain_step(model: nn.Module, normalizer: Tensor) -> dict[str, Tensor]:
    """Gradients of the whole step's loss in one process, from stored logits; then an SGD step."""
    for rank in range(dist.get_world_size()):
        for micro in range(MICRO_BATCHES):
            data = batch(rank, micro)
            reference.lad_loss(
                plain_logprobs(model, data["ids"]),
                data["old"].double(),
                data["advantages"].double(),
                loss_mask=data["mask"],
                normalizer=normalizer,
                config=CONFIG,
            ).loss.backward()
    return grads_and_step(model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE))


def grads_and_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return grads


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model: nn.Module, truth: nn.Module, defer: Callable, contract: nn.Module | None = None) -> None:
    """Both, step by step; `defer(model, last)` is the context of a micro-batch."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        normalizer = tokens_of_step()
        weights = {n.removeprefix("module."): full(p) for n, p in model.named_parameters(remove_duplicate=False)}
        for other in (truth,) if contract is None else (truth, contract):
            other.load_state_dict(weights)  # rounding of one step is not an error of the next
        with torch.no_grad():
            ids = batch(rank, 0)["ids"]
            fn = lambda h, w, **head: linear_logprobs(h[:, :-1], w, ids[:, 1:], **head)  # noqa: B023, E731
            scored = model(input_ids=ids, fused_head=fn).result.logprobs
            error = relative_error(scored, plain_logprobs(truth, ids))
            assert error < (FLOAT32 if contract is None else BFLOAT16_LOGPROBS)
        for micro in range(MICRO_BATCHES):
            data = batch(rank, micro)
            with defer(model, micro == MICRO_BATCHES - 1):
                loss = model(input_ids=data["ids"], fused_head=fused_loss(data, normalizer)).result
                (loss * ranks).backward()  # the wrapper averages
        found = {name.removeprefix("module."): full(g) for name, g in grads_and_step(model, optimizer).items()}
        expected = plain_step(truth, normalizer)
        allowed = dict.fromkeys(expected, FLOAT32)
        if contract is not None:
            rounded = plain_step(contract, normalizer)
            margin = {name: HEAD_MARGIN if "lm_head" in name else BFLOAT16_MARGIN for name in expected}
            allowed = {name: margin[name] * relative_error(rounded[name], x) for name, x in expected.items()}
        assert set(found) == set(expected)
        for name, x in expected.items():
            error = relative_error(found[name], x)
            assert error < allowed[name], f"{name}: {error:.2e}, allowed {allowed[name]:.2e}"


@contextmanager
def fsdp_sync(model: nn.Module, last: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(last)
    yield


def own_unit(model: nn.Module, **kw) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **kw)
    fully_shard(model.lm_head, **kw)
    fully_shard(model, **kw)


def with_its_norm(model: nn.Module, **kw) -> None:
    """Final norm and head in one group; a tied head together with the embedding that it shares its weight with."""
    for layer in model.model.layers:
        fully_shard(layer, **kw)
    shared = [model.model.embed_tokens] if model.config.tie_word_embeddings else []
    fully_shard([*shared, model.model.norm, model.lm_head], **kw)
    fully_shard(model, **kw)


def root_only(model: nn.Module, **kw) -> None:
    fully_shard(model, **kw)


def run_fsdp(shard: Callable, tied: bool, bfloat16: bool) -> None:
    model = tiny_model(tied)
    truth, contract = copy.deepcopy(model).double(), None
    attach_fused_head(model)
    kw = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if bfloat16:
        kw["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        contract = tiny_model(tied).bfloat16()
    shard(model, **kw)
    train(model, truth, fsdp_sync, contract)


def fsdp2() -> None:
    for shard, tied in (
        (own_unit, False),
        (with_its_norm, False),
        (with_its_norm, True),
        (root_only, False),
        (root_only, True),
    ):
        run_fsdp(shard, tied, bfloat16=False)


def fsdp2_bfloat16() -> None:
    run_fsdp(own_unit, False, bfloat16=True)
    run_fsdp(with_its_norm, True, bfloat16=True)


def compiled_blocks() -> None:
    """Every block compiled, then sharded; the fused head beside them is not. On two ranks, as it takes long."""
    if dist.get_world_size() != 2:
        return
    model = tiny_model(False)
    truth = copy.deepcopy(model).double()
    attach_fused_head(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    own_unit(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, truth, fsdp_sync)


class LossOfHead(nn.Linear):
    """A head whose forward is the loss."""

    def forward(self, hidden: Tensor, data: dict[str, Tensor]) -> Tensor:  # [B, T, D] -> []
        return linear_lad_loss(
            hidden, self.weight, data["ids"], torch.full_like(hidden[..., 0], -4.0), advantages=data["advantages"]
        ).loss


def compiled_head() -> None:
    """Body and loss each a unit of FSDP2, the loss compiled in one graph."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16), LossOfHead(16, 67, bias=False)])
    truth, data = copy.deepcopy(model).double(), [batch(r, 0) for r in range(dist.get_world_size())]
    inputs = [torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(r)) for r in range(len(data))]
    losses = [truth[1](truth[0](x.double()).tanh(), d) for x, d in zip(inputs, data)]
    (sum(losses) / len(losses)).backward()
    model[1].compile(backend="aot_eager", fullgraph=True)
    for part in model:
        fully_shard(part, mesh=init_device_mesh("cpu", (len(data),)))
    model[1](model[0](inputs[dist.get_rank()]).tanh(), data[dist.get_rank()]).backward()
    for ours, theirs in zip(model.parameters(), truth.parameters()):
        assert relative_error(ours.grad.full_tensor(), theirs.grad) < FLOAT32


def ddp() -> None:
    for tied in (False, True):
        model = tiny_model(tied)
        truth = copy.deepcopy(model).double()
        attach_fused_head(model)
        train(DistributedDataParallel(model), truth, lambda m, last: nullcontext() if last else m.no_sync())


def peft_head() -> None:
    """LoRA in the body and a trained copy of the head, each in a unit of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(False), config).eval()
    truth = copy.deepcopy(model).double()
    attach_fused_head(model)
    own_unit(model.get_base_model(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, truth, lambda m, last: fsdp_sync(m.get_base_model(), last))


def full_tensor_trap() -> None:
    """Outside the wrapped forward: a DTensor is refused, a bare full_tensor() loses gradients, Partial does not."""
    ranks = dist.get_world_size()
    data = [torch.randn(8, 16, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]  # [8, 16] by rank
    ids, h = torch.arange(8), data[dist.get_rank()]
    torch.manual_seed(0)
    head = nn.Linear(16, 64, bias=False)
    weight = head.weight.detach().double().requires_grad_()
    sum(reference.linear_logprobs(x.double(), weight, ids).logprobs.sum() for x in data).backward()
    fully_shard(head, mesh=init_device_mesh("cpu", (ranks,)))
    with pytest.raises(TypeError, match=r"lm_head_weight: .*DTensor.*bare full_tensor\(\) gives a wrong gradient"):
        linear_logprobs(h, head.weight, ids)
    errors = []
    for placements in ({}, {"grad_placements": [Partial("avg")]}):
        head.zero_grad()
        linear_logprobs(h, head.weight.full_tensor(**placements), ids).logprobs.sum().backward()
        errors.append(relative_error(head.weight.grad.full_tensor(), weight.grad / ranks))
    assert errors[0] > 0.1, errors
    assert errors[1] < FLOAT32, errors


def rows_of_a_mesh() -> None:
    """A head sharded by rows as a DTensor, uneven: its local rows and the mesh's group; the gradient is a DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    gen = torch.Generator().manual_seed(0)
    h, w = torch.randn(8, 16, generator=gen).double(), torch.randn(67, 16, generator=gen).double()
    leaf, other = w.clone().requires_grad_(), h.clone().requires_grad_()
    reference.linear_logprobs(other, leaf, torch.arange(8) * 8).logprobs.exp().sum().backward()
    weight = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(h, mesh, [Replicate()]).requires_grad_()
    out = linear_logprobs(hidden.to_local(), weight.to_local(), torch.arange(8) * 8, vocab_group=mesh.get_group("tp"))
    out.logprobs.exp().sum().backward()
    assert relative_error(weight.grad.full_tensor(), leaf.grad) < 1e-13
    assert relative_error(hidden.grad.full_tensor(), other.grad) < 1e-13


CASES = [fsdp2, fsdp2_bfloat16, compiled_blocks, compiled_head, ddp, peft_head, full_tensor_trap, rows_of_a_mesh]
