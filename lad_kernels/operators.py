"""Operators of torch.library: what torch.compile, torch.export and selective checkpointing see of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lad_kernels.autocast import without_autocast

if TYPE_CHECKING:
    from torch.library import CustomOpDef


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function that changes none of its arguments as `lad_kernels::name`; it runs without autocast.

    A copy of the package under another name has operators of that name.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        package = function.__module__.partition(".")[0]
        made = torch.library.custom_op(
            f"{package}::{name}",
            mutates_args=(),
            schema=schema,
            tags=[torch.Tag.cudagraph_unsafe],  # most wait for the device: Inductor leaves them out of its own graphs
        )
        return made(without_autocast(function))

    return register


def with_gradients(made: CustomOpDef, at: Sequence[int]) -> None:
    """Register that an operator's first output, a loss, is differentiable, and alone.

    Its last outputs are the gradients of the arguments `at` for an upstream gradient of 1, [0] where there is none.
    """

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, *others = output
        ctx.save_for_backward(*others[-len(at) :])
        ctx.kinds = [(None, None) if inputs[i] is None else (inputs[i].dtype, inputs[i].shape) for i in at]
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)

    def scaled(ctx: Any, grad: Tensor | None, *_: None) -> tuple:  # []
        refuse_double_backward()
        found: list[Tensor | None] = [None] * ctx.arguments
        for i, (dtype, shape), x in zip(at, ctx.kinds, ctx.saved_tensors):
            if grad is not None and ctx.needs_input_grad[i] and x.shape == shape:
                found[i] = (x.to(torch.promote_types(x.dtype, torch.float32)) * grad).to(dtype)
        return tuple(found)

    made.register_autograd(scaled, setup_context=save)


def refuse_double_backward() -> None:
    """Called first in every backward: with create_graph=True autograd runs it with gradients enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lad_kernels: double backward (create_graph=True) is not supported, gradients are computed in closed form "
            "without a graph; use impl='reference' for higher derivatives"
        )


def stacked(metrics: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The metrics `names`, which are all there are, as [K] in the widest dtype of their device."""
    if set(names) != set(metrics):
        raise AssertionError(f"metrics: expected {sorted(names)}, got {sorted(metrics)}")
    dtype = widest(metrics[names[0]].device)
    return torch.stack([metrics[name].to(dtype) for name in names])


def unstacked(values: Tensor, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:  # [K]
    """Metrics by name, in the dtype of the log-probs; counts of flops in a wider one."""
    return {name: x if name == "head_flops" else x.to(dtype) for name, x in zip(names, values.unbind())}


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
