"""The objective of linear_policy_loss: what a caller's function is given, and what it may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_kernels.step import HEAD_METRICS

_SAME = 1e-4  # of the largest coefficient: of the same log-probs equal bits were measured; a mean is off by all of it


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens an objective is given.

    `positions` [m] int64, ascending: where they stand in target_ids.reshape(-1). `sequences` [m] int64: which row of
    [B, T], or which span of cu_seqlens, each belongs to; None for packed input without cu_seqlens. `shape`: that of
    target_ids.
    """

    positions: Tensor
    sequences: Tensor | None
    shape: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """Their values [m] of a tensor shaped like target_ids, such as old log-probs."""
        if x.shape != self.shape:
            raise ValueError(
                f"Tokens.take: expected {list(self.shape)} as target_ids, got {list(x.shape)}; one value per sequence "
                f"is for Tokens.expand"
            )
        return x.reshape(-1)[self.positions]

    def expand(self, x: Tensor) -> Tensor:
        """One value per sequence [B] -> that of each token's sequence [m], such as advantages."""
        if self.sequences is None or x.ndim != 1:
            got = "packed input without cu_seqlens" if self.sequences is None else list(x.shape)
            raise ValueError(f"Tokens.expand: expected [B], one value per sequence, got {got}")
        return x[self.sequences]

    def select(self, chosen: Tensor | slice) -> Tokens:
        """Some of them."""
        sequences = None if self.sequences is None else self.sequences[chosen]
        return Tokens(self.positions[chosen], sequences, self.shape)


Objective = Callable[[Tensor, "Tensor | None", Tokens], "Tensor | tuple[Tensor, Mapping[str, Tensor]]"]


def evaluate(
    objective: Objective, logprobs: Tensor, entropy: Tensor | None, tokens: Tokens
) -> tuple[Tensor, dict[str, Tensor]]:  # [m], [m]
    """Its loss and metrics, of the kinds and shapes that it may return."""
    returned = objective(logprobs, entropy, tokens)
    loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
        kinds = ", ".join(type(x).__name__ for x in (returned if isinstance(returned, tuple) else (returned,)))
        raise TypeError(f"objective: expected it to return a scalar loss, or (loss, metrics by name), got {kinds}")
    if loss.shape != () or not loss.dtype.is_floating_point or loss.device != logprobs.device:
        raise ValueError(
            f"objective: expected a scalar floating loss on {logprobs.device}, got {loss.dtype} "
            f"{list(loss.shape)} on {loss.device}; sum over the tokens"
        )
    reported = {}  # 0-d and detached
    for name, value in metrics.items():
        if name in HEAD_METRICS or name == "head_flops":
            raise ValueError(f"objective: metric {name!r} is one of the head's own; give yours another name")
        x = value if isinstance(value, Tensor) else torch.as_tensor(value)
        if x.numel() != 1:
            raise ValueError(f"objective: expected 0-d metrics, got {list(x.shape)} for {name!r}; reduce it")
        reported[name] = x.detach().reshape(()).to(loss.device)
    return loss, reported


def refuse_independent() -> None:
    """A loss through which no gradient reaches the log-probs."""
    raise ValueError(
        "objective: expected a loss that depends on the log-probs given to it, got one that does not; was it "
        "detached, or made of other log-probs?"
    )


def refuse_nan(loss: Tensor | None, positions: Tensor, *gradients: Tensor | None) -> None:  # [], [m], [m] each
    """NaN in the gradients by what was given, or in the loss."""
    where = "in the loss" if loss is not None and bool(loss.isnan()) else None
    for gradient in gradients:
        bad = None if gradient is None else gradient.isnan()  # [m]
        if bad is not None and bool(bad.any()):
            where = f"at position {int(positions[bad][0])} of target_ids"
    if where is not None:
        raise ValueError(
            f"objective: expected a loss and a gradient that are numbers, got NaN {where}; look for 0 * inf, inf - inf "
            f"and logs of negative numbers there"
        )


def refuse_joint(joint: Tensor, rows: slice, alone: Tensor, positions: Tensor) -> None:  # [M], [C], [M]
    """A claim of `separable` that the gradients of some tokens alone [C] show to be false."""
    largest = joint.abs().nan_to_num(0.0).amax()  # []
    off = (joint[rows] - alone).abs() > _SAME * largest  # [C]
    if bool(off.any()):
        at = int(off.nonzero()[0, 0])
        raise ValueError(
            f"separable: expected a loss that is a sum of one term per token, got one whose gradient at position "
            f"{int(positions[rows][at])} of target_ids is {float(joint[rows][at]):g} among all tokens and "
            f"{float(alone[at]):g} among some; divide by a constant instead of taking a mean, or leave separable=False"
        )
