"""Which path a call takes through the head: a closed-form cost model over one table of speeds, and the answer in words.

With N tokens of which A have a coefficient c != 0, and P kept (token, block) pairs of routing.py,

| path | flops | when it is possible |
|---|---|---|
| score | 2 N D V | no gradient is asked for |
| one pass | 6 N D V | c is known as soon as a chunk's log-probs are |
| two pass | (2 N + 6 A) D V | always |
| routed | 2 N D V + 6 D BLOCK P | tail_mass > 0 and backward is not "dense" |

The kept share decides between the last two and is known only after the forward; the one pass has to be chosen before.
For that choice alone the shares met by the last call of the same shape are remembered, so that a first call may take
another path, and round differently within the tolerance, than the second. `force` and `backward=` settle it instead.
No path is tried to find out: there is no autotuning.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lad_kernels import checks
from lad_kernels.head.logits import BLOCK

PATHS = ("one_pass", "two_pass", "routed")
DEFAULT_TAIL_MASS = 3e-4  # for 16-bit inputs; float32 and float64 are exact unless a number is given
PROBE = 16  # calls after which a remembered kept share is measured again
FIRST_KEPT_SHARE = 0.02  # what a policy under reinforcement learning has; believed until the first call


@dataclass(frozen=True)
class Speeds:
    """What one kind of device does in a second, and what a path costs besides its products."""

    flops: float  # of a large product
    bytes: float  # copied
    element: float  # seconds per logit outside the products (exponential, sums), each time it is made
    gathered: float  # rate of the routed products over that of large ones; also the dense cut-off of a token
    block: float  # seconds per vocabulary block of the routed backward
    one_pass_bytes: int  # workspace of the one-pass path's logits


# "cpu" was measured with one thread of the machine of benchmarks/RESULTS.md; only ratios matter. "cuda" is built from
# published rates of an H200 (700 Tflop/s at head shapes, 4.3 TB/s) and an assumed rate of the gathered products; no GPU
# has confirmed it.
SPEEDS = {
    "cpu": Speeds(8e10, 8e9, 1.2e-9, 0.4, 3.5e-4, 128 << 20),
    "cuda": Speeds(7e14, 4.3e12, 0.0, 0.35, 1e-7, 512 << 20),
}


@dataclass(frozen=True)
class Work:
    """A head call, as far as cost goes."""

    tokens: int
    hidden_size: int
    vocab_size: int
    itemsize: int
    device: str  # a key of SPEEDS

    @property
    def blocks(self) -> int:
        return -(-self.vocab_size // BLOCK)

    def _product(self, tokens: float) -> float:
        return 2 * tokens * self.hidden_size * self.vocab_size / SPEEDS[self.device].flops

    def score(self) -> float:
        """Seconds of the forward."""
        return self._product(self.tokens) + SPEEDS[self.device].element * self.tokens * self.vocab_size

    def dense(self, live: float) -> float:
        """Seconds of the dense backward of `live` tokens."""
        return 3 * self._product(live) + SPEEDS[self.device].element * live * self.vocab_size

    def routed(self, pairs: float, dense: int = 0) -> float:
        """Seconds of the routed backward of `pairs` pairs and `dense` whole tokens."""
        s, weight = SPEEDS[self.device], self.vocab_size * self.hidden_size
        gathered = 6 * self.hidden_size * BLOCK * pairs / (s.flops * s.gathered)
        return gathered + self.dense(dense) + self.itemsize * weight / s.bytes + s.block * self.blocks

    def one_pass(self) -> float:
        """Seconds of forward and backward in one pass; every chunk reads and writes a float32 dW."""
        s = SPEEDS[self.device]
        chunks = -(-self.tokens // self.chunk_rows())
        traffic = 8 * self.vocab_size * self.hidden_size * chunks / s.bytes
        return 3 * self._product(self.tokens) + 2 * s.element * self.tokens * self.vocab_size + traffic

    def chunk_rows(self) -> int:
        """Tokens whose logits are kept at once by the one-pass path."""
        rows = SPEEDS[self.device].one_pass_bytes // (self.itemsize * self.vocab_size)
        return max(2048, rows // 256 * 256) if self.device == "cuda" else max(64, rows // 8 * 8)


@dataclass
class _Met:
    """What the last call of a shape met."""

    live: float = 1.0
    kept: float = FIRST_KEPT_SHARE
    age: int = 0


_met: dict[tuple, _Met] = {}
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


def forget() -> None:
    """Forget what earlier calls met."""
    _met.clear()


def kind(device: torch.device, triton: bool) -> str:
    """The key of SPEEDS."""
    return "cuda" if triton and device.type == "cuda" else "cpu"


def tail_mass(given: float | None, dtype: torch.dtype) -> float:
    """theta of routing.py for a config's `tail_mass`."""
    if given is None:
        return DEFAULT_TAIL_MASS if dtype.itemsize == 2 else 0.0
    return given


