"""A case of `distributed_worker.py`: DeepSpeed ZeRO-3 around a fused head."""

from __future__ import annotations

import copy
import os

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from distributed_wrappers import (
    FLOAT32,
    LEARNING_RATE,
    MICRO_BATCHES,
    STEPS,
    batch,
    fused_loss,
    plain_logprobs,
    plain_step,
    tiny_model,
    tokens_of_step,
)

from lad_kernels import linear_logprobs
from lad_kernels.frameworks.transformers import attach_fused_head
from lad_kernels.testing import relative_error


def zero3() -> None:
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # looked at, not used
    for tied in (False, True):
        model = tiny_model(tied)
        truth = copy.deepcopy(model).double()
        attach_fused_head(model)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # its default clips at 1
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(STEPS):
            normalizer = tokens_of_step()
            for micro in range(MICRO_BATCHES):
                data = batch(dist.get_rank(), micro)
                with torch.no_grad():
                    ids = data["ids"]
                    fn = lambda h, w, **head: linear_logprobs(h[:, :-1], w, ids[:, 1:], **head)  # noqa: B023, E731
                    scored = engine(input_ids=ids, fused_head=fn).result.logprobs
                    assert relative_error(scored, plain_logprobs(truth, ids)) < FLOAT32
                loss = engine(input_ids=data["ids"], fused_head=fused_loss(data, normalizer)).result
                engine.backward(loss * dist.get_world_size() * MICRO_BATCHES)  # averaged over ranks and micro-batches
                if micro < MICRO_BATCHES - 1:
                    engine.step()
            found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
            engine.step()
            for name, x in plain_step(truth, normalizer).items():
                error = relative_error(found[name], x)
                assert error < FLOAT32, f"tied {tied}, {name}: {error:.2e}"


CASES = [zero3]
