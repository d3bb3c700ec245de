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
    "Tensor? entropy, Tensor? rollout_is_weights, str[] words, float[] numbers"
)
_KINDS: tuple[Any, ...] = (LADConfig, GRPOConfig)
_WORDS = {kind: tuple(f.name for f in fields(kind) if str(f.type).startswith("str")) for kind in _KINDS}
_NUMBERS = {kind: tuple(f.name for f in fields(kind) if f.name not in _WORDS[kind]) for kind in _KINDS}


def flat_inputs(inputs: PolicyInputs, config: PolicyConfig) -> tuple:
    """In the order of INPUTS: of the config its words ("" for None), and its numbers (NaN for None)."""
    *before, divisor, ref_logprobs, entropy, weights = inputs
    tensor, number = (divisor, None) if isinstance(divisor, Tensor) else (None, divisor)
    words = [getattr(config, name) or "" for name in _WORDS[type(config)]]
    given = [getattr(config, name) for name in _NUMBERS[type(config)]]
    numbers = [math.nan if x is None else float(x) for x in given]
    return (*before, tensor, number, ref_logprobs, entropy, weights, words, numbers)


def inputs_of(kind: Any, flat: Sequence[Any]) -> tuple[PolicyInputs, Any]:
    """Inputs and config, of what `flat_inputs` gave for a config of this kind."""
    *before, tensor, number, ref_logprobs, entropy, weights, words, numbers = flat
    divisor = number if tensor is None else tensor
    inputs = PolicyInputs._make((*before, divisor, ref_logprobs, entropy, weights))
    given: dict[str, Any] = {name: word or None for name, word in zip(_WORDS[kind], words)}
    given |= {name: None if math.isnan(x) else x for name, x in zip(_NUMBERS[kind], numbers)}
    if "centered" in given:
        given["centered"] = bool(given["centered"])
    return inputs, kind(**given)
