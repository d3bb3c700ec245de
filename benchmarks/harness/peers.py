"""Adapters to other projects' public functions; their code is imported when it runs and never copied.

What a peer cannot express is not measured for it: QuACK and PyTorch's own function return one scalar, so they are in
the `ce` job alone. Arguments are those their documentation recommends for accuracy where a choice exists.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from benchmarks.harness.data import Batch
from benchmarks.harness.eager import EPSILON, grpo_from_logprobs
from benchmarks.harness.provider import (
    CPU_COMPILES,
    SLOW_START,
    Provider,
    compiler_missing,
    needs,
    on_cuda,
    package_missing,
)

TRL_CHUNK = 32_768  # vocabulary columns of a tile: the default of TRL's own callers


def trl_logprobs(batch: Batch) -> Tensor:  # [N]
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(batch.hidden, batch.weight, None, batch.targets, 1.0, TRL_CHUNK, None, 1.0, ())[
        0
    ]


def trl_missing(batch: Batch) -> str | None:
    for name in ("trl", "transformers", "accelerate", "datasets"):
        if package_missing(name):
            return package_missing(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "its Triton kernels are not run in the interpreter"
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: F401
    except ImportError as error:
        return f"this version of trl does not have trl.kernels.chunked_logprob ({error})"
    return None


def liger_scaled_ce(batch: Batch) -> Tensor:  # [N]
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(batch.hidden, batch.weight, batch.targets)


def liger_scaled_missing(batch: Batch) -> str | None:
    reason = package_missing("liger_kernel")
    if reason or not on_cuda(batch) or torch.cuda.get_device_capability(batch.hidden.device) != (9, 0):
        return reason
    if batch.hidden.dtype != torch.bfloat16:
        return "its Hopper kernels take bfloat16 alone"
    return package_missing("cutlass")  # of nvidia-cutlass-dsl


def liger_linear_ce(reduction: str):
    def forward(batch: Batch) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
        value = loss(batch.weight, batch.hidden, batch.targets)
        return -value if reduction == "none" else value

    return forward


def liger_grpo(batch: Batch) -> Tensor:  # []
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=on_cuda(batch),
        use_ref_model=False,
        loss_type="dapo",
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        temperature=1.0,
    )
    hidden = batch.hidden.view(*batch.padded, -1)  # [B, T, D]
    mask = torch.ones_like(batch.old_logprobs)  # [B, T]
    out = loss(
        hidden,
        batch.weight,
        batch.targets.view(batch.padded),
        mask,
        batch.advantages,
        old_per_token_logps=batch.old_logprobs,
    )
    return out[0]


def cce(reduction: str):
    def forward(batch: Batch) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if on_cuda(batch) else "torch_compile"
        value = linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction=reduction, impl=impl)
        return -value if reduction == "none" else value

    return forward


def cce_missing(batch: Batch) -> str | None:
    if package_missing("cut_cross_entropy"):
        return package_missing("cut_cross_entropy")
    if on_cuda(batch) and batch.hidden.dtype == torch.float32:
        return "its CUDA kernels take 16-bit inputs alone"
    return None if on_cuda(batch) else compiler_missing(batch)


def flash_attn_logprobs(batch: Batch) -> Tensor:  # [N]
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return -cross_entropy_loss(batch.hidden @ batch.weight.T, batch.targets)[0]


def verl_logprobs(batch: Batch) -> Tensor:  # [N]
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(batch.hidden, batch.weight, batch.targets, 1.0, "none")[0]


def verl_missing(batch: Batch) -> str | None:
    reason = needs("verl", cuda=True)(batch)
    if reason is None and batch.hidden.shape[1] % 128:
        return f"it needs a hidden size that 128 divides, got {batch.hidden.shape[1]}"
    return reason


def quack_ce(batch: Batch) -> Tensor:  # []
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="mean")


def trl_grpo(batch: Batch) -> Tensor:  # []
    return grpo_from_logprobs(trl_logprobs(batch), batch)


def peer_providers() -> list[Provider]:
    liger, liger_cuda = needs("liger_kernel"), needs("liger_kernel", cuda=True)
    return [
        Provider("TRL fused head", "head", trl_logprobs, trl_missing),
        Provider("TRL fused head, eager loss", "grpo", trl_grpo, trl_missing),
        Provider("TRL fused head, mean", "ce", lambda b: -trl_logprobs(b).mean(), trl_missing),
        Provider("Liger scaled CE", "head", liger_scaled_ce, liger_scaled_missing),
        Provider("Liger fused linear CE, none", "head", liger_linear_ce("none"), liger_cuda),
        Provider("Liger fused linear CE", "ce", liger_linear_ce("mean"), liger_cuda),
        Provider("Liger fused GRPO", "grpo", liger_grpo, liger, tags=SLOW_START),
        Provider("Cut Cross-Entropy", "head", cce("none"), cce_missing, note="filters gradients", tags=CPU_COMPILES),
        Provider("Cut Cross-Entropy", "ce", cce("mean"), cce_missing, note="filters gradients", tags=CPU_COMPILES),
        Provider(
            "flash-attn cross entropy",
            "head",
            flash_attn_logprobs,
            needs("flash_attn", cuda=True),
            note="stores logits",
        ),
        Provider("verl linear_cross_entropy", "head", verl_logprobs, verl_missing),
        Provider("QuACK chunked linear CE", "ce", quack_ce, needs("quack", cuda=True)),
    ]
