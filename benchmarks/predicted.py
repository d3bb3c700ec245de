"""What head/dispatch.py's cost model expects of an H200, for the shapes that no GPU has measured yet."""

from __future__ import annotations

from benchmarks.shapes import Shape
from lad_kernels.head import dispatch

SHAPES = (
    *(Shape("", 1, n, 4096, v, "") for v in (131_072, 151_936) for n in (4096, 16_384, 131_072)),
    Shape("", 1, 16_384, 896, 151_936, ""),
    Shape("", 1, 4096, 2048, 131_072, ""),
    Shape("", 1, 4096, 8192, 131_072, ""),
)
KEPT = (0.01, 0.052)  # share of the pairs; the second is what the peaked data of 0.4 nats keep
NOTE = """## H200, predicted, **not measured**

The cost model of `lad_kernels/head/dispatch.py` with its constants ({flops:.0f} Tflop/s, {bytes:.1f} TB/s, gathered
products at {gathered} of the dense rate), bfloat16; times are shares of the three bare products of a dense step. The
model has no term for a kernel that misses those rates, so the score pass (2 N D V) is a third by construction. Traffic
of float32 sums counts in full; a library that hides it behind the products comes out lower.

Memory is what a step takes at its peak beyond inputs and gradients, and beyond one float32 dW where that is named, in
MiB. `tests/test_memory.py` holds the same paths to a small budget by counting their allocations.
"""


def memory(work: dispatch.Work, kept: float | None) -> tuple[float, bool]:
    """(bytes, whether a float32 dW comes on top) of two passes, or of the routed path with `kept` of the pairs."""
    pairs = int((kept or 0) * work.tokens * work.blocks)
    rows, workspace = dispatch.piece(
        work.tokens, work.hidden_size, work.vocab_size, work.itemsize, need_hidden=True, need_weight=True,
        gathered=False, pairs=pairs,
    )  # fmt: skip
    pieces = rows < work.tokens
    logits = work.itemsize * rows * work.vocab_size  # a workspace for all of them is never filled
    each = 4 * work.hidden_size + work.itemsize * work.hidden_size * pieces
    backward = rows * each + (min(workspace, logits) if kept is None else workspace)
    backward += dispatch.TOKEN_BYTES * work.tokens + dispatch.PAIR_BYTES * pairs
    backward -= work.itemsize * work.vocab_size * work.hidden_size * pieces  # of the rounded dW, made last
    masses = 0 if kept is None else dispatch.ROUTE_BYTES * work.tokens * work.blocks
    gradients = work.itemsize * work.hidden_size * (work.tokens + work.vocab_size)
    return max(backward, masses - gradients), pieces


def one_pass_bytes(work: dispatch.Work) -> float:
    """Bytes of the one pass beyond its float32 dW; the room of the rounded one is used while it does not exist."""
    rows, item = work.chunk_rows(), work.itemsize
    chunk = rows * (item * work.vocab_size + 8 * work.blocks + (2 * item + 4) * work.hidden_size)
    return max(chunk - item * work.vocab_size * work.hidden_size, 0) + dispatch.TOKEN_BYTES * work.tokens


def row(shape: Shape) -> list[str]:
    """One shape's cells: times over the three products, memory in MiB."""
    n, d, v = shape.tokens, shape.hidden_size, shape.vocab_size
    work = dispatch.Work(n, d, v, 2, "cuda")
    products = 3 * shape.flops / dispatch.SPEEDS["cuda"].flops
    routed = [work.score() + work.routed(kept * n * work.blocks) for kept in KEPT]
    times = [work.one_pass(), work.score() + work.dense(n), *routed]
    sizes = [(one_pass_bytes(work), True), memory(work, None), memory(work, KEPT[-1])]
    return [
        f"{n:,}",
        f"{d:,}",
        f"{v:,}",
        f"{1e3 * products:.1f}",
        *(f"{t / products:.2f}" for t in times),
        *(f"{size / 2**20:.0f}" + " + dW" * with_dw for size, with_dw in sizes),
    ]


def lines() -> list[str]:
    """The section of RESULTS.md."""
    speeds = dispatch.SPEEDS["cuda"]
    note = NOTE.format(flops=speeds.flops / 1e12, bytes=speeds.bytes / 1e12, gathered=speeds.gathered)
    header = ["N", "D", "V", "three products, ms", "one pass", "two passes", *(f"routed, {k:.1%} kept" for k in KEPT)]
    header += ["MiB: one pass", "MiB: two passes", f"MiB: routed, {KEPT[-1]:.1%} kept"]
    table = [header, ["---"] * len(header), *map(row, SHAPES)]
    return [note, *(f"| {' | '.join(cells)} |" for cells in table), ""]
