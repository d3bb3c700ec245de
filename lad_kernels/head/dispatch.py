"""Which path a call takes through the head, by the cost model of cost.py and the room of memory.py; and why, in words.

The density (the share of pairs that a routing keeps) decides between two passes and routed, and is known only after the
forward; the one pass has to be chosen before. For that choice a few of the call's own tokens, at a fixed stride, are
scored first, where it can matter and costs at most SAMPLE_COST of the one pass; else DENSITY is assumed. Where reading
W would cost more than WHOLE, twice the tokens are scored with every second entry, or in kernels four times as many with
every fourth, and those count whose target is among them: half of a distribution, or a quarter, renormalised, has
nearly the shape of the whole (docs/LOG.md). So the path is a function of the arguments and the device: the same call
takes it, and gives the same bits, every time. There is no autotuning, and nothing is remembered. `force` and
`backward=` settle it beforehand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from lad_kernels import checks
from lad_kernels.head import cost, memory
from lad_kernels.head.memory import Work

PATHS = ("one_pass", "two_pass", "routed")
DEFAULT_TAIL_MASS = 3e-4  # for 16-bit inputs; float32 and float64 are exact unless a number is given
DENSITY = 0.02  # what a policy under reinforcement learning has; assumed where no tokens are scored first
SAMPLE_COST = 0.03  # of the one pass, in time, that scoring a sample may take: most is reading W
WHOLE = 0.01  # of the one pass, in time, up to which a sample reads all of W


class Sparsity(NamedTuple):
    """What may be left out of the logit gradient, and who decides."""

    threshold: float  # theta of routing.py; 0: nothing
    unbiased: bool  # entries below it are rounded at random rather than dropped
    backward: str  # auto, dense or routed

    @classmethod
    def of(cls, tail_mass: float | None, tail: str, backward: str, dtype: torch.dtype) -> Sparsity:
        """From a config's fields."""
        return cls(threshold(tail_mass, dtype), tail == "unbiased", backward)


class Shares(NamedTuple):
    """What a sample of the tokens says of the call."""

    active: float = 1.0  # tokens with c != 0 over all
    density: float = DENSITY  # active pairs over all pairs of active tokens
    dense: float = 0.0  # active tokens that the routed backward takes whole; their pairs are all kept


_atomics = os.environ.get("LAD_KERNELS_ATOMICS", "0") == "1"
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Take `path` (one of PATHS) wherever it is possible, whatever the model says; for tests and measurements."""
    if path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(map(repr, PATHS))}, got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def allow_atomics(on: bool) -> None:
    """Let the Triton kernels of the routed backward add dH by atomics; LAD_KERNELS_ATOMICS=1 does the same.

    It saves memory traffic, but two runs then differ in their last bits.
    """
    global _atomics
    _atomics = bool(on)


def atomics() -> bool:
    return _atomics


def threshold(tail_mass: float | None, dtype: torch.dtype) -> float:
    """theta of routing.py for a config's `tail_mass`."""
    if tail_mass is None:
        return DEFAULT_TAIL_MASS if dtype.itemsize == 2 else 0.0
    return tail_mass


def needs_sample(work: Work, sparsity: Sparsity, *, all_active: bool) -> bool:
    """Whether `takes_one_pass` depends on shares that a sample of the tokens has to tell, and it is worth its time.

    `all_active`: every token given has a coefficient that is not zero.
    """
    if _forced.get() is not None or sparsity.backward == "routed" or work.tokens == 0:
        return False
    routable = sparsity.threshold > 0 and sparsity.backward == "auto"
    if not routable and (all_active or not work.triton):
        return False  # where no token is routed, PyTorch's one pass drops what its two passes drop
    return cost.sample(work, sample_step(work)) <= SAMPLE_COST * cost.one_pass(work)


def sample_step(work: Work) -> int:
    """1 where a sample is scored with all entries, 2 where with every second; kernels: 4 where with every fourth."""
    steps = (1, 2, 4) if work.triton else (1, 2)
    most = WHOLE * cost.one_pass(work)
    return next((step for step in steps if cost.sample(work, step) <= most), steps[-1])


