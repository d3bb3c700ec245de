"""ld, st, atom, red and cp.async: between registers, global and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import TYPES, UNSIGNED
from ptx.machine import Execute, Lanes, Machine, address_of, reader_of
from ptx.reader import Instruction

HINTS = {"nc", "ca", "cg", "cs", "wb", "L1__evict_last", "L1__evict_first", "L1__no_allocate", "weak"}
COUNTS = {"v2": 2, "v4": 4, "v8": 8}


@dataclass(frozen=True)
class Access:
    """What a load or store moves in each thread."""

    space: str  # global, shared or param
    count: int  # elements
    dtype: str
    size: int  # bytes of an element

    @classmethod
    def of(cls, i: Instruction) -> Access:
        parts = [x.removesuffix("__cta") for x in i.opcode[1:-1]]
        space = next((x for x in parts if x in ("global", "shared", "param")), "")
        unknown = {*parts} - {space} - HINTS - {*COUNTS}
        if not space or unknown or i.opcode[-1] not in TYPES:
            raise NotImplementedError(f"PTX instruction {i.text}")
        count = next((COUNTS[x] for x in parts if x in COUNTS), 1)
        return cls(space, count, i.opcode[-1], np.dtype(TYPES[i.opcode[-1]]).itemsize)

    def count_global(self, m: Machine, kind: str, at: np.ndarray, lanes: Lanes) -> None:
        if m.counters is not None:
            m.counters.global_access(kind, at, self.size * self.count, lanes.index)

    def count_shared(self, m: Machine, kind: str, at: np.ndarray, lanes: Lanes) -> None:
        if m.counters is not None:
            m.counters.shared_access(kind, at, self.size * self.count, lanes.index)


def _tuple(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _parameter(i: Instruction, access: Access) -> Execute:
    target, name = _tuple(i.operands[0])[0], i.operands[1].base.name
    bits, size = 8 * access.size, access.size
    if access.count > 1 or i.operands[1].offset:
        raise NotImplementedError(f"PTX instruction {i.text}")

    def run(m: Machine) -> None:
        value = np.array([[m.parameters[name] & (1 << bits) - 1]], UNSIGNED[size])
        m.write(target, (value.view(f"i{size}") if access.dtype[0] == "s" else value).astype(TYPES[target.kind]))

    return run


def load(i: Instruction) -> Execute:
    access, targets = Access.of(i), _tuple(i.operands[0])
    size, count = access.size, access.count
    if access.space == "param":
        return _parameter(i, access)
    address = address_of(i.operands[1], np.uint64 if access.space == "global" else np.uint32)

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.of_lanes(address(m), lanes)  # [n]
        if access.space == "global":
            found = m.memory.load(at, size, count, m.stamps(lanes))
            access.count_global(m, "load", at, lanes)
        else:
            flat = m.shared.flat(at, lanes.row, size * count)
            found = m.shared.load(flat, size, count, lanes.row, lanes.warp)
            access.count_shared(m, "load", flat, lanes)
        for target, values in zip(targets, found, strict=True):
            m.write_lanes(target, lanes, values.view(f"i{size}") if access.dtype[0] == "s" else values)

    return run


def store(i: Instruction) -> Execute:
    access = Access.of(i)
    sources = [reader_of(x, UNSIGNED[access.size]) for x in _tuple(i.operands[1])]
    address = address_of(i.operands[0], np.uint64 if access.space == "global" else np.uint32)

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at, values = m.of_lanes(address(m), lanes), [m.of_lanes(source(m), lanes) for source in sources]  # [n]
        if access.space == "global":
            m.memory.store(at, values, m.stamps(lanes))
            access.count_global(m, "store", at, lanes)
        else:
            flat = m.shared.flat(at, lanes.row, access.size * access.count)
            m.shared.store(flat, values, lanes.row, lanes.warp)
            access.count_shared(m, "store", flat, lanes)

    return run


def atomic_add(i: Instruction) -> Execute:
    """atom.global.add.f32 and red.global.add.f32, with vectors; the order is that of the threads."""
    known = {"global", "gpu", "relaxed", "acq_rel", "add", *COUNTS}
    if set(i.opcode[1:-1]) - known or not {"global", "add"} <= {*i.opcode} or i.opcode[-1] != "f32":
        raise NotImplementedError(f"PTX instruction {i.text}")
    targets, address, values = i.operands if i.opcode[0] == "atom" else ((), *i.operands)
    sources = [reader_of(x, np.uint32) for x in _tuple(values)]
    address, access = address_of(address, np.uint64), Access("global", len(sources), "f32", 4)

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.of_lanes(address(m), lanes)  # [n]
        old = m.memory.add(at, [m.of_lanes(source(m), lanes) for source in sources], m.stamps(lanes))
        access.count_global(m, "atomic", at, lanes)
        for target, was in zip(_tuple(targets), old):
            m.write_lanes(target, lanes, was)

    return run


@dataclass
class _Copy:
    """cp.async of some threads, on its way."""

    at: np.ndarray  # [n] flat indices of shared memory
    data: np.ndarray  # [n, bytes]
    lanes: Lanes


def asynchronous_copy(i: Instruction, fill: int) -> Execute:
    """cp.async of 4 to 16 bytes a thread; where the optional size is 0, bytes `fill` instead of the source's."""
    if {*i.opcode[2:]} - {"ca", "cg", "shared", "global"} or len(i.operands) > 4:
        raise NotImplementedError(f"PTX instruction {i.text}")
    target, source = address_of(i.operands[0], np.uint32), address_of(i.operands[1], np.uint64)
    size = i.operands[2].bits  # bytes
    given = reader_of(i.operands[3], np.uint32) if len(i.operands) == 4 else lambda m: np.array([[size]], np.uint32)
    item = min(size, 8)
    access = Access("global", size // item, f"u{8 * item}", item)

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.shared.flat(m.of_lanes(target(m), lanes), lanes.row, size)
        wanted = m.of_lanes(given(m), lanes)  # [n]
        if not ((wanted == 0) | (wanted == size)).all():
            raise NotImplementedError("cp.async that fills a part of its bytes")
        m.shared.start_copy(at, size, lanes.row, lanes.warp)
        data, chosen = np.full((len(at), size), fill, np.uint8), np.flatnonzero(wanted)
        addresses, reading = m.of_lanes(source(m), lanes)[chosen], lanes[chosen]
        if len(chosen):
            found = m.memory.load(addresses, item, size // item, m.stamps(reading))
            data[chosen] = np.stack(found, 1).view(np.uint8)
            access.count_global(m, "cp.async", addresses, reading)
        m.copies.open.append(_Copy(at, data, lanes))

    return run


def deliver(m: Machine, copy: _Copy, now: np.ndarray) -> None:
    """The copy's bytes arrive in the CTAs `now` [C]: visible to the warp that copied, to others after a barrier."""
    chosen = now[copy.lanes.row]
    lanes = copy.lanes[chosen]
    m.shared.end_copy(copy.at[chosen], copy.data[chosen], m.shared.epoch[lanes.row], lanes.warp)
