"""Configs and inputs of an objective as the operators of torch.library take them: tensors, numbers and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from lad_kernels.objective.config import GRPOConfig, LADConfig, PolicyConfig
from lad_kernels.objective.inputs import PolicyInputs

INPUTS = (
    "Tensor? old_logprobs, Tensor? advantages, Tensor? rewards, SymInt? group_size, Tensor? group_ids, "
    "Tensor? loss_mask, Tensor? cu_seqlens, Tensor? normalizer, float? divisor, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? rollout_is_weights"
)
CONFIG = "str[] words, float[] numbers"
_KINDS: tuple[Any, ...] = (LADConfig, GRPOConfig)
_WORDS = {kind: tuple(f.name for f in fields(kind) if str(f.type).startswith("str")) for kind in _KINDS}
_NUMBERS = {kind: tuple(f.name for f in fields(kind) if f.name not in _WORDS[kind]) for kind in _KINDS}


def flat_inputs(inputs: PolicyInputs) -> tuple:
    """In the order of INPUTS."""
    divisor = inputs.normalizer
    tensor, number = (divisor, None) if isinstance(divisor, Tensor) else (None, divisor)
    first = (inputs.old_logprobs, inputs.advantages, inputs.rewards, inputs.group_size, inputs.group_ids)
    last = (inputs.ref_logprobs, inputs.entropy, inputs.rollout_is_weights)
    return (*first, inputs.loss_mask, inputs.cu_seqlens, tensor, number, *last)


def inputs_of(flat: Sequence[Any]) -> PolicyInputs:
    """Of what `flat_inputs` gave."""
    *first, tensor, number, ref_logprobs, entropy, weights = flat
    divisor = number if tensor is None else tensor
    old_logprobs, advantages, rewards, group_size, group_ids, loss_mask, cu_seqlens = first
    return PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=divisor,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        rollout_is_weights=weights,
    )


def flat_config(config: PolicyConfig) -> tuple[list[str], list[float]]:
    """Its words ("" for None), and its numbers (NaN for None)."""
    kind = type(config)
    words = [getattr(config, name) or "" for name in _WORDS[kind]]
    numbers = [math.nan if (x := getattr(config, name)) is None else float(x) for name in _NUMBERS[kind]]
    return words, numbers


def config_of(kind: Any, words: Sequence[str], numbers: Sequence[float]) -> Any:
    """Of what `flat_config` gave for a config of this kind."""
    given: dict[str, Any] = {name: word or None for name, word in zip(_WORDS[kind], words)}
    given |= {name: None if math.isnan(x) else x for name, x in zip(_NUMBERS[kind], numbers)}
    if "centered" in given:
        given["centered"] = bool(given["centered"])
    return kind(**given)
