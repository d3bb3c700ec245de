"""A loss and the gradient of its head as one operator, for torch.compile and torch.export.

Shapes outside are those of the arguments: which tokens take part and what is routed is decided inside. So the gradients
are computed with the loss, and the backward multiplies them by its upstream gradient. Outside torch.compile the public
functions compute them in the backward, where that takes less memory or rounds once less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lad_kernels.head import Needs, Operands
from lad_kernels.step import StepResult

GRADIENTS = "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient"  # the last outputs
DIFFERENTIABLE = (0, 1, 3)  # hidden states, weight and bias among the arguments, which begin with head.SCHEMA


def gradients_of(operands: Operands, result: StepResult, needs: Needs) -> tuple[Tensor, ...]:
    """Gradients of hidden states, weight and bias for an upstream gradient of 1; [0] where they are not needed.

    For float16 in float32, since a loss scaler's factor comes later.
    """
    hidden, weight, bias, _, _ = operands
    like = empty_gradients((hidden, weight, bias), needs)
    if result.plan is None:
        return like
    gradients = result.plan.run(operands.head(), torch.ones_like(result.terms.loss), wide=_wide(hidden, weight, bias))
    pairs = zip(like, gradients.shaped(hidden))
    return tuple(empty if g is None else g.to(empty.dtype).contiguous() for empty, g in pairs)


def _wide(*inputs: Tensor | None) -> bool:
    """Whether gradients wait for their factor in float32."""
    return any(x is not None and x.dtype == torch.float16 for x in inputs)


def empty_gradients(inputs: Sequence[Tensor | None], needs: Needs) -> tuple[Tensor, ...]:
    """Gradients without values; [0] where they are not needed."""
    wide, empty = _wide(*inputs), []
    for x, need in zip(inputs, needs):
        dtype = inputs[0].dtype if x is None else torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
        empty.append(inputs[0].new_empty(x.shape if need else 0, dtype=dtype))
    return tuple(empty)
