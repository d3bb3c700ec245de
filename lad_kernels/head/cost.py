"""Seconds of each path through the head, in closed form over one table of speeds.

With N tokens of which A have a coefficient c != 0, and P active (token, block) pairs of routing.py,

| path | flops | when it is possible |
|---|---|---|
| score | 2 N D V | no gradient is asked for |
| one pass | 6 N D V | c is known as soon as a chunk's log-probs are |
| two pass | (2 N + 6 A) D V | always |
| routed | 2 N D V + 6 D BLOCK P | tail_mass > 0 and backward is not "dense" |
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from lad_kernels.head.memory import Work
from lad_kernels.head.records import BLOCK, JOINT, MANY

CPU_SPEEDS = "LAD_KERNELS_CPU_SPEEDS"  # environment: speeds of this CPU, read when the package is imported
CPU_FIELDS = ("flops", "bytes", "element", "routed_efficiency", "block")
SQUARE = 1.5  # rate of tiles of 128 by 128 over those of 64 by 128, which read half as much again for a flop
PACKED = 3  # times longer than copying W a CPU's product of a few tokens with it takes (2.3 to 3.7 on a Xeon)
_HBM3E = 100 << 30  # bytes: a Hopper with more has an H200's faster memory


@dataclass(frozen=True)
class Speeds:
    """What one kind of device does in a second, and what a path costs besides its products."""

    flops: float  # of a large product
    bytes: float  # copied
    element: float  # seconds per logit outside the products (exponential, sums), each time it is made
    routed_efficiency: float  # rate of the routed products over that of large ones; in Triton with tiles of 64 by 128
    block: float  # seconds per vocabulary block of the routed backward
    pair: float = 0.0  # seconds per (token, block) pair that is looked at when pairs are chosen
    waiting: float = 0.0  # seconds that the host takes from the number of pairs to their products; W is read meanwhile
    item: float = 1  # places for the pairs of a block that are multiplied together


# Measured: "cpu" (any dtype, PyTorch) with one thread of an AMD EPYC, before pairs were gathered by the run, and
# "cpu_avx512" with one of an Intel Xeon, but for its block: between 1.5e-4 there and 7.7e-5 on one without AMX. Of both
# only ratios matter, and `lad-kernels doctor` measures yours.
# In bfloat16 (benchmarks/results), ("sm_90", 2) on an H100 80GB HBM3: head products 600 to 741 Tflop/s, a copy 3.03
# TB/s, the tiles' epilogues 2e-13 to 4e-13 s a logit. "h200" on an H200: 638 to 728 Tflop/s, 4.27 TB/s, and at
# N = 8,192 12.3 to 13.4 ms a kernel where the library's products took 12.4 to 12.9. Routing, for both, on the H200:
# pairs_kernel 0.33 ms, of which reading W takes 0.29, for 57,000 pairs (twice those counted at N = 4,096) in tiles
# of 64 by 128; lists 0.24 ms for 9.7 million pairs that were looked at; 7.4 ms of waiting for the host, since shortened
# to 0.8 (worked out on a CPU).
_EPYC = Speeds(8e10, 8e9, 1.2e-9, 0.4, 3.5e-4)
_XEON = Speeds(1.29e11, 1.35e10, 1.25e-9, 0.8, 1.1e-4)
_H100 = Speeds(7e14, 3.0e12, 3e-13, 0.37, 1e-7, 2.5e-11, 8e-4, item=64)
_H200 = Speeds(6.8e14, 4.27e12, 2e-13, 0.37, 1e-7, 2.5e-11, 8e-4, item=64)


def _scaled(flops: float, bytes: float, exponentials: float) -> Speeds:
    """The H100's row for a card whose data sheet has `flops`, `bytes` and `exponentials` times an H100's."""
    return replace(
        _H100,
        flops=_H100.flops * flops,
        bytes=_H100.bytes * bytes,
        element=_H100.element / exponentials,
        pair=_H100.pair / bytes,
    )


def cpu_speeds(assumed: Speeds) -> Speeds:
    """A CPU's row with what CPU_SPEEDS sets, as in "flops=9e10,block=1e-4"; others keep the assumed value."""
    text, changed = os.environ.get(CPU_SPEEDS, ""), {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name.strip() not in CPU_FIELDS or not 0 < number < math.inf:
            raise ValueError(
                f"{CPU_SPEEDS}: expected NAME=NUMBER,... with names among {', '.join(CPU_FIELDS)} and positive "
                f"numbers, got {part!r} in {text!r}; `lad-kernels doctor` prints a line to set"
            )
        changed[name.strip()] = number
    return replace(assumed, **changed)


# (architecture, bytes of an element). The others are not measured: data sheets, over an H100 SXM's 989 Tflop/s in 16
# bits, 67 in float32, 3.35 TB/s and 132 processors of 16 exponentials a clock at 1.83 GHz. A100: 312, 19.5, 2.04, 108
# at 1.41. A10: 125, 31, 0.6, 72 at 1.70. L40S: 362, 91.6, 0.864, 142 at 2.52. B200: 2,250, 75, 8.0, 148 at 1.97.
# MI300X: 1,307, 163, 5.3, 304 at 2.10.
SPEEDS = {
    **{("cpu", itemsize): cpu_speeds(_EPYC) for itemsize in (2, 4, 8)},
    ("sm_80", 2): _scaled(312 / 989, 2.04 / 3.35, 0.63),
    ("sm_80", 4): _scaled(19.5 / 989, 2.04 / 3.35, 0.63),
    ("sm_86", 2): _scaled(125 / 989, 0.6 / 3.35, 0.51),
    ("sm_86", 4): _scaled(31 / 989, 0.6 / 3.35, 0.51),
    ("sm_89", 2): _scaled(362 / 989, 0.864 / 3.35, 1.48),
    ("sm_89", 4): _scaled(91.6 / 989, 0.864 / 3.35, 1.48),
    ("sm_90", 2): _H100,
    ("h200", 2): _H200,
    ("h200", 4): replace(_H200, flops=_H200.flops * 67 / 989),
    ("sm_90", 4): _scaled(67 / 989, 1.0, 1.0),
    ("sm_100", 2): _scaled(2250 / 989, 8.0 / 3.35, 1.21),
    ("sm_100", 4): _scaled(75 / 989, 8.0 / 3.35, 1.21),
    ("gfx942", 2): _scaled(1307 / 989, 5.3 / 3.35, 2.64),
    ("gfx942", 4): _scaled(163 / 989, 5.3 / 3.35, 2.64),
    **{("cpu_avx512", itemsize): cpu_speeds(_XEON) for itemsize in (2, 4, 8)},
}


def architecture(device: torch.device, triton: bool) -> str:
    """Whose row of SPEEDS counts: the device's own, sm_90 for a GPU that is not there; PyTorch's paths: a CPU's."""
    if not triton or device.type != "cuda":
        return "cpu_avx512" if device.type == "cpu" and intel_avx512() else "cpu"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return "sm_90"
    from lad_kernels.head.kernels import tile_table

    arch = tile_table.probe(device).arch
    if arch not in ("sm_86", "sm_90"):
        return arch
    card = torch.cuda.get_device_properties(device)
    if arch == "sm_86":
        return "sm_89" if (card.major, card.minor) == (8, 9) else arch
    return "h200" if card.total_memory > _HBM3E else arch


@cache
def intel_avx512() -> bool:
    """Whether this is an Intel CPU whose AVX-512 PyTorch uses; asked, not measured."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def speeds(work: Work) -> Speeds:
    return SPEEDS[work.architecture, work.itemsize]


def _product(work: Work, tokens: float) -> float:
    return 2 * tokens * work.hidden_size * work.vocab_size / speeds(work).flops


def score(work: Work) -> float:
    """Seconds of the forward."""
    return _product(work, work.tokens) + speeds(work).element * work.tokens * work.vocab_size


def sample(work: Work, step: int = 1) -> float:
    """Seconds of the forward of `step` times `work.sample` tokens with every step-th entry, bound by reading those."""
    read = work.itemsize * work.vocab_size * work.hidden_size / speeds(work).bytes / step
    read *= 1 if work.triton else PACKED
    return max(_product(work, work.sample) + speeds(work).element * work.sample * work.vocab_size, read)


def dense(work: Work, active: float, *, staged: bool = False) -> float:
    """Seconds of the dense backward of the `active` tokens, those with a gradient; `staged`: dW passes through float32.

    Which float16 takes always, uncounted.
    """
    s, tokens = speeds(work), math.ceil(active)
    slabs, chunks = 0, _chunk_sums(work, tokens)
    if work.triton and tokens:  # each slab of the vocabulary reads and writes a float32 dH
        rows, workspace = work.token_chunk(tokens)
        slabs = math.ceil(work.vocab_size * work.itemsize * rows / workspace)
    traffic = 8 * active * work.hidden_size * slabs * work.need_hidden / s.bytes
    if work.triton and tokens and work.itemsize == 2 and staged:
        traffic += 10 * work.vocab_size * work.hidden_size * work.need_weight / s.bytes
    return (1 + work.products) * _product(work, active) + s.element * active * work.vocab_size + traffic + chunks


def routed(work: Work, pairs: float, dense_tokens: int = 0, active: float | None = None) -> float:
    """Seconds of the routed backward of `pairs` pairs and `dense_tokens` whole tokens, of `active` (None: all)."""
    s = speeds(work)
    tokens = work.tokens if active is None else math.ceil(active)
    read = work.itemsize * work.vocab_size * work.hidden_size / s.bytes  # seconds for W, or for writing dW
    many = pairs >= MANY * work.blocks and _squares(work)
    of_logits, of_gradients, of_row = _of_a_pair(work, many)
    empty = min(pairs, work.blocks) / 2  # in each block's last item half of the places, on average
    logits = of_logits * (pairs + empty * (s.item * (1 + many) - 1))
    gradients = of_gradients * (pairs + empty * (s.item - 1))
    if work.triton:  # a product and its W or dW go together, but dR W is bound by memory
        logits, gradients = max(logits, read), max(gradients, read * work.need_weight)
        rows = tokens * _row_bytes(work, tokens, pairs, dense_tokens) / s.bytes if tokens else 0.0
        gradients += work.need_hidden * (read + of_row * pairs + rows)
        choosing = s.pair * work.tokens * work.blocks + max(s.waiting, read)
    else:
        gradients, choosing = gradients + read * work.need_weight, s.pair * work.tokens * work.blocks
    whole = dense(work, dense_tokens, staged=dense_tokens > JOINT)
    chunks = _chunk_sums(work, tokens, pairs=int(pairs), dense=dense_tokens)
    return choosing + logits + gradients + whole + chunks + s.block * work.blocks


def _row_bytes(work: Work, tokens: int, pairs: float, dense_tokens: int) -> int:
    """Bytes moved of a token's row of dH: rounded once if a run has all pairs, else zeroed, added to by each, rounded.

    Pairs of a run: their dR and, next to it, 128 columns of dR W fit the workspace; both have the size of the inputs.
    """
    rows, workspace = work.token_chunk(tokens, dense=dense_tokens, pairs=int(pairs))
    runs = max(1, math.ceil(pairs * rows / tokens * 2 * work.itemsize * BLOCK / workspace))
    return (2 if rows == tokens and runs == 1 else 10 + 8 * runs) * work.hidden_size


def dense_share(work: Work) -> float:
    """Share of its blocks from which a token costs less in dense products than by its pairs."""
    return 2 * (1 + work.products) * work.hidden_size * BLOCK / speeds(work).flops / sum(_of_a_pair(work))


def _squares(work: Work) -> bool:
    """Whether products of routed pairs have tiles of 128 by 128: that of dW, and with many pairs that of the logits."""
    return work.triton and work.itemsize == 2


def _of_a_pair(work: Work, many: bool = False) -> tuple[float, float, float]:
    """Seconds of a pair's logits, of its gradient products, and of its row of dH, which kernels write and read.

    With 16-bit inputs the product of that row is hidden behind it.
    """
    s, D, squares = speeds(work), work.hidden_size, _squares(work)
    product = 2 * D * BLOCK / (s.flops * s.routed_efficiency)
    products = work.products - (work.need_hidden and squares)
    rows = 2 * work.itemsize * D * work.need_hidden * work.triton / s.bytes
    return product / (SQUARE if many else 1.0), product * products / (SQUARE if squares else 1.0), rows


def one_pass(work: Work, active: float | None = None) -> float:
    """Seconds of forward and backward in one pass of which `active` tokens (None: all) have a gradient.

    Each of several chunks reads and writes a float32 dW, rounded last. PyTorch drops the tokens without a gradient
    from the products.
    """
    active = work.tokens if active is None or work.triton else active
    s = speeds(work)
    chunks = -(-work.tokens // work.chunk_rows())
    each = 0 if chunks == 1 and work.itemsize == 2 else 8 * chunks + work.itemsize * (work.itemsize == 2)
    sums = each * work.vocab_size * work.hidden_size * work.need_weight / s.bytes
    products = _product(work, work.tokens) + work.products * _product(work, active)
    return products + s.element * (work.tokens + active) * work.vocab_size + sums


def _chunk_sums(work: Work, tokens: int, *, dense: int = 0, pairs: int = 0) -> float:
    """Seconds that a float32 dW takes, read and written by every token chunk; 0 for one chunk."""
    count = 1
    if work.triton and tokens:
        count = -(-tokens // work.token_chunk(tokens, dense=dense, pairs=pairs)[0])
    traffic = (8 * count + work.itemsize) * work.vocab_size * work.hidden_size
    return traffic / speeds(work).bytes if count > 1 and work.need_weight else 0.0
