"""A loss and the gradient of its head as one operator, for torch.compile and torch.export.

Shapes outside are those of the arguments: which tokens take part and what is routed is decided inside. So the gradients
are computed with the loss, and the backward multiplies them by its upstream gradient. Outside torch.compile the public
functions compute them in the backward, where that takes less memory or rounds once less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lad_kernels.head import Needs, Operands
from lad_kernels.operators import operator, with_gradients
from lad_kernels.step import StepResult

_GRADIENTS = "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient"
_HIDDEN, _WEIGHT, _BIAS = 0, 1, 3  # among the arguments of every operator
Outputs = tuple[Tensor, ...]


def step_operator(name: str, schema: str, outputs: str, fake: Callable[..., Outputs]) -> Callable[..., Callable]:
    """Register a function (arguments, needs) -> (outputs, gradients as of `gradients_of`) as `lad_kernels::name`.

    Args:
        schema: its arguments, beginning with head.SCHEMA, without `needs`.
        outputs: the loss, which alone is differentiable, and what else it returns.
        fake: (arguments, needs) -> outputs without values.

    Returns:
        (arguments) -> outputs, with the needs of the arguments.
    """

    def register(function: Callable[..., tuple[Outputs, Outputs]]) -> Callable[..., Outputs]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Outputs:
            *given, needs = arguments
            found, gradients = function(*given, needs=Needs(*needs))
            return *found, *gradients

        def without_values(*arguments: Any) -> Outputs:
            *given, needs = arguments
            return *fake(*given, needs=Needs(*needs)), *_empty_gradients(given, Needs(*needs))

        made = operator(name, f"({schema}, bool[] needs) -> ({outputs}, {_GRADIENTS})")(run)
        made.register_fake(without_values)
        with_gradients(made, (_HIDDEN, _WEIGHT, _BIAS))

        def call(*arguments: Any) -> Outputs:
            needs = Needs.of(arguments[_HIDDEN], arguments[_WEIGHT], arguments[_BIAS])
            return made(*arguments, list(needs))[:-3]

        return call

    return register


def gradients_of(operands: Operands, result: StepResult, needs: Needs) -> Outputs:
    """Gradients of hidden states, weight and bias for an upstream gradient of 1; [0] where they are not needed.

    For float16 in float32, since a loss scaler's factor comes later.
    """
    hidden, weight, bias, _, _ = operands
    like = _empty_gradients((hidden, weight, None, bias), needs)
    if result.plan is None:
        return like
    found = result.plan.run(operands.head(), torch.ones_like(result.terms.loss), wide=_wide(hidden, weight, bias))
    gradients = zip(like, found.shaped(hidden))
    return tuple(empty if g is None else g.to(empty.dtype).contiguous() for empty, g in gradients)


def _wide(*inputs: Tensor | None) -> bool:
    """Whether gradients wait for their factor in float32."""
    return any(x is not None and x.dtype == torch.float16 for x in inputs)


def _empty_gradients(arguments: Sequence[Any], needs: Needs) -> Outputs:
    """Gradients without values; [0] where they are not needed."""
    inputs = [arguments[i] for i in (_HIDDEN, _WEIGHT, _BIAS)]
    wide, found = _wide(*inputs), []
    for x, need in zip(inputs, needs):
        dtype = inputs[0].dtype if x is None else torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
        found.append(inputs[0].new_empty(x.shape if need else 0, dtype=dtype))
    return tuple(found)
