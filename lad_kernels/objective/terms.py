"""One call of the objective: inputs packed, the divisor, the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.objective.config import PolicyConfig
from lad_kernels.objective.inputs import (
    PolicyInputs,
    has_values_by_token,
    lengths_of,
    tokens_by_input,
)
from lad_kernels.objective.policy import PolicyTerms, policy_terms
from lad_kernels.packing import Packing


def compute_terms(
    logprobs: Tensor,  # [M]
    entropy: Tensor | None,  # [M]
    inputs: PolicyInputs,
    packing: Packing,
    config: PolicyConfig,
    impl: str,
) -> PolicyTerms:
    """Pack what is still unpacked and run the objective in Triton or PyTorch."""
    if config.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: needed because config.entropy_coef is {config.entropy_coef}, got None")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def by_token(x: Tensor | None) -> bool:
        return x is not None and has_values_by_token(x, packing)

    def take(x: Tensor | None, by_token: bool = True) -> Tensor | None:  # per token -> [M]; per sequence stays [B]
        if x is None:
            return None
        return (packing.take(x.detach()) if by_token else x.detach()).to(dtype)

    finite = tokens_by_input(inputs, packing, config)  # [M]
    usable = packing.inside if finite is None else finite if packing.inside is None else finite & packing.inside  # [M]
    group_ids = None
    if inputs.rewards is not None or config.norms_target:
        group_ids = checks.groups(len(packing.cu_seqlens) - 1, logprobs.device, inputs.group_size, inputs.group_ids)
    compute: Any = policy_terms
    if checks.use_triton(impl, logprobs.device, logprobs.dtype):
        from lad_kernels.objective.kernels.policy import policy_terms as compute
    with torch.no_grad():
        found = compute(
            logprobs.detach().to(dtype), take(inputs.old_logprobs),
            advantages=take(inputs.advantages, by_token(inputs.advantages)),
            advantages_by_token=by_token(inputs.advantages), rewards=take(inputs.rewards, False), group_ids=group_ids,
            cu_seqlens=packing.cu_seqlens, config=config,
            normalizer=divisor(inputs.normalizer, packing, config, logprobs, usable), usable=usable,
            ref_logprobs=take(inputs.ref_logprobs), entropy=None if entropy is None else entropy.detach().to(dtype),
            rollout_is_weights=take(inputs.rollout_is_weights, by_token(inputs.rollout_is_weights)),
            weights_by_token=by_token(inputs.rollout_is_weights),
        )  # fmt: skip
        terms = PolicyTerms(*found)
        terms.metrics["nonfinite_share"] = _dropped_share(finite, packing.inside, logprobs)
    return terms


def _dropped_share(finite: Tensor | None, inside: Tensor | None, like: Tensor) -> Tensor:  # [M], [M] -> []
    """Share of tokens that an input of an engine drops."""
    if finite is None:
        return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    inside = torch.ones_like(finite) if inside is None else inside
    share = (inside & ~finite).sum() / inside.sum().clamp(min=1)
    return share.to(torch.promote_types(like.dtype, torch.float32))


def divisor(
    given: float | Tensor | None, packing: Packing, config: PolicyConfig, like: Tensor, usable: Tensor | None
) -> Tensor:
    """The divisor Z as a 0-d tensor on the device of `like`, without a host sync; `usable` [M]: who counts, or all."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if given is None and config.loss_agg_mode == "token-mean":
        given = max(1, packing.tokens) if usable is None else usable.sum().clamp(min=1)
    elif given is None and config.loss_agg_mode == "seq-mean-token-sum-norm":
        given = max(1, packing.shape.numel())
    elif given is None:
        given = (lengths_of(packing.cu_seqlens, usable) > 0).sum().clamp(min=1)
    if isinstance(given, Tensor):
        return given.detach().to(like.device, dtype).reshape(())
    return torch.full((), given, dtype=dtype, device=like.device)
