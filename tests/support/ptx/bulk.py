"""What sm_90 adds to copies: tensor maps, bulk copies from and to them, and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import UNSIGNED
from ptx.machine import Execute, Machine, address_of, reader_of
from ptx.memory import AWAITED, BASE, HARDWARE, Fault, Lanes
from ptx.reader import Instruction


@dataclass(frozen=True)
class TensorMap:
    """A row-major tensor [rows, columns], read or written in boxes; `swizzle` 0 to 3: spans of 0, 32, 64, 128 bytes."""

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


def store(i: Instruction) -> Execute:
    """Boxes from shared memory to a tensor map, one a thread; written at once, though only a wait tells of it."""
    target, source = i.operands
    sources = [address_of(source), reader_of(target.base, np.uint64)]
    sources += [reader_of(x, np.int32) for x in target.coordinates]

    def run(m: Machine) -> None:
        lanes, read = m.lanes(), []
        given = [m.of_lanes(source(m), lanes).tolist() for source in sources]  # [n] each
        for lane, (at, handle, column, line) in enumerate(zip(*given, strict=True)):
            tensor, mine = list(m.parameters.values())[handle], lanes[lane : lane + 1]
            if tensor.swizzle and tensor.box[1] * tensor.item > 16 << tensor.swizzle:
                raise Fault("a box is wider than its swizzle's span")
            places = swizzled(at + np.arange(0, tensor.box[0] * tensor.box[1] * tensor.item, 16), tensor.swizzle)  # [n]
            flat, data = m.shared.start_read(places, mine[np.zeros(len(places), int)])  # [n], [n, 16]
            read.append((flat, lanes.index[lane], lanes.row[lane]))
            elements, inside = _places(tensor, line, column)
            values = data.reshape(-1).view(UNSIGNED[tensor.item]).reshape(tensor.box)[inside].reshape(-1)
            if len(elements):
                everyone = mine[np.zeros(len(elements), int)]
                m.memory.store(tensor.base + elements * tensor.item, [values], everyone)
            if m.counters is not None:
                m.counters.sectors["bulk copy"] += len(elements) * tensor.item // 32
                m.counters.sectors_needed["bulk copy"] += len(elements) * tensor.item // 32

        def finish(now: np.ndarray) -> None:
            """In the CTAs `now` [C]: as if the threads read only now."""
            for flat, thread, row in read:
                if now[row]:
                    m.shared.end_read(flat, m.everyone.stamp[thread])

        m.groups["bulk"].open.append(finish)

    return run


def swizzled(at: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 and up of an address, exclusive or bits 7 and up: `mode` of them."""
    return at ^ ((at >> 7 & (1 << mode) - 1) << 4)


def _box(m: Machine, t: TensorMap, line: int, column: int, lane: Lanes) -> np.ndarray:
    """Bytes [box rows, box columns * item] at (line, column) of the tensor; zeros outside of it."""
    data = np.zeros(t.box, UNSIGNED[t.item])
    elements, inside = _places(t, line, column)
    if len(elements):
        found = m.memory.load(t.base + elements * t.item, t.item, 1, lane[np.zeros(len(elements), int)])[0]
        data[inside] = found.reshape(data[inside].shape)
    return data.view(np.uint8)


def _places(t: TensorMap, line: int, column: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Of a box at (line, column): elements [n] of the tensor that it covers, and where in the box they are."""
    (height, width), (rows, columns) = t.box, t.shape
    top, bottom = max(line, 0), max(min(line + height, rows), 0)
    left, right = max(column, 0), max(min(column + width, columns), 0)
    elements = np.arange(top, bottom)[:, None] * t.stride + np.arange(left, right)  # [rows, columns] inside
    return elements.reshape(-1), np.s_[top - line : max(bottom - line, 0), left - column : max(right - column, 0)]


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
