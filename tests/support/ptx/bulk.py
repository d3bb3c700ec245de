"""What sm_90 adds to copies: tensor maps, bulk copies and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import UNSIGNED
from ptx.machine import Execute, Machine, address_of, reader_of
from ptx.memory import AWAITED, BASE, HARDWARE, Fault, Lanes
from ptx.reader import Instruction


@dataclass(frozen=True)
class TensorMap:
    """A row-major tensor [rows, columns] that is read in boxes; `swizzle` 0 to 3 for spans of 0, 32, 64, 128 bytes."""

    base: int  # address
    shape: tuple[int, int]
    stride: int  # of rows, in elements
    item: int  # bytes of an element
    box: tuple[int, int]
    swizzle: int


@dataclass
class Mbarrier:
    expected: int  # arrivals of a phase
    missing: int  # arrivals still to come
    bytes: int = 0  # still to come
    phase: int = 0  # completed phases
    copies: list = field(default_factory=list)  # under way: flat indices [n] and data [n, 16]

    def advance(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.expected


def copy(i: Instruction) -> Execute:
    """A box of a tensor map, from the coordinates (column, row)."""
    target, source, signal = i.operands
    sources = [address_of(target), address_of(signal), reader_of(source.base, np.uint64)]
    sources += [reader_of(x, np.int32) for x in source.coordinates]

    def run(m: Machine) -> None:
        lanes, issued = m.lanes(), m.one_per_cta(*(source(m) for source in sources))
        for lane, (row, at, flag, handle, column, line) in enumerate(issued):
            tensor = list(m.parameters.values())[handle]
            data = _box(m, tensor, line, column, lanes[lane : lane + 1])  # [box rows, bytes]
            if tensor.swizzle and data.shape[1] > 16 << tensor.swizzle:
                raise Fault("a box is wider than its swizzle's span")
            places = swizzled(at + np.arange(0, data.size, 16), tensor.swizzle)  # [n]
            flat = m.shared.start_copy(places, 16, lanes[np.full(len(places), lane)], HARDWARE)
            mbarrier_at(m, row, flag).copies.append((flat, data.reshape(-1, 16)))
            if m.counters is not None:
                m.counters.sectors["bulk copy"] += data.size // 32
                m.counters.sectors_needed["bulk copy"] += data.size // 32

    return run


def swizzled(at: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 and up of an address, exclusive or bits 7 and up: `mode` of them."""
    return at ^ ((at >> 7 & (1 << mode) - 1) << 4)


def _box(m: Machine, t: TensorMap, line: int, column: int, lane: Lanes) -> np.ndarray:
    """Bytes [box rows, box columns * item] at (line, column) of the tensor; zeros outside of it."""
    height, width = t.box
    data = np.zeros((height, width), UNSIGNED[t.item])
    top, bottom = max(line, 0), min(line + height, t.shape[0])
    left, right = max(column, 0), min(column + width, t.shape[1])
    if top < bottom and left < right:
        elements = np.arange(top, bottom)[:, None] * t.stride + np.arange(left, right)  # [rows, columns] inside
        found = m.memory.load(t.base + elements.reshape(-1) * t.item, t.item, 1, lane[np.zeros(elements.size, int)])[0]
        data[top - line : bottom - line, left - column : right - column] = found.reshape(elements.shape)
    return data.view(np.uint8)


def mbarrier_at(m: Machine, row: int, address: int) -> Mbarrier:
    if (row, address) not in m.mbarriers:
        raise Fault(f"the mbarrier at byte {address - BASE} of shared memory was not initialised")
    return m.mbarriers[row, address]


def mbarrier(i: Instruction) -> Execute:
    """init, inval, arrive.expect_tx, and the loop that waits (see reader.py)."""
    where, *number = [x for x in i.operands if x != "_"]
    address, number = address_of(where), reader_of(*(number or [0]), np.uint32)
    action = {"init": _initialise, "inval": _invalidate, "arrive": _arrive, "wait": _wait}[i.opcode[1]]
    return lambda m: action(m, address(m), number(m))


def _initialise(m: Machine, address: np.ndarray, arrivals: np.ndarray) -> None:
    for row, at, expected in m.one_per_cta(address, arrivals):
        m.mbarriers[row, at] = Mbarrier(expected, expected)


def _invalidate(m: Machine, address: np.ndarray, _: np.ndarray) -> None:
    for row, at in m.one_per_cta(address):
        if mbarrier_at(m, row, at).copies:
            raise Fault("mbarrier.inval while a bulk copy that signals it is under way")
        del m.mbarriers[row, at]


def _arrive(m: Machine, address: np.ndarray, expected_bytes: np.ndarray) -> None:
    for row, at, amount in m.one_per_cta(address, expected_bytes):
        barrier = mbarrier_at(m, row, at)
        if barrier.missing == 0:
            raise Fault("more arrivals at an mbarrier than its phase takes")
        barrier.missing -= 1
        barrier.bytes += amount
        barrier.advance()


def _wait(m: Machine, address: np.ndarray, parity: np.ndarray) -> None:
    """Bulk copies arrive when threads wait for them; a phase that then still misses something never completes."""
    address, parity = (np.broadcast_to(x, (m.C, m.T))[:, 0].tolist() for x in (address, parity))
    for row in np.flatnonzero(m.whole("a wait at an mbarrier", m.T)):
        barrier = mbarrier_at(m, row, address[row])
        if barrier.phase % 2 == parity[row] and barrier.missing == 0:
            for flat, data in barrier.copies:
                m.shared.end_copy(flat, data, np.full(len(flat), AWAITED))
                barrier.bytes -= data.size
            barrier.copies = []
            barrier.advance()
        if barrier.phase % 2 == parity[row]:
            missing = f"{barrier.missing} arrivals and {barrier.bytes} bytes are missing"
            raise Fault(f"program {m.numbers[row]} waits at an mbarrier forever: {missing}")
