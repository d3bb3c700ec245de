"""The cp.async family beyond single copies, and what sm_90 adds: tensor maps, bulk copies and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import UNSIGNED
from ptx.global_memory import Fault, stamp
from ptx.machine import Execute, Machine, address_of, reader_of
from ptx.reader import Address, Instruction
from ptx.shared_memory import AWAITED, BASE, NO_WARP
from ptx.transfers import deliver


@dataclass(frozen=True)
class TensorMap:
    """A row-major tensor [rows, columns] that is read in boxes; `swizzle` 0 to 3 for spans of 0, 32, 64, 128 bytes."""

    base: int  # address
    shape: tuple[int, int]
    stride: int  # of rows, in elements
    item: int  # bytes of an element
    box: tuple[int, int]
    swizzle: int
    nan: bool = False  # whether what lies outside of the tensor is NaN, not 0


@dataclass
class Mbarrier:
    """One address in every CTA, [C] each."""

    expected: np.ndarray  # arrivals of a phase; 0: not initialised
    missing: np.ndarray  # arrivals still to come
    bytes: np.ndarray  # still to come
    phase: np.ndarray  # completed phases
    copies: list = field(default_factory=list)  # (row of C, flat indices [n], data [n, 16]) under way

    def advance(self, row: int) -> None:
        if self.missing[row] == 0 and self.bytes[row] == 0:
            self.phase[row] += 1
            self.missing[row] = self.expected[row]


def copy(i: Instruction) -> Execute:
    """All of cp but single asynchronous copies."""
    kind = i.opcode[2]
    if kind == "commit_group":
        return lambda m: m.commit(m.copies)
    if kind == "wait_group":
        allowed = i.operands[0].bits
        return lambda m: m.wait(m.copies, allowed, deliver)
    if i.opcode[2:5] != ("bulk", "tensor", "2d") or not i.opcode[5].startswith("shared") or len(i.operands) != 3:
        raise NotImplementedError(f"PTX instruction {i.text}")
    return _bulk_copy(i)


def _bulk_copy(i: Instruction) -> Execute:
    target, source, signal = i.operands
    sources = [address_of(target, np.uint32), address_of(signal, np.uint32), reader_of(source.base, np.uint64)]
    sources += [reader_of(x, np.int32) for x in source.coordinates]

    def run(m: Machine) -> None:
        for row, at, flag, handle, column, line in zip(*m.one_per_cta(*(source(m) for source in sources)), strict=True):
            tensor = list(m.parameters.values())[int(handle)]
            data = _box(m, tensor, int(line), int(column), int(row))  # [box rows, bytes]
            if tensor.swizzle and data.shape[1] > 16 << tensor.swizzle:
                raise Fault("a box is wider than its swizzle's span")
            places = swizzled(int(at) + np.arange(data.size), tensor.swizzle)[::16]
            rows = np.full(len(places), row)
            flat = m.shared.flat(places, rows, 16)  # [n]
            m.shared.start_copy(flat, 16, rows, np.full(len(flat), NO_WARP))
            mbarrier_at(m, int(flag)).copies.append((int(row), flat, data.reshape(-1, 16)))
            if m.counters is not None:
                m.counters.sectors["bulk copy"] += data.size // 32
                m.counters.sectors_needed["bulk copy"] += data.size // 32

    return run


def swizzled(at: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 and up of an address, exclusive or bits 7 and up: `mode` of them."""
    return at ^ ((at >> 7 & (1 << mode) - 1) << 4)


