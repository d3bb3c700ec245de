"""Which path a call takes through the head: a closed-form cost model over one table of speeds, and the answer in words.

With N tokens of which A have a coefficient c != 0, and P kept (token, block) pairs of routing.py,

| path | flops | when it is possible |
|---|---|---|
| score | 2 N D V | no gradient is asked for |
| one pass | 6 N D V | c is known as soon as a chunk's log-probs are |
| two pass | (2 N + 6 A) D V | always |
| routed | 2 N D V + 6 D BLOCK P | tail_mass > 0 and backward is not "dense" |

The kept share decides between the last two and is known only after the forward; the one pass has to be chosen before.
For that choice a few of the call's own tokens, at a fixed stride, are scored first, where it can matter and costs at
most LOOK of the one pass; else FIRST_KEPT_SHARE is believed. So the path is a function of the arguments and the device:
the same call takes it, and gives the same bits, every time. No path is tried to find out: there is no autotuning, and
nothing is remembered. `force` and `backward=` settle it beforehand.

Here also stands what a call may take of an accelerator's memory beyond its inputs, its gradients and one float32 dW:
BUDGET bytes, whatever N is. The gradients' own memory counts from the start, so what is freed before they are made,
such as block masses, may use their room.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lad_kernels import checks
from lad_kernels.head.records import BLOCK

PATHS = ("one_pass", "two_pass", "routed")
DEFAULT_TAIL_MASS = 3e-4  # for 16-bit inputs; float32 and float64 are exact unless a number is given
BUDGET = 512 << 20  # bytes
CPU_LOGITS = 128 << 20  # bytes of one chunk's logits in one pass without an accelerator
PAIR_BYTES = 16  # of a kept pair in a Routing, and of what lists it
TOKEN_BYTES = 128  # of one token's log-prob, lse, coefficients and the objective's work
ROWS = 256  # tokens of a piece are a multiple
MASS_BYTES = 5  # of a (token, block) pair while pairs are chosen: its mass in float32; a bit and sums take 0.6 more
LIST_BYTES = 12  # of a kept pair while pairs are listed: its token and its scale
FIRST_KEPT_SHARE = 0.02  # what a policy under reinforcement learning has; believed where no tokens are looked at
LOOK = 0.03  # of the one pass, in time, that looking may cost: most of it is reading W; 1 % from N = 8,192 on an H100


@dataclass(frozen=True)
class Speeds:
    """What one kind of device does in a second, and what a path costs besides its products."""

    flops: float  # of a large product
    bytes: float  # copied
    element: float  # seconds per logit outside the products (exponential, sums), each time it is made
    gathered: float  # rate of the routed products over that of large ones; also the dense cut-off of a token
    block: float  # seconds per vocabulary block of the routed backward
    pair: float = 0.0  # seconds per (token, block) pair that is looked at when pairs are chosen
    waiting: float = 0.0  # seconds for which the device waits for the host while pairs are chosen


# "cpu" was measured with one thread of the machine of benchmarks/RESULTS.md; only ratios matter. "cuda" was measured on
# an H100 80GB HBM3 in bfloat16 (benchmarks/results): head products 600 to 741 Tflop/s, a copy 3.03 TB/s, the tiles'
# epilogues 2e-13 to 4e-13 s a logit, routed products 27 to 43 ns a pair at D = 4,096.
SPEEDS = {
    "cpu": Speeds(8e10, 8e9, 1.2e-9, 0.4, 3.5e-4),
    "cuda": Speeds(7e14, 3.0e12, 3e-13, 0.13, 1e-7, 7e-11, 3e-3),
}


@dataclass(frozen=True)
class Work:
    """A head call, as far as cost goes."""

    tokens: int
    hidden_size: int
    vocab_size: int
    itemsize: int
    device: str  # a key of SPEEDS
    need_hidden: bool = True  # whether dH is asked for
    need_weight: bool = True  # whether dW is

    @property
    def products(self) -> int:
        """Gradient products of a logit."""
        return self.need_hidden + self.need_weight

    @property
    def gradient_bytes(self) -> int:
        """What dH and dW take, which do not exist before the backward."""
        rows = self.tokens * self.need_hidden + self.vocab_size * self.need_weight
        return self.itemsize * self.hidden_size * rows

    @property
    def blocks(self) -> int:
        return -(-self.vocab_size // BLOCK)

    def _product(self, tokens: float) -> float:
        return 2 * tokens * self.hidden_size * self.vocab_size / SPEEDS[self.device].flops

    @property
    def sample(self) -> int:
        """Tokens that are looked at."""
        return min(64, max(8, self.tokens // 64), self.tokens)

    def look(self) -> float:
        """Seconds of the forward of the sample, which reads W for a few tokens."""
        read = self.itemsize * self.vocab_size * self.hidden_size / SPEEDS[self.device].bytes
        return self._product(self.sample) + SPEEDS[self.device].element * self.sample * self.vocab_size + read

    def score(self) -> float:
        """Seconds of the forward."""
        return self._product(self.tokens) + SPEEDS[self.device].element * self.tokens * self.vocab_size

    def dense(self, live: float) -> float:
        """Seconds of the dense backward of `live` tokens."""
        s, tokens = SPEEDS[self.device], math.ceil(live)
        slabs, pieces = 0, self._pieces(tokens)
        if self.device != "cpu" and tokens:  # each slab of the vocabulary reads and writes a float32 dH
            rows, workspace = self.piece(tokens)
            slabs = math.ceil(self.vocab_size * self.itemsize * rows / workspace)
        traffic = 8 * live * self.hidden_size * slabs * self.need_hidden / s.bytes
        if self.device != "cpu" and tokens and self.itemsize == 2:  # dW passes through float32
            traffic += 10 * self.vocab_size * self.hidden_size * self.need_weight / s.bytes
        return (1 + self.products) * self._product(live) + s.element * live * self.vocab_size + traffic + pieces

    def piece(self, tokens: int, **listed: int) -> tuple[int, int]:
        """`piece` for some of the tokens, none gathered."""
        shape = (tokens, self.hidden_size, self.vocab_size, self.itemsize)
        return piece(*shape, need_hidden=self.need_hidden, need_weight=self.need_weight, gathered=False, **listed)

    def _pieces(self, tokens: int, **listed: int) -> float:
        """Seconds that a float32 dW takes, read and written by every piece of the tokens; 0 for one piece."""
        count = 1 if self.device == "cpu" or not tokens else -(-tokens // self.piece(tokens, **listed)[0])
        traffic = (8 * count + self.itemsize) * self.vocab_size * self.hidden_size
        return traffic / SPEEDS[self.device].bytes if count > 1 and self.need_weight else 0.0

    def routed(self, pairs: float, dense: int = 0, live: float | None = None) -> float:
        """Seconds of the routed backward of `pairs` pairs and `dense` whole tokens, of `live` (None: all) together."""
        s, weight = SPEEDS[self.device], self.vocab_size * self.hidden_size * self.need_weight
        gathered = 2 * (1 + self.products) * self.hidden_size * BLOCK * pairs / (s.flops * s.gathered)
        pieces = self._pieces(self.tokens if live is None else math.ceil(live), pairs=int(pairs), dense=dense)
        choosing = s.waiting + s.pair * self.tokens * self.blocks
        moved = self.itemsize * weight / s.bytes + pieces + s.block * self.blocks
        return choosing + gathered + self.dense(dense) + moved

    def one_pass(self, live: float | None = None) -> float:
        """Seconds of forward and backward in one pass of which `live` tokens (None: all) have a gradient.

        Each of several chunks reads and writes a float32 dW, rounded last. PyTorch drops the tokens without a gradient
        from the products.
        """
        live = self.tokens if live is None or self.device != "cpu" else live
        s = SPEEDS[self.device]
        chunks = -(-self.tokens // self.chunk_rows())
        each = 0 if chunks == 1 and self.itemsize == 2 else 8 * chunks + self.itemsize * (self.itemsize == 2)
        sums = each * self.vocab_size * self.hidden_size * self.need_weight / s.bytes
        products = self._product(self.tokens) + self.products * self._product(live)
        return products + s.element * (self.tokens + live) * self.vocab_size + sums

    def chunk_rows(self) -> int:
        """Tokens whose logits are kept at once by the one-pass path.

        On an accelerator all tokens, if their logits fit BUDGET and the room of a float32 dW, which is not needed then:
        a 16-bit dW is rounded by the one product that makes it. Else BUDGET and the room of the rounded dW, which is
        made when the logits are gone: about 2,048 tokens or more from D = 896 at V = 152,064 and from D = 1,152 at
        V = 262,144. With fewer the float32 dW, read and written once a chunk, is dear.
        """
        if self.device == "cpu":
            return max(64, CPU_LOGITS // (self.itemsize * self.vocab_size) // 8 * 8)
        budget = BUDGET - TOKEN_BYTES * self.tokens
        rounded = self.itemsize * self.vocab_size * self.hidden_size if self.itemsize == 2 and self.need_weight else 0
        if self._tiles(budget + 2 * rounded) * 128 >= self.tokens:
            return max(1, -(-self.tokens // 128)) * 128
        chunks = max(1, -(-self.tokens // (128 * self._tiles(budget + rounded))))
        return max(1, -(-self.tokens // (128 * chunks))) * 128  # as few chunks as possible, of about one size

    def _tiles(self, room: int) -> int:
        """Tiles of 128 tokens whose logits fit `room`, one at least."""
        logits = self.itemsize * self.blocks * BLOCK + 8 * self.blocks  # and two sums of each tile of BLOCK columns
        states = (3 * self.itemsize + 4) * self.hidden_size  # gathered, scaled, dH in float32 and rounded
        return max(1, room // (logits + states) // 128)


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


def kind(device: torch.device, triton: bool) -> str:
    """The key of SPEEDS."""
    return "cuda" if triton and device.type == "cuda" else "cpu"


def tail_mass(given: float | None, dtype: torch.dtype) -> float:
    """theta of routing.py for a config's `tail_mass`."""
    if given is None:
        return DEFAULT_TAIL_MASS if dtype.itemsize == 2 else 0.0
    return given


