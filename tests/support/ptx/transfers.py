"""ld, st, atom, red and cp.async: between registers, global and shared memory."""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import TYPES
from ptx.machine import Execute, Machine, address_of, reader_of
from ptx.reader import Instruction


def _tuple(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _form(i: Instruction) -> tuple[str, np.dtype]:
    """Space, and the integer that an element is: signed where it must be extended."""
    space = next(x for x in ("global", "shared", "param") if x in i.name)
    return space, np.dtype(f"{'i' if i.opcode[-1][0] == 's' else 'u'}{np.dtype(TYPES[i.opcode[-1]]).itemsize}")


def load(i: Instruction) -> Execute:
    (space, dtype), targets, place = _form(i), _tuple(i.operands[0]), i.operands[1]
    address, size = address_of(place), dtype.itemsize

    def parameter(m: Machine) -> None:
        value = m.parameters[place.base] & (1 << 8 * size) - 1
        m.write(targets[0], np.array([[value]], f"u{size}").view(dtype).astype(TYPES[targets[0].kind]))

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.of_lanes(address(m), lanes)  # [n]
        found = m.space(space).load(at, size, len(targets), lanes)
        m.count(space, "load", at, size * len(targets), lanes)
        for target, values in zip(targets, found, strict=True):
            m.write_lanes(target, lanes, values.view(dtype))

    return parameter if space == "param" else run


def store(i: Instruction) -> Execute:
    (space, dtype), address = _form(i), address_of(i.operands[0])
    sources = [reader_of(x, f"u{dtype.itemsize}") for x in _tuple(i.operands[1])]

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.of_lanes(address(m), lanes)  # [n]
        m.space(space).store(at, [m.of_lanes(source(m), lanes) for source in sources], lanes)
        m.count(space, "store", at, dtype.itemsize * len(sources), lanes)

    return run


def atomic_add(i: Instruction) -> Execute:
    """atom and red, with vectors; the order is that of the threads."""
    targets, address, values = i.operands if i.opcode[0] == "atom" else ((), *i.operands)
    sources, address = [reader_of(x, np.uint32) for x in _tuple(values)], address_of(address)

    def run(m: Machine) -> None:
        lanes = m.lanes()
        at = m.of_lanes(address(m), lanes)  # [n]
        old = m.memory.add(at, [m.of_lanes(source(m), lanes) for source in sources], lanes)
        m.count("global", "atomic", at, 4 * len(sources), lanes)
        for target, was in zip(_tuple(targets), old):
            m.write_lanes(target, lanes, was)

    return run


def asynchronous_copy(i: Instruction) -> Execute:
    """cp.async of 4 to 16 bytes a thread; where the optional size is 0, zeros, or poison if nobody asked for them."""
    target, source, size, *given = i.operands
    target, source, given = address_of(target), address_of(source), reader_of(*(given or [size]), np.uint32)
    item = min(size, 8)  # bytes

    def run(m: Machine) -> None:
        lanes = m.lanes()
        wanted = m.of_lanes(given(m), lanes)  # [n]
        if not ((wanted == 0) | (wanted == size)).all():
            raise NotImplementedError("cp.async that fills a part of its bytes")
        at = m.shared.start_copy(m.of_lanes(target(m), lanes), size, lanes)
        data, chosen = np.full((len(at), size), 0xFF * i.unfilled, np.uint8), np.flatnonzero(wanted)
        if len(chosen):
            addresses, reading = m.of_lanes(source(m), lanes)[chosen], lanes[chosen]
            data[chosen] = np.stack(m.memory.load(addresses, item, size // item, reading), 1).view(np.uint8)
            m.count("global", "cp.async", addresses, size, reading)

        def deliver(now: np.ndarray) -> None:
            """In the CTAs `now` [C]: visible to the warp that copied, to others after a barrier."""
            due = now[lanes.row]
            m.shared.end_copy(at[due], data[due], m.everyone.stamp[lanes.index[due]])

        m.groups["cp"].open.append(deliver)

    return run


def group(i: Instruction) -> Execute:
    """commit_group and wait_group, of cp.async, of bulk copies and of wgmma."""
    kind = "bulk" if "bulk" in i.opcode else i.opcode[0]
    if "commit_group" in i.opcode:
        return lambda m: m.commit(m.groups[kind])
    return lambda m: m.wait(m.groups[kind], i.operands[0])
