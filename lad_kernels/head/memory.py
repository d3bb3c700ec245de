"""What a call may take of an accelerator's memory beyond its inputs, its gradients and one float32 dW: BUDGET bytes.

Whatever N is. Memory that the gradients use later counts from the start, so what is freed before they exist, such as
block masses, may use it. `Work` describes a call as far as memory and time (cost.py) depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lad_kernels.head.records import BLOCK

BUDGET = 512 << 20  # bytes
CPU_LOGITS = 128 << 20  # bytes of one chunk's logits in one pass without an accelerator
PAIR_BYTES = 16  # of an active pair in a Routing, and of what lists it
TOKEN_BYTES = 128  # of one token's log-prob, lse, coefficients and the objective's work
ROWS = 256  # tokens of a chunk are a multiple
MASS_BYTES = 5  # of a (token, block) pair while pairs are chosen: its mass in float32; a bit and sums take 0.6 more
LIST_BYTES = 12  # of an active pair while pairs are listed: its token and its scale


@dataclass(frozen=True)
class Work:
    """A head call, as far as time and memory depend on it."""

    tokens: int
    hidden_size: int
    vocab_size: int
    itemsize: int
    architecture: str  # of cost.SPEEDS
    need_hidden: bool = True  # whether dH is asked for
    need_weight: bool = True  # whether dW is

    @property
    def triton(self) -> bool:
        """Whether Triton runs it; else PyTorch, on a CPU or for want of kernels."""
        return not self.architecture.startswith("cpu")

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

    @property
    def sample(self) -> int:
        """Tokens that are scored first where the choice of a path depends on shares."""
        return min(64, max(8, self.tokens // 64), self.tokens)

    def token_chunk(self, tokens: int, *, gathered: bool = False, dense: int = 0, pairs: int = 0) -> tuple[int, int]:
        """(tokens that pass through the Triton backward together, bytes that their workspace may have) within BUDGET.

        Next to the workspace there are dH in float32, gathered hidden states, the pairs of a routing, and its dense
        tokens' own copies. With a single chunk no float32 dW is needed; with several, dW is rounded only after the
        last.
        """
        row_bytes = self.itemsize * self.hidden_size
        dh_bytes = 4 * self.hidden_size if self.need_hidden else 0  # of a token, in float32
        gathered_bytes = row_bytes if gathered else 0
        dense_bytes = dh_bytes + 2 * row_bytes  # of a dense token of a routing
        room = max(BUDGET - PAIR_BYTES * pairs - TOKEN_BYTES * tokens, BUDGET // 4)
        whole = tokens * (gathered_bytes + (dh_bytes if self.itemsize == 2 else 0)) + dense * dense_bytes
        if whole <= 3 * room // 4:
            return tokens, room - whole
        room += row_bytes * self.vocab_size if self.itemsize == 2 and self.need_weight else 0
        token_bytes = dh_bytes + gathered_bytes + row_bytes + (dense_bytes if dense else 0)
        most = max(room // 2 // token_bytes // ROWS, 1) * ROWS
        count = max(2, -(-tokens // most))  # a single chunk has no use for the room of dW
        rows = -(-tokens // count // ROWS) * ROWS  # of about one size
        return min(rows, tokens), max(room - rows * token_bytes, room // 4)

    def chunk_rows(self) -> int:
        """Tokens whose logits are kept at once by the one-pass path.

        On an accelerator all tokens, if their logits fit BUDGET and the room of a float32 dW, which is not needed then:
        a 16-bit dW is rounded by the one product that makes it. Else BUDGET and the room of the rounded dW, which is
        made when the logits are gone: about 2,048 tokens or more from D = 896 at V = 152,064 and from D = 1,152 at
        V = 262,144. With fewer the float32 dW, read and written once a chunk, is dear.
        """
        if not self.triton:
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


def most_pairs(work: Work) -> int:
    """Active pairs that a routing has room for; block masses and marks are there at the same time."""
    if not work.triton:
        return work.tokens * work.blocks
    room = BUDGET + work.gradient_bytes - MASS_BYTES * work.tokens * work.blocks
    return min(room // LIST_BYTES, BUDGET // 4 // PAIR_BYTES)


def peak_bytes(work: Work, path: str, pairs: int = 0) -> tuple[int, bool]:
    """(bytes that a step takes on an accelerator beyond inputs and gradients, whether a float32 dW comes on top).

    One pass over all tokens at once needs no float32 dW; its logits may take that room on top of BUDGET.
    For all tokens with a gradient and none gathered; `pairs` are those that a routing keeps. By arithmetic, not
    measured.
    """
    item, dw = work.itemsize, work.itemsize * work.vocab_size * work.hidden_size
    if path == "one_pass":
        chunk = item * work.vocab_size + 8 * work.blocks + (2 * item + 4) * work.hidden_size
        taken, held = work.chunk_rows() * chunk, TOKEN_BYTES * work.tokens
        if item == 2 and work.chunk_rows() >= work.tokens:
            return taken + held, False
        return max(taken - dw, 0) + held, True
    listed = pairs if path == "routed" else 0
    rows, workspace = work.token_chunk(work.tokens, pairs=listed)
    several = rows < work.tokens
    if path == "two_pass":  # a workspace for all logits is never filled; float16's has dW in float32 besides
        workspace = min(workspace, item * rows * work.vocab_size)
    backward = rows * (4 + item * several) * work.hidden_size + workspace - dw * several
    masses = MASS_BYTES * work.tokens * work.blocks + LIST_BYTES * listed if path == "routed" else 0
    held = TOKEN_BYTES * work.tokens + PAIR_BYTES * listed
    return max(backward + held, masses - work.gradient_bytes, 0), several