def must_look(work: Work, theta: float, *, backward: str, known: bool) -> bool:
    """Whether `takes_one_pass` hangs on shares that the call's own tokens have to tell, and they are worth asking.

    `known`: every token given has a coefficient that is not zero.
    """
    if _forced.get() is not None or backward == "routed" or work.tokens == 0:
        return False
    routable = theta > 0 and backward == "auto"
    if not routable and (known or work.device == "cpu"):
        return False  # where no token is routed, PyTorch's one pass drops what its two passes drop
    one_pass = work.one_pass()
    return work.look() <= LOOK * one_pass and one_pass < work.score() + work.dense(work.tokens)


def takes_one_pass(
    work: Work, theta: float, *, backward: str, live: float = 1.0, kept: float = FIRST_KEPT_SHARE
) -> bool:
    """Whether a call whose coefficients can be had inside a chunk computes its gradient in the forward.

    `live` is the share of tokens with c != 0, `kept` that of their pairs which a routing would keep.
    """
    if _forced.get() is not None or backward == "routed":
        return _forced.get() == "one_pass"
    if work.tokens == 0:
        return False
    tokens = work.tokens * live
    after = work.dense(tokens)
    if theta > 0 and backward == "auto":
        after = min(after, work.routed(tokens * work.blocks * kept, live=tokens))
    return work.one_pass(tokens) < work.score() + after


