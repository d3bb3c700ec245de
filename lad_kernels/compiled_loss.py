"""linear_lad_loss and linear_grpo_loss as operators: what torch.compile and torch.export see of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lad_kernels.head import ARGUMENTS, SCHEMA, HeadArguments, Needs, in_autocast_dtype
from lad_kernels.objective import (
    INPUTS,
    GRPOConfig,
    LADConfig,
    PolicyConfig,
    PolicyInputs,
    flat_inputs,
    inputs_of,
    metric_names,
    without_columns,
)
from lad_kernels.operators import operator, stacked, unstacked, widest, with_gradients
from lad_kernels.outputs import LossOutput
from lad_kernels.policy_step import prepared, run
from lad_kernels.step import HEAD_METRICS, Wanted, all_metrics
from lad_kernels.step_operator import DIFFERENTIABLE, GRADIENTS, empty_gradients, gradients_of

# In the shape of target_ids, or [0] where not wanted; advantages [B] of given rewards; metrics [K] of `_metric_names`.
_OUTPUTS = f"(Tensor loss, Tensor logprobs, Tensor entropy, Tensor advantages, Tensor metrics, {GRADIENTS})"


def compiled_loss(given: HeadArguments, inputs: PolicyInputs, config: PolicyConfig, wanted: Wanted) -> LossOutput:
    """The operator's call, for torch.compile and torch.export to trace."""
    inputs = without_columns(inputs, given.target_ids, "target_ids")
    call, given = _OPERATORS[type(config)], in_autocast_dtype(given)
    needs = Needs.of(given.hidden_states, given.lm_head_weight, given.bias)
    outputs = call(*given.flat(), *flat_inputs(inputs, config), wanted.entropy, wanted.logprobs, list(needs))
    loss, logprobs, entropy, advantages, metrics, *_ = outputs
    logprobs = logprobs if wanted.logprobs else None
    entropy = entropy if wanted.entropy or config.entropy_coef != 0 else None
    advantages = advantages if inputs.advantages is None else inputs.advantages.detach()
    metrics = unstacked(metrics, _metric_names(config, wanted, needs), loss.dtype)
    return LossOutput(loss, logprobs, entropy, advantages, metrics)


def _metric_names(config: PolicyConfig, wanted: Wanted, needs: Needs) -> tuple[str, ...]:
    """Metrics of a call, in a fixed order."""
    entropy = wanted.entropy or config.entropy_coef != 0
    return (*metric_names(config, entropy=entropy), *(HEAD_METRICS if any(needs) else ()), "head_flops")


def _operator(name: str, kind: type) -> Any:
    """`lad_kernels::name`, for configs of a kind."""

    def arguments_of(arguments: tuple) -> tuple[HeadArguments, PolicyInputs, PolicyConfig, Wanted, Needs]:
        *flat, entropy, logprobs, needs = arguments
        inputs, config = inputs_of(kind, flat[ARGUMENTS:])
        return HeadArguments.of_flat(flat[:ARGUMENTS]), inputs, config, Wanted(logprobs, entropy), Needs(*needs)

    @operator(name, f"({SCHEMA}, {INPUTS}, bool return_entropy, bool return_logprobs, bool[] needs) -> {_OUTPUTS}")
    def loss(*arguments: Any) -> tuple[Tensor, ...]:
        given, inputs, config, wanted, needs = arguments_of(arguments)
        inputs, operands = prepared(given, inputs, config, wanted, needs)
        result, count = run(operands, inputs, config, wanted, given, needs)
        empty, scatter_back = functools.partial(result.logprobs.new_empty, 0), operands.layout.packing.scatter_back
        return (
            result.terms.loss,
            scatter_back(result.logprobs) if wanted.logprobs else empty(),
            empty() if result.entropy is None else scatter_back(result.entropy),
            empty() if inputs.rewards is None else result.terms.advantages,
            stacked(all_metrics(result, count), _metric_names(config, wanted, needs)),
            *gradients_of(operands, result, needs),
        )

    @loss.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        given, inputs, config, wanted, needs = arguments_of(arguments)
        hidden, targets = given.hidden_states, given.target_ids
        new = functools.partial(hidden.new_empty, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (
            new(()),
            new(targets.shape if wanted.logprobs else 0),
            new(targets.shape if wanted.entropy or config.entropy_coef != 0 else 0),
            new(0 if inputs.rewards is None else inputs.rewards.shape),
            hidden.new_empty(len(_metric_names(config, wanted, needs)), dtype=widest(hidden.device)),
            *empty_gradients((hidden, given.lm_head_weight, given.bias), needs),
        )

    with_gradients(loss, DIFFERENTIABLE)
    return loss


_OPERATORS = {LADConfig: _operator("linear_lad_loss", LADConfig), GRPOConfig: _operator("linear_grpo_loss", GRPOConfig)}
