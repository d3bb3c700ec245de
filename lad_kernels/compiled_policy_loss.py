"""linear_policy_loss as torch.compile sees it: the head's operator, then the caller's objective.

The graph knows no values. Checks of them are operators, most of which return what they are given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import HeadArguments, token_outputs
from lad_kernels.operators import operator
from lad_kernels.outputs import LossOutput
from lad_kernels.own_objective import Objective, Tokens, evaluate, refuse_independent, refuse_joint, refuse_nan
from lad_kernels.packing import pack, sequence_of
from lad_kernels.step import Wanted

_HALVES = (slice(0, None, 2), slice(1, None, 2))


@without_autocast
def compiled_policy_loss(
    given: HeadArguments,
    objective: Objective,
    loss_mask: Tensor | None,  # the shape of target_ids
    cu_seqlens: Tensor | None,  # [B + 1]
    wanted: Wanted,
    *,
    separable: bool,
) -> LossOutput:
    """For torch.compile to trace; the gradient is exact, in two passes."""
    if loss_mask is not None or cu_seqlens is not None:
        loss_mask = _tokens_that_count(given.target_ids, loss_mask, cu_seqlens)
    out = token_outputs(given, loss_mask, return_entropy=wanted.entropy)
    packing = pack(given.target_ids, loss_mask, cu_seqlens)
    kept, bounds = packing.kept, packing.cu_seqlens  # [M], [B + 1]
    if kept is None:
        kept = torch.arange(packing.tokens, device=out.lse.device)
    tokens = Tokens(kept, None if bounds is None else sequence_of(packing.tokens, bounds), packing.shape)
    logprobs = _objective_input(packing.select(out.logprobs), kept)  # [M]
    entropy = _objective_input(packing.select(out.entropy), kept) if wanted.entropy else None  # [M]
    loss, metrics = evaluate(objective, logprobs, entropy, tokens)
    if logprobs.requires_grad and not loss.requires_grad:  # else the operator looks
        refuse_independent()
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if separable and checks.reads_all_values():
        parts = (slice(None), *_HALVES)
        gradients = tuple(_gradient(objective, logprobs, entropy, tokens, part) for part in parts)
    loss = _objective_loss(loss, logprobs, kept, *gradients)
    logprobs = out.logprobs.detach() if wanted.logprobs else None
    entropy = out.entropy.detach() if wanted.entropy else None
    return LossOutput(loss, logprobs, entropy, advantages=None, metrics=metrics)


def _gradient(
    objective: Objective, logprobs: Tensor, entropy: Tensor | None, tokens: Tokens, part: slice
) -> Tensor:  # [M], [M] -> [C]
    """Of the loss of some tokens by their log-probs."""
    some, chosen = tokens.select(part), None if entropy is None else entropy.detach()[part]
    gradient = torch.func.grad(lambda x: evaluate(objective, x, chosen, some)[0])  # [C] -> [C]
    return gradient(logprobs.detach()[part]).detach()


@operator("tokens_that_count", "(Tensor target_ids, Tensor? loss_mask, Tensor? cu_seqlens) -> Tensor")
def _tokens_that_count(target_ids: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A mask in the shape of target_ids, which is False also beyond the last bound."""
    checks.layout(target_ids, "target_ids", cu_seqlens)
    checks.mask(loss_mask, target_ids, "target_ids")
    counts = torch.ones_like(target_ids, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    if cu_seqlens is not None:
        counts &= torch.arange(len(target_ids), device=target_ids.device) < cu_seqlens[-1]
    return counts


@operator("objective_input", "(Tensor x, Tensor positions) -> Tensor")
def _objective_input(x: Tensor, positions: Tensor) -> Tensor:  # [M], [M] -> [M]
    """Log-probs or entropy, whose gradient the objective makes."""
    return x.clone()


@operator("objective_gradient", "(Tensor gradient, Tensor x, Tensor positions) -> Tensor")
def _objective_gradient(gradient: Tensor, x: Tensor, positions: Tensor) -> Tensor:  # [M] each
    """A gradient without NaN, except where the head gave some."""
    if checks.may_read(x) and not x.isnan().any():
        refuse_nan(None, positions, gradient)
    return gradient.clone()


@operator(
    "objective_loss",
    "(Tensor loss, Tensor logprobs, Tensor positions, Tensor? joint, Tensor? even, Tensor? odd) -> Tensor",
)
def _objective_loss(
    loss: Tensor,
    logprobs: Tensor,  # [M]
    positions: Tensor,  # [M]
    joint: Tensor | None,  # [M] gradient of the loss by the log-probs
    even: Tensor | None,  # [M / 2] of every other token alone
    odd: Tensor | None,
) -> Tensor:
    """A loss that is a number, unless a log-prob is none; with the gradients also a sum of one term per token."""
    if checks.may_read(loss) and not logprobs.isnan().any():
        refuse_nan(loss, positions)
    if joint is not None:
        for part, alone in zip(_HALVES, (even, odd)):
            refuse_joint(joint, part, alone, positions)
    return loss.clone()


_tokens_that_count.register_fake(lambda target_ids, *_: torch.empty_like(target_ids, dtype=torch.bool))
for _like in (_objective_input, _objective_gradient, _objective_loss):
    _like.register_fake(lambda x, *_: torch.empty_like(x))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _checked_gradient(ctx: Any, gradient: Tensor) -> tuple:  # [M]
    return _objective_gradient(gradient, *ctx.saved_tensors), None


def _passed(ctx: Any, gradient: Tensor) -> tuple:  # []
    return gradient, None, None, None, None, None


def _refuse_independent(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """A loss whose graph does not reach the log-probs or entropy, if they have a gradient. A compiler walks it once.

    After a break of the graph in the objective the log-probs are an input of this graph, and nothing is known.
    """
    loss, logprobs, *_ = inputs
    if logprobs.grad_fn is None or _INPUT not in logprobs.grad_fn.name():
        return
    to_do, visited = [loss.grad_fn], set()
    while to_do:
        node = to_do.pop()
        if node is None or node in visited:
            continue
        if _INPUT in node.name():
            return
        visited.add(node)
        to_do += [before for before, _ in node.next_functions]
    refuse_independent()


_INPUT = _objective_input._qualname.replace("::", "_")  # in the names of its nodes
_objective_input.register_autograd(_checked_gradient, setup_context=_save)
_objective_loss.register_autograd(_passed, setup_context=_refuse_independent)
