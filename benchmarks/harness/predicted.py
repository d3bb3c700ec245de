"""What head/cost.py's cost model expects of a GPU, measured or not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

from benchmarks.harness.shapes import Shape
from lad_kernels.head import cost, memory

SHAPES = (
    *(Shape("", 1, n, 4096, v, "") for v in (131_072, 151_936) for n in (4096, 16_384, 131_072)),
    Shape("", 1, 16_384, 896, 151_936, ""),
    Shape("", 1, 4096, 2048, 131_072, ""),
    Shape("", 1, 4096, 8192, 131_072, ""),
)
CARD = "h200"  # of cost.SPEEDS
KEPT = (0.01, 0.052)  # share of the pairs; the second is what the peaked data of 0.4 nats keep
NOTE = """## A GPU, predicted, **not measured**

The cost model of `lad_kernels/head/cost.py` with constants that an H200 gave: {flops:.0f} Tflop/s, {bytes:.1f} TB/s,
{element:.0e} s a logit beside the products, routed products in tiles of {item} by 128 at {gathered} of the dense rate.
Worked out, not measured: {square} times that rate for tiles of 128 by 128, by what they read, and {waiting:.1f} ms of
waiting for the host, by the host's own time on a CPU. bfloat16; times are shares of the three bare products of a dense
step. No GPU has run the routed kernels as they are now. A policy's pairs are cheaper than the same share spread evenly
over tokens, as here: most belong to a few tokens, which are multiplied whole.

In brackets, the least and the most over all combinations of {flops_band} Tflop/s and {element_band} s a logit, between
which measurements lay, of {square_band} times the rate for the larger tiles and of {waiting_band} ms of waiting.

Memory is what a step takes at its peak beyond inputs and gradients, and beyond one float32 dW where that is named, in
MiB. `tests/head/test_memory.py` holds the same paths to a small budget by counting their allocations.
"""


# What a processor of an H100 issues: 4 warps' instructions a clock, of the 8 warps of a tile. Under products the card
# is held to its power at 1.05 to 1.46 GHz (docs/LOG.md).
CLOCK, PROCESSORS, TILE = 1.4e9, 132, 128 * 256
SIZES, VOCABULARY = (896, 2048, 4096), 151_936


def tile_share(epilogue: int, hidden_size: int) -> float:
    """Of the library's rate, for tiles that take the library's time and an epilogue of so many instructions."""
    product = 2 * hidden_size * TILE * PROCESSORS / cost.SPEEDS["sm_90", 2].flops  # seconds of a tile
    return product / (product + 2 * epilogue / CLOCK)


def modelled(epilogues: dict[str, int]) -> dict[str, dict[str, float]]:
    """Shares of the library's rate by kernel, and calls over three bare products, each by D."""

    calls = {  # N, and which of the paths of `over_products`
        "flat_4096": (4096, 0),
        "flat_16384": (16_384, 0),
        "peaked_1": (16_384, 2),
        "peaked_5": (16_384, 3),
        "micro_batch_1": (2048, 2),
    }

    def over(n: int, d: int, path: int) -> float:
        return over_products(memory.Work(n, d, VOCABULARY, 2, CARD))[path]

    shares = {kernel: {str(d): tile_share(n, d) for d in SIZES} for kernel, n in epilogues.items()}
    return shares | {name: {str(d): over(n, d, path) for d in SIZES} for name, (n, path) in calls.items()}


# What the constants may be instead. Products and epilogues: as measured on the H200 (docs/LOG.md). Larger tiles: from
# no gain. The host: 1.1 ms times the least of ten ratios of its time on a CPU (.44), to no gain.
FLOPS, ELEMENT, SQUARE, WAITING = (6.38e14, 7.28e14), (2e-13, 4e-13), (1.0, 1.5), (4.8e-4, 1.1e-3)


def over_products(work: memory.Work) -> list[float]:
    """Times of one pass, two passes and routed calls of KEPT, over the three products."""
    products = 6 * work.tokens * work.hidden_size * work.vocab_size / cost.speeds(work).flops
    routed = [cost.score(work) + cost.routed(work, kept * work.tokens * work.blocks) for kept in KEPT]
    times = [cost.one_pass(work), cost.score(work) + cost.dense(work, work.tokens), *routed]
    return [seconds / products for seconds in times]


def bands(work: memory.Work) -> list[tuple[float, float]]:
    """(least, most) of each over all combinations of what the constants may be."""
    found = []
    for flops, element, square, waiting in itertools.product(FLOPS, ELEMENT, SQUARE, WAITING):
        speeds = replace(cost.speeds(work), flops=flops, element=element, waiting=waiting)
        with mock.patch.dict(cost.SPEEDS, {(CARD, 2): speeds}), mock.patch.object(cost, "SQUARE", square):
            found.append(over_products(work))
    return [(min(each), max(each)) for each in zip(*found)]


def row(shape: Shape) -> list[str]:
    """One shape's cells: times over the three products, memory in MiB."""
    n, d, v = shape.tokens, shape.hidden_size, shape.vocab_size
    work = memory.Work(n, d, v, 2, CARD)
    products = 3 * shape.flops / cost.SPEEDS[CARD, 2].flops
    pairs = int(KEPT[-1] * n * work.blocks)
    sizes = [memory.peak_bytes(work, path, pairs) for path in ("one_pass", "two_pass", "routed")]
    return [
        f"{n:,}",
        f"{d:,}",
        f"{v:,}",
        f"{1e3 * products:.1f}",
        *(f"{t:.2f} ({low:.2f} to {high:.2f})" for t, (low, high) in zip(over_products(work), bands(work))),
        *(f"{size / 2**20:.0f}" + " + dW" * with_dw for size, with_dw in sizes),
    ]


def lines() -> list[str]:
    """The section of RESULTS.md."""
    speeds = cost.SPEEDS[CARD, 2]
    note = NOTE.format(
        flops=speeds.flops / 1e12,
        bytes=speeds.bytes / 1e12,
        gathered=speeds.routed_efficiency,
        item=speeds.item,
        square=cost.SQUARE,
        element=speeds.element,
        waiting=1e3 * speeds.waiting,
        flops_band=" to ".join(f"{1e-12 * x:.0f}" for x in FLOPS),
        element_band=" to ".join(f"{x:.0e}" for x in ELEMENT),
        square_band=" to ".join(map(str, SQUARE)),
        waiting_band=" to ".join(f"{1e3 * x:.1f}" for x in WAITING),
    )
    header = ["N", "D", "V", "three products, ms", "one pass", "two passes", *(f"routed, {k:.1%} kept" for k in KEPT)]
    header += ["MiB: one pass", "MiB: two passes", f"MiB: routed, {KEPT[-1]:.1%} kept"]
    table = [header, ["---"] * len(header), *map(row, SHAPES)]
    return [note, *(f"| {' | '.join(cells)} |" for cells in table), ""]
