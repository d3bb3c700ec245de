"""What a model does to its logits after the head, as a scale and a softcap: guessed from its config, then measured.

Instead of logits the model gets known numbers, and what it makes of them shows the transform: a ramp of V numbers when
a model is new, TINY and HUGE in every later call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# How text configs name what happens to logits after the head. Only a first guess.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)

TOLERANCE = 2**-16  # relative; the model may compute the transform in float32
TINY, HUGE = 2.0**-20, 2.0**40  # a softcap changes TINY by less than rounding, and turns HUGE into the cap


class LogitTransform(NamedTuple):
    """z = softcap(logit_scale * (h W^T + b)), in the names of `linear_logprobs`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = self.logit_scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def logit_transform(config: Any) -> LogitTransform:
    """Scale and softcap as a text config names them."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and x]

    scale = math.prod(numbers(FACTORS)) / math.prod(numbers(DIVISORS))
    return LogitTransform(scale, next(iter(numbers(SOFTCAPS)), None))


def known_numbers(width: int, device: torch.device) -> Tensor:
    """[1, 1, width] ascending, TINY first and HUGE last; made on the device, which costs no sync."""
    double = torch.float32 if device.type == "mps" else torch.float64
    x = 256 * torch.linspace(-1, 1, width, device=device, dtype=double)[None, None] ** 3
    x[..., 0].fill_(TINY)
    x[..., -1].fill_(HUGE)
    return x


def check_logits(given: Tensor, logits: Tensor | None, owner: str) -> None:
    """What the model returns for `given` [1, 1, K] is a constant function of each number, as far as shapes tell."""
    if logits is None:
        raise ValueError(
            f"fused_head: expected {owner} to return logits, it returned none; this family is not supported"
        )
    if logits.shape[-1:] != given.shape[-1:]:
        raise ValueError(
            f"fused_head: expected {owner} to keep its {given.shape[-1]} logits, got {list(logits.shape)}; a "
            f"vocabulary that is cut after the head is not supported"
        )
    if logits.shape != given.shape:
        raise ValueError(
            f"fused_head: expected {owner} to treat the logits of all tokens alike, got a scale per token (logits "
            f"{list(logits.shape)} of {list(given.shape)}); switch it off in the model, and pass its inverse as "
            f"`temperature` of linear_logprobs, which takes one per token"
        )
    if logits.requires_grad:
        raise ValueError(
            f"fused_head: expected {owner} to scale its logits by constants, got a parameter that requires grad, "
            f"whose gradient would be lost; freeze it with requires_grad_(False)"
        )


def agrees(transform: LogitTransform, given: Tensor, logits: Tensor) -> Tensor:
    """Bool [1, 1, K]: whether the model made of each number [1, 1, K] what the transform makes of it."""
    expected = transform(given)
    return (logits - expected).abs() <= TOLERANCE * (expected.abs() + TINY)


def fitted(logits: Tensor) -> LogitTransform:
    """The transform that explains what the model made of TINY and HUGE, in logits [1, 1, K]; reads them."""
    scale, cap = logits[0, 0, 0].item() / TINY, logits[0, 0, -1].abs().item()
    return LogitTransform(scale, cap if cap < 0.5 * abs(scale) * HUGE else None)


def measured(used: LogitTransform, given: Tensor, logits: Tensor, owner: str) -> LogitTransform:
    """The transform that explains what the model made of the ramp [1, 1, V]: the one used, or else a fitted one."""
    for transform in (used, fitted(logits)):
        wrong = ~agrees(transform, given, logits)  # [1, 1, V]
        if not bool(wrong.any()):
            return transform
    at = wrong.flatten().nonzero()[0, 0]
    x, y = given.flatten()[at].item(), logits.flatten()[at].item()
    raise ValueError(
        f"fused_head: expected {owner} to apply a scale and a softcap to the head's output, but it makes {y:.6g} of "
        f"{x:.6g}, and {transform} would fit elsewhere; this family is not supported"
    )


def unchanged(transform: LogitTransform, given: Tensor, logits: Tensor, owner: str) -> bool:
    """Whether the model still treats two numbers [1, 1, 2] as it did when it was measured.

    On CUDA, to avoid a host sync, the answer is always True and a change triggers an assertion on the device.
    """
    same = agrees(transform, given, logits).all()  # []
    if same.device.type != "cuda":
        return bool(same)
    torch._assert_async(
        same,
        f"fused_head: {owner} scales its logits otherwise than when it was measured (by an attribute or the length of "
        f"the sequences?); attach_fused_head(model).forget() after a change",
    )
    return True
