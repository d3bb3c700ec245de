"""Tile shapes of the head's kernels: one table by architecture and element size, and how a device is recognised.

A tile is block_n tokens x block_v vocabulary columns; its product runs over the hidden size in steps of block_k. The
choice depends on the device, the dtype, the layout of the operands and which terms the logits have, never on N: the
accumulation order of a logit is then the same whether its token comes alone or in a batch, so results are bitwise
independent of N and neighbours.

What decides a row: the fp32 accumulator holds block_n * block_v / (32 * warps) registers a thread and must leave room
for the epilogue (no spills: `test_compiles.py`); stages * (block_n + block_v) * block_k elements of shared memory
must fit the device; tile sides are powers of two. A softcap or a bias makes the epilogue too rich for the widest
tiles, hence `narrow`. Operands that miss the alignment a row needs are read element by element through registers,
hence the small tiles of `unaligned`. fp32 operands are multiplied in true fp32 (never tf32), without tensor cores, and
bound by loads from shared memory: 2.4 passes over the banks for each fma of a warp, 1.3 with half the warps and twice
the registers a thread, which plain logits have room for.

Left out: autotuning. Its choice varies from run to run, and with it the bits of the result.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lad_kernels.head.records import LogitTransform


@dataclass(frozen=True)
class Tiles:
    """Shape and schedule of one tile. `tma` asks for host-made tensor descriptors instead of pointers.

    `stores` asks for them, too, where a tile of [block_n, block_v] is written: a sixth of the epilogue's instructions
    less than by pointers, and shared memory of its own next to the stages.
    """

    block_n: int
    block_v: int  # a multiple of BLOCK
    block_k: int
    group_n: int  # token tiles that share a panel of W while it is in L2
    warps: int
    stages: int
    tma: bool = False
    stores: bool = False


@dataclass(frozen=True)
class Device:
    """What the launch code needs to know. `processors` = 0 means one program per tile, else a persistent grid."""

    arch: str
    processors: int


class Row(NamedTuple):
    """Tiles of one architecture and element size."""

    wide: Tiles  # plain logits
    narrow: Tiles  # logits with a softcap or a bias
    unaligned: Tiles = Tiles(64, 128, 32, 8, 8, 2)


_FLOAT32, _FLOAT32_WIDE = Tiles(64, 128, 32, 8, 8, 3), Tiles(64, 128, 32, 8, 4, 3)
_TABLE = {  # (arch, bytes per element)
    ("sm_80", 2): Row(Tiles(128, 256, 32, 8, 8, 3), Tiles(128, 128, 64, 8, 8, 3)),
    ("sm_86", 2): Row(Tiles(128, 128, 64, 8, 8, 2), Tiles(128, 128, 64, 8, 8, 2)),
    ("sm_90", 2): Row(
        Tiles(128, 256, 64, 8, 8, 3, tma=True, stores=True), Tiles(128, 128, 64, 8, 8, 4, tma=True, stores=True)
    ),
    ("sm_100", 2): Row(Tiles(128, 256, 64, 8, 8, 4, tma=True), Tiles(128, 128, 64, 8, 8, 4, tma=True)),
    ("gfx942", 2): Row(Tiles(128, 128, 64, 8, 8, 2), Tiles(128, 128, 64, 8, 8, 2)),
    ("sm_80", 4): Row(_FLOAT32_WIDE, _FLOAT32),
    ("sm_86", 4): Row(_FLOAT32, _FLOAT32),
    ("sm_90", 4): Row(_FLOAT32_WIDE, _FLOAT32),
    ("sm_100", 4): Row(_FLOAT32_WIDE, _FLOAT32),
    ("gfx942", 4): Row(_FLOAT32, _FLOAT32),
}
# Compilers fuse a product and a sum where they please, in one row of a tile and not in the next, so that a token's bits
# would depend on its place. What may be fused says so (tl.fma).
SAME_BITS = {"enable_fp_fusion": False}
_INTERPRETED = "sm_80"  # whose rows the interpreter runs


@functools.lru_cache
def probe(device: torch.device) -> Device:
    """Name the architecture whose row of the table fits `device`."""
    if device.type != "cuda":
        return Device(_INTERPRETED, 0)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("gfx942", 0)
    major, minor = properties.major, properties.minor
    if major == 8 and minor in (0, 7):
        return Device("sm_80", 0)
    if major in (9, 10):
        return Device(f"sm_{major}0", properties.multi_processor_count)
    return Device("sm_86", 0)  # consumer parts up to Blackwell: 99 KiB of shared memory


def select(device: torch.device, dtype: torch.dtype, *, narrow: bool = False, aligned: bool = True) -> Tiles:
    """Tiles for operands of `dtype`; `aligned` says that they meet `fits` of the tiles it would give.

    Neither D nor V moves the choice: V is tens of tiles wide, and a D that is not a multiple of block_k costs a mask.
    """
    row = _TABLE[probe(device).arch, dtype.itemsize]
    if not aligned:
        return row.unaligned
    return row.narrow if narrow else row.wide


def tiles_for(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tiles:
    """Tiles for hidden [N, D] and weight [V, D], by their alignment in memory."""
    device, dtype = hidden.device, hidden.dtype
    tiles = select(device, dtype, narrow=bias is not None or transform.softcap is not None)
    if fits(hidden, tiles) and fits(weight, tiles):
        return tiles
    return select(device, dtype, aligned=False)


def fits(x: Tensor, tiles: Tiles) -> bool:
    """Whether x [R, C] is aligned as `tiles` needs it.

    TMA demands a base and a row stride of whole 16 bytes. Pointers are read 16 bytes at a time when Triton
    can prove the alignment: it tests base address, row stride and C for divisibility by 16, each as a number.
    """
    step, columns = x.stride(0), x.shape[1]
    if x.data_ptr() % 16 != 0 or step < columns:
        return False
    return step * x.element_size() % 16 == 0 if tiles.tma else step % 16 == 0 and columns % 16 == 0


def by_rows(x: Tensor) -> Tensor:
    """x [R, C] itself when its rows are contiguous, else a contiguous copy.

    A transposed weight therefore costs one copy of itself per call. Rows may be further apart than C (a slice of a
    wider tensor); the bound keeps offsets inside one tile below 2^31.
    """
    return x if x.stride(1) == 1 and x.stride(0) * 256 < 2**31 else x.contiguous()


def operand(x: Tensor, rows: int, tiles: Tiles) -> Tensor | TensorDescriptor:
    """How a kernel receives x [R, C]: as tiles of [rows, block_k] behind a descriptor, or as a pointer."""
    if not tiles.tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, tiles.block_k])


def output(x: Tensor, tiles: Tiles) -> Tensor | TensorDescriptor:
    """How a kernel receives x [R, C] that it writes: as tiles of [block_n, block_v], or as a pointer."""
    if not tiles.stores:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tiles.block_n, tiles.block_v])


def inverse_temperature(transform: LogitTransform) -> Tensor | float:
    """1 / T as the kernels take it: a float32 tensor [N] or a number."""
    if isinstance(transform.temperature, Tensor):
        return transform.temperature.float().reciprocal().contiguous()  # [N]
    return 1.0 / transform.temperature


def zero(device: torch.device) -> float | None:
    """What accumulators start from where the compiler must not know that it is 0; None where it should.

    A Hopper's are cleared in the epilogue: with one instruction an element, with two where the number is known.
    Elsewhere the first product needs no accumulator at all.
    """
    return 0.0 if probe(device).arch == "sm_90" else None


def thread_bits(device: torch.device) -> int:
    """Bits of a column that tell a thread's accumulators from its neighbours': none on Blackwell, where it has rows."""
    return {"sm_100": 0, "gfx942": 31}.get(probe(device).arch, 6)


def programs(device: torch.device, tiles: int) -> int:
    """Size of the grid that walks over `tiles` tiles."""
    processors = probe(device).processors
    return min(processors, tiles) if processors else tiles


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