def takes_one_pass(work: Work, sparsity: Sparsity, shares: Shares = Shares()) -> bool:
    """Whether a call whose coefficients are known inside a chunk computes its gradient in the forward."""
    if _forced.get() is not None or sparsity.backward == "routed":
        return _forced.get() == "one_pass"
    if work.tokens == 0:
        return False
    active = work.tokens * shares.active
    after = cost.dense(work, active)
    if sparsity.threshold > 0 and sparsity.backward == "auto":
        pairs = active * work.blocks * (shares.density - shares.dense)
        after = min(after, cost.routed(work, pairs, round(active * shares.dense), active))
    return cost.one_pass(work, active) < cost.score(work) + after


def takes_routed(work: Work, active: int, pairs: int, dense: int, *, backward: str) -> bool:
    """Whether `pairs` active pairs of `active` tokens, `dense` of them whole, are worth routing."""
    if _forced.get() is not None or backward == "routed":
        return _forced.get() in ("routed", None)
    return cost.routed(work, pairs - dense * work.blocks, dense, active) < cost.dense(work, active)


def may_route(work: Work, sparsity: Sparsity) -> bool:
    """Whether block masses are worth writing in the forward, and have room."""
    if _forced.get() is not None or sparsity.backward == "routed":
        return _forced.get() in ("routed", None)
    return sparsity.threshold > 0 and sparsity.backward == "auto" and memory.most_pairs(work) > 0


def why(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    grad: bool = True,
    impl: str = "auto",
    tail: float | None = None,
    kept_share: float = DENSITY,
    live_share: float = 1.0,
    one_pass: bool = False,
) -> str:
    """The path that a head of this shape takes, why, and what it costs.

    Args:
        tokens: tokens that take part (masked ones never reach the head).
        hidden_size, vocab_size: D and V.
        dtype, device: of the hidden states; the device need not exist on this machine.
        grad: whether a gradient will be asked for.
        impl: as given to the public functions.
        tail: `tail_mass` of the config.
        kept_share: active (token, block) pairs over all pairs of tokens with c != 0; `profile_sparsity` measures it.
        live_share: tokens with c != 0 over all.
        one_pass: whether coefficients are known inside a chunk (token-level ratios, on-policy, short sequences).
    """
    device = torch.device(device)
    triton = checks.use_triton(impl, device, dtype)
    if triton:
        path, reason = "Triton kernels", "the input is on an accelerator" if impl == "auto" else "impl='triton'"
    elif impl == "reference":
        path, reason = "reference, stored logits", "impl='reference'"
    else:
        unavailable = checks.triton_unavailable(device, dtype)
        path, reason = "chunked PyTorch", "impl='torch'" if impl == "torch" else unavailable
    work = Work(tokens, hidden_size, vocab_size, dtype.itemsize, cost.architecture(device, triton))
    how, passes = _fastest(work, threshold(tail, dtype), Shares(live_share, kept_share), one_pass)
    if not grad or impl == "reference":
        how, passes = ("stored logits", 6.0) if grad else ("score only", 2.0)
    flops = passes * tokens * hidden_size * vocab_size
    logits = tokens * vocab_size * 4
    stored = f"stores {logits / 2**30:.3g} GiB of logits" if impl == "reference" else "stores no logits"
    return (
        f"{path}: {how}, because {reason}; {passes:.3g} N D V = {flops:.3g} flops; {stored} (N={tokens}, "
        f"D={hidden_size}, V={vocab_size}, {dtype})."
    )


def _fastest(work: Work, theta: float, shares: Shares, one_pass: bool) -> tuple[str, float]:
    """(name, flops / N D V) of the path that the model finds fastest."""
    active, density, _ = shares
    two = cost.score(work) + cost.dense(work, active * work.tokens)
    choices = [(two, "dense, two passes (logits recomputed)", 2 + 6 * active)]
    if one_pass:
        choices.append((cost.one_pass(work), "dense, one pass (gradient in the forward)", 6.0))
    if theta > 0:
        pairs = active * density * work.tokens * work.blocks
        seconds = cost.score(work) + cost.routed(work, pairs)
        choices.append((seconds, f"routed, {density:.1%} of pairs kept", 2 + 6 * active * density))
    return min(choices)[1:]
