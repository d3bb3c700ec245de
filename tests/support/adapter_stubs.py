"""Stubs of the frameworks whose adapters need no more than a signature, put into `sys.modules` for one test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor


@dataclass
class LossInputs:
    """prime-rl 0.8's record of one sequence."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of this name with these members, and the packages that hold it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if not isinstance(sys.modules.get(parent), Stub):
            monkeypatch.setitem(sys.modules, parent, Stub(parent))
    module = Stub(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    setattr(sys.modules[parent], parts[-1], module)


class Stub(ModuleType):
    pass


def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, total_lengths, response_lengths, **top_p):
    """slime's, without its parallelism: logits [1, N, V] -> log-probs [T_i] of the responses."""
    logp = (logits[0] / args.rollout_temperature).log_softmax(-1)  # [N, V]
    rows, start = [], 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths):
        own = logp[start + total - response - 1 : start + total - 1]
        rows.append(own.gather(-1, tokens[total - response :, None])[:, 0])
        start += total
    return torch.empty(0), {"log_probs": rows}


def stub_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )


def slime_case(**more) -> tuple[SimpleNamespace, dict, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Arguments, batch, logits [1, N, V], the reducer (a sum of means over samples, divisors fixed beforehand) and the
    mask that it multiplies by [M]."""
    g = torch.Generator().manual_seed(1)
    totals, responses, vocab = [6, 4], [4, 2], 11
    masks = [torch.tensor([1.0, 1, 0, 1]), torch.tensor([1.0, 1])]
    divisors = [5, 5]  # both samples belong to one rollout
    logits = torch.randn(1, sum(totals), vocab, generator=g)
    batch = {
        "unconcat_tokens": [torch.randint(0, vocab, (n,), generator=g) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "advantages": [torch.randn(1, generator=g).expand(n) for n in responses],
        "log_probs": [-3 * torch.rand(n, generator=g) for n in responses],
    }

    def reduce(x):
        return sum((a * m).sum() / d for a, m, d in zip(x.split(responses), masks, divisors))

    args = SimpleNamespace(rollout_temperature=0.8, use_rollout_logprobs=False, lad={"eta": 0.6}, **more)
    return args, batch, logits, reduce, torch.cat(masks)


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The adapter, imported beside the stubs; forgotten again after the test."""
    monkeypatch.setitem(sys.modules, name, None)  # so that what was there comes back, or nothing
    del sys.modules[name]
    return importlib.import_module(name)


def stub_torchtitan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lad_kernels.frameworks.torchtitan beside a stub of torchtitan's loss module."""

    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            pass

    def compute_logprobs(logits, labels):
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    put(monkeypatch, "torchtitan.components.loss", BaseLoss=BaseLoss, compute_logprobs=compute_logprobs)
    return fresh(monkeypatch, "lad_kernels.frameworks.torchtitan")


def stub_verl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lad_kernels.frameworks.verl beside stubs of what it imports; with_verl/ has verl itself."""

    @dataclass
    class PolicyLossConfig:
        loss_mode: str = "vanilla"

    put(monkeypatch, "verl.models.transformers.monkey_patch", patch_forward_with_backends=None)
    put(monkeypatch, "verl.models.transformers.dense_common", CausalLMOutputForPPO=SimpleNamespace)
    put(monkeypatch, "verl.trainer.ppo.core_algos", register_policy_loss=lambda name: lambda function: function)
    put(monkeypatch, "verl.workers.config", PolicyLossConfig=PolicyLossConfig)
    return fresh(monkeypatch, "lad_kernels.frameworks.verl")