def takes_routed(work: Work, live: int, pairs: int, dense: int, *, backward: str) -> bool:
    """Whether `pairs` kept pairs of `live` tokens, `dense` of them whole, are worth routing."""
    if _forced.get() is not None or backward == "routed":
        return _forced.get() in ("routed", None)
    return work.routed(pairs - dense * work.blocks, dense, live) < work.dense(live)


def may_route(work: Work, theta: float, *, backward: str) -> bool:
    """Whether block masses are worth writing in the forward, and have room."""
    if _forced.get() is not None or backward == "routed":
        return _forced.get() in ("routed", None)
    return theta > 0 and backward == "auto" and most_pairs(work) > 0


def most_pairs(work: Work) -> int:
    """Kept pairs that a routing has room for; block masses and marks are there at the same time."""
    if work.device == "cpu":
        return work.tokens * work.blocks
    room = BUDGET + work.gradient_bytes - MASS_BYTES * work.tokens * work.blocks
    return min(room // LIST_BYTES, BUDGET // 4 // PAIR_BYTES)


def piece(
    tokens: int, hidden_size: int, vocab_size: int, itemsize: int, *, need_hidden: bool, need_weight: bool,
    gathered: bool, dense: int = 0, pairs: int = 0,
) -> tuple[int, int]:  # fmt: skip
    """(tokens that pass through the Triton backward together, bytes that their workspace may have) within BUDGET.

    Beside the workspace live dH in float32, gathered hidden states, the pairs of a routing, and its dense tokens' own
    copies. One piece needs no float32 dW; of several, the rounded dW does not exist yet.
    """
    wide = 4 * hidden_size if need_hidden else 0
    states = itemsize * hidden_size if gathered else 0
    apart = wide + 2 * itemsize * hidden_size  # of a dense token of a routing
    room = max(BUDGET - PAIR_BYTES * pairs - TOKEN_BYTES * tokens, BUDGET // 4)
    whole = tokens * (states + (wide if itemsize == 2 else 0)) + dense * apart
    if whole <= 3 * room // 4:
        return tokens, room - whole
    room += itemsize * vocab_size * hidden_size if itemsize == 2 and need_weight else 0
    each = wide + states + itemsize * hidden_size + (apart if dense else 0)
    most = max(room // 2 // each // ROWS, 1) * ROWS
    count = max(2, -(-tokens // most))  # one piece has no use for the room of dW
    rows = -(-tokens // count // ROWS) * ROWS  # of about one size
    return min(rows, tokens), max(room - rows * each, room // 4)


def peak_bytes(work: Work, path: str, pairs: int = 0) -> tuple[int, bool]:
    """(bytes that a step takes on an accelerator beyond inputs and gradients, whether a float32 dW comes on top).

    One pass over all tokens at once needs no float32 dW; its logits may take that room beside BUDGET.
    For all tokens live and none gathered; `pairs` are those that a routing keeps. By arithmetic, not measured.
    """
    item, dw = work.itemsize, work.itemsize * work.vocab_size * work.hidden_size
    if path == "one_pass":
        chunk = item * work.vocab_size + 8 * work.blocks + (2 * item + 4) * work.hidden_size
        taken, held = work.chunk_rows() * chunk, TOKEN_BYTES * work.tokens
        if item == 2 and work.chunk_rows() >= work.tokens:
            return taken + held, False
        return max(taken - dw, 0) + held, True
    listed = pairs if path == "routed" else 0
    rows, workspace = work.piece(work.tokens, pairs=listed)
    several = rows < work.tokens
    if path == "two_pass":  # a workspace for all logits, and for all of a 16-bit dW in float32, is never filled
        staged = 4 * work.hidden_size if item == 2 and work.need_weight else 0
        workspace = min(workspace, (item * rows + staged) * work.vocab_size)
    backward = rows * (4 + item * several) * work.hidden_size + workspace - dw * several
    masses = MASS_BYTES * work.tokens * work.blocks + LIST_BYTES * listed if path == "routed" else 0
    held = TOKEN_BYTES * work.tokens + PAIR_BYTES * listed
    return max(backward + held, masses - work.gradient_bytes, 0), several


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