def _box(m: Machine, t: TensorMap, line: int, column: int, row: int) -> np.ndarray:
    """Bytes [box rows, box columns * item] at (line, column) of the tensor."""
    height, width = t.box
    data = np.zeros((height, width), UNSIGNED[t.item])
    if t.nan:
        data[:] = {2: 0x7FFF, 4: 0x7FFFFFFF}[t.item]
    top, bottom = max(line, 0), min(line + height, t.shape[0])
    left, right = max(column, 0), min(column + width, t.shape[1])
    if top < bottom and left < right:
        elements = np.arange(top, bottom)[:, None] * t.stride + np.arange(left, right)  # [rows, columns] inside
        addresses = (t.base + elements * t.item).astype(np.uint64).reshape(-1)
        who = stamp(m.numbers[row], m.shared.epoch[row], 0)
        found = m.memory.load(addresses, t.item, 1, np.full(len(addresses), who))[0]
        data[top - line : bottom - line, left - column : right - column] = found.reshape(elements.shape)
    return data.view(np.uint8)


def mbarrier_at(m: Machine, address: int) -> Mbarrier:
    if address not in m.mbarriers:
        raise Fault(f"the mbarrier at byte {address - BASE} of shared memory was not initialised")
    return m.mbarriers[address]


def mbarrier(i: Instruction) -> Execute:
    kind = i.opcode[1]
    place = next(j for j, x in enumerate(i.operands) if isinstance(x, Address))
    address = address_of(i.operands[place], np.uint32)
    number = reader_of(i.operands[place + 1], np.uint32) if len(i.operands) > place + 1 else lambda m: np.zeros((1, 1))
    action = {"init": _initialise, "inval": _invalidate, "arrive": _arrive, "wait": _wait}.get(kind)
    if action is None or (kind == "arrive" and "expect_tx" not in i.opcode and len(i.operands) > place + 1):
        raise NotImplementedError(f"PTX instruction {i.text}")
    return lambda m: action(m, address(m), number(m))


def _initialise(m: Machine, address: np.ndarray, number: np.ndarray) -> None:
    for row, at, arrivals in zip(*m.one_per_cta(address, number), strict=True):
        barrier = m.mbarriers.setdefault(int(at), Mbarrier(*np.zeros((4, m.C), np.int64)))
        barrier.expected[row], barrier.missing[row], barrier.bytes[row], barrier.phase[row] = arrivals, arrivals, 0, 0


def _invalidate(m: Machine, address: np.ndarray, _: np.ndarray) -> None:
    for row, at in zip(*m.one_per_cta(address), strict=True):
        barrier = mbarrier_at(m, int(at))
        barrier.expected[row] = 0
        if any(other == row for other, *_ in barrier.copies):
            raise Fault("mbarrier.inval while a bulk copy that signals it is under way")


def _arrive(m: Machine, address: np.ndarray, number: np.ndarray) -> None:
    for row, at, amount in zip(*m.one_per_cta(address, number), strict=True):
        barrier = mbarrier_at(m, int(at))
        if barrier.missing[row] == 0:
            raise Fault("more arrivals at an mbarrier than its phase takes")
        barrier.missing[row] -= 1
        barrier.bytes[row] += int(amount)
        barrier.advance(row)


def _wait(m: Machine, address: np.ndarray, parity: np.ndarray) -> None:
    """Bulk copies arrive when threads wait for them; a phase that then still misses something never completes."""
    active = np.flatnonzero(m.whole("a wait at an mbarrier", m.T)[:, 0])
    address, parity = (np.broadcast_to(x, (m.C, m.T))[:, 0] for x in (address, parity))
    for row in active:
        barrier = mbarrier_at(m, int(address[row]))
        if barrier.phase[row] % 2 == parity[row] and barrier.missing[row] == 0:
            for _, flat, data in (x for x in barrier.copies if x[0] == row):
                epochs, nobody = np.full(len(flat), AWAITED), np.full(len(flat), NO_WARP)
                m.shared.end_copy(flat, data, epochs, nobody)
                barrier.bytes[row] -= data.size
            barrier.copies = [x for x in barrier.copies if x[0] != row]
            barrier.advance(row)
        if barrier.phase[row] % 2 == parity[row]:
            missing = f"{barrier.missing[row]} arrivals and {barrier.bytes[row]} bytes are missing"
            raise Fault(f"program {m.numbers[row]} waits at an mbarrier forever: {missing}")