def takes_one_pass(work: Work, theta: float, *, backward: str, known: bool) -> bool:
    """Whether a call whose coefficients can be had inside a chunk computes its gradient in the forward.

    `known`: every token given has a coefficient that is not zero.
    """
    if _forced.get() is not None or backward == "routed":
        return _forced.get() == "one_pass"
    if work.tokens == 0:
        return False
    met = _met.setdefault((work.device, work.hidden_size, work.vocab_size, work.itemsize, theta), _Met())
    live = work.tokens * (1.0 if known else met.live)
    after = work.dense(live)
    if theta > 0 and backward == "auto":
        met.age += 1
        kept = FIRST_KEPT_SHARE if met.age % PROBE == 0 else met.kept
        after = min(after, work.routed(live * work.blocks * kept))
    return work.one_pass() < work.score() + after


def takes_routed(work: Work, theta: float, live: int, pairs: int, dense: int, *, backward: str) -> bool:
    """Whether `pairs` kept pairs of `live` tokens, `dense` of them whole, are worth routing; remembers their share."""
    met = _met.setdefault((work.device, work.hidden_size, work.vocab_size, work.itemsize, theta), _Met())
    met.live, met.kept = live / max(work.tokens, 1), pairs / max(live * work.blocks, 1)
    if _forced.get() is not None or backward == "routed":
        return _forced.get() in ("routed", None)
    return work.routed(pairs - dense * work.blocks, dense) < work.dense(live)


def may_route(theta: float, backward: str) -> bool:
    """Whether block masses are worth writing in the forward."""
    if _forced.get() is not None:
        return _forced.get() == "routed"
    return backward == "routed" or (theta > 0 and backward == "auto")


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
    kept_share: float = FIRST_KEPT_SHARE,
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
        kept_share: kept (token, block) pairs over all pairs of tokens with c != 0; `profile_sparsity` measures it.
        live_share: tokens with c != 0 over all.
        one_pass: whether coefficients are known inside a chunk (token-level ratios, on-policy, short sequences).
    """
    device = torch.device(device)
    if impl == "reference":
        path, reason = "reference, stored logits", "impl='reference'"
    elif checks.use_triton(impl, device, dtype):
        path, reason = "Triton kernels", "the input is on an accelerator" if impl == "auto" else "impl='triton'"
    else:
        unavailable = checks.triton_unavailable(device, dtype)
        path, reason = "chunked PyTorch", "impl='torch'" if impl == "torch" else unavailable
    triton = impl != "reference" and checks.use_triton(impl, device, dtype)
    work = Work(tokens, hidden_size, vocab_size, dtype.itemsize, kind(device, triton))
    how, passes = _fastest(work, tail_mass(tail, dtype), live_share, kept_share, one_pass)
    if not grad or impl == "reference":
        how, passes = ("stored logits", 6.0) if grad else ("score only", 2.0)
    cost = passes * tokens * hidden_size * vocab_size
    logits = tokens * vocab_size * 4
    stored = f"stores {logits / 2**30:.3g} GiB of logits" if impl == "reference" else "stores no logits"
    return (
        f"{path}: {how}, because {reason}; {passes:.3g} N D V = {cost:.3g} flops; {stored} (N={tokens}, "
        f"D={hidden_size}, V={vocab_size}, {dtype})."
    )


def _fastest(work: Work, theta: float, live: float, kept: float, one_pass: bool) -> tuple[str, float]:
    """(name, flops / N D V) of the path that the model finds fastest."""
    found = [(work.score() + work.dense(live * work.tokens), "dense, two passes (logits recomputed)", 2 + 6 * live)]
    if one_pass:
        found.append((work.one_pass(), "dense, one pass (gradient in the forward)", 6.0))
    if theta > 0:
        pairs = live * kept * work.tokens * work.blocks
        found.append((work.score() + work.routed(pairs), f"routed, {kept:.1%} of pairs kept", 2 + 6 * live * kept))
    return min(found)[1:]
