"""Turns instructions into functions of a machine: registers, control, threads of a warp, barriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import arithmetic, bulk, matrix, transfers
from ptx.arithmetic import TYPES, to_bits
from ptx.machine import Code, Execute, Machine, reader_of
from ptx.reader import Immediate, Instruction, Kernel, Register

Place = tuple[int, int]  # line and column of the Python source


def translate(kernel: Kernel, unfilled: frozenset[Place] = frozenset()) -> Code:
    """`unfilled`: places of masked loads without `other`, whose masked-off elements are anything."""
    return [[(i, _guarded(i, _execute(i, i.place[1:] in unfilled))) for i in b.instructions] for b in kernel.blocks]


def _execute(i: Instruction, unfilled: bool) -> Execute | None:
    name = i.opcode[0]
    if name in ("bra", "ret"):
        return None
    if name == "mov" and unfilled and i.opcode[1].startswith("u") and _is_zero(i.operands[1]):
        # The compiler writes 0 before a masked load, as the interpreter does; Triton promises nothing.
        return _move(Instruction(None, False, i.opcode, [i.operands[0], Immediate(-1)], i.place, i.text))
    if name == "cp" and i.opcode[2] in ("ca", "cg"):
        return transfers.asynchronous_copy(i, 0xFF if unfilled else 0)
    build = BUILDERS.get(name) or (_arithmetic if name in arithmetic.FUNCTIONS else None)
    if build is None:
        raise NotImplementedError(f"PTX instruction {i.text}")
    return build(i)


def _is_zero(operand) -> bool:
    return isinstance(operand, Immediate) and operand.bits == 0


def _guarded(i: Instruction, execute: Execute | None) -> Execute | None:
    if execute is None or i.guard is None:
        return execute
    register, negated = i.guard, i.negated

    def run(m: Machine) -> None:
        saved, guard = m.mask, m.read(register) ^ negated
        if guard.all():
            return execute(m)
        m.mask = guard if saved is None else saved & guard
        if m.mask.any():
            execute(m)
        m.mask = saved

    return run


def _arithmetic(i: Instruction) -> Execute:
    f, dtype, target = arithmetic.function(i.opcode), TYPES[i.opcode[-1]], i.operands[0]
    kinds = [dtype] * (len(i.operands) - 1)
    if i.opcode[0] in ("shl", "shr"):
        kinds[1] = np.uint32
    if i.opcode[0] == "bfe":
        kinds[1:] = [np.uint32, np.uint32]
    if "wide" in i.opcode and len(kinds) == 3:
        kinds[2] = arithmetic.WIDER[dtype]
    sources = [reader_of(x, kind) for x, kind in zip(i.operands[1:], kinds)]
    return lambda m: m.write(target, to_bits(f(*(source(m) for source in sources))))


def _move(i: Instruction) -> Execute:
    target, source = i.operands
    dtype = np.dtype(TYPES[target.kind] if isinstance(target, Register) else TYPES[i.opcode[-1]])
    if isinstance(source, tuple):
        return _pack(target, source, dtype)
    value = reader_of(source, dtype)
    if not isinstance(target, tuple):
        return lambda m: m.write(target, value(m))
    size = dtype.itemsize // len(target)

    def unpack(m: Machine) -> None:
        whole = value(m)
        for j, x in enumerate(target):
            if isinstance(x, Register):
                m.write(x, (whole >> dtype.type(8 * size * j)).astype(f"u{size}"))

    return unpack


def _pack(target: Register, parts: tuple, dtype: np.dtype) -> Execute:
    size = dtype.itemsize // len(parts)
    readers = [reader_of(x, f"u{size}") for x in parts]

    def pack(m: Machine) -> None:
        total = readers[0](m).astype(dtype)
        for j, part in enumerate(readers[1:], 1):
            total = total | part(m).astype(dtype) << dtype.type(8 * size * j)
        m.write(target, total)

    return pack


def _compare(i: Instruction) -> Execute:
    """setp, with or without a predicate that the comparison is joined with."""
    relation, *joint = i.opcode[1:-1]
    joint = [x for x in joint if x != "ftz"]
    f, dtype, target = arithmetic.relation(relation, i.opcode[-1]), TYPES[i.opcode[-1]], i.operands[0]
    if "ftz" in i.opcode or i.opcode[-1] in ("bf16", "bf16x2", "f16x2") or not isinstance(target, Register):
        raise NotImplementedError(f"PTX instruction {i.text}")
    a, b = (reader_of(x, dtype) for x in i.operands[1:3])
    if not joint:
        return lambda m: m.write(target, f(a(m), b(m)))
    join, third = arithmetic.FUNCTIONS[joint[0]], reader_of(i.operands[3], np.bool_)
    return lambda m: m.write(target, join(f(a(m), b(m)), third(m)))


def _select(i: Instruction) -> Execute:
    target, dtype = i.operands[0], TYPES[i.opcode[-1]]
    a, b, condition = (reader_of(x, kind) for x, kind in zip(i.operands[1:], (dtype, dtype, np.bool_)))
    return lambda m: m.write(target, to_bits(np.where(condition(m), a(m), b(m))))


def _convert(i: Instruction) -> Execute:
    if i.opcode[0] == "cvta":  # all addresses are generic
        return _move(i)
    f, target = arithmetic.conversion(i.opcode), i.operands[0]
    sources = [reader_of(x, TYPES[i.opcode[-1]]) for x in i.operands[1:]]
    dtype, signed = TYPES[target.kind], i.opcode[-2][0] == "s"

    def run(m: Machine) -> None:
        found = f(*(source(m) for source in sources))
        m.write(target, (found.view(f"i{found.dtype.itemsize}") if signed else found).astype(dtype))

    return run


def _shuffle(i: Instruction) -> Execute:
    mode = i.opcode[2]
    targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    value, by, clamp = (reader_of(x, np.uint32) for x in i.operands[1:4])
    lane = np.arange(32)

    def run(m: Machine) -> None:
        m.whole("a shuffle", 32)
        step = np.broadcast_to(by(m), (m.C, m.T)).reshape(m.C, m.W, 32).astype(np.int64)
        limit = int(clamp(m).reshape(-1)[0])
        segment = limit >> 8 & 31
        first, last = (
            lane & segment,
            (lane & segment) | (limit & 31 & ~segment),
        )  # of the lane's segment; up: first twice
        source = {"bfly": lane ^ step, "idx": first | (step & 31 & ~segment), "up": lane - step, "down": lane + step}[
            mode
        ]
        valid = source >= last if mode == "up" else source <= last
        x = np.broadcast_to(value(m), (m.C, m.T)).reshape(m.C, m.W, 32)
        m.write(targets[0], np.take_along_axis(x, np.where(valid, source, lane), -1).reshape(m.C, m.T))
        if len(targets) > 1:
            m.write(targets[1], valid.reshape(m.C, m.T))

    return run


def _warp_sum(i: Instruction) -> Execute:
    """redux.sync.add"""
    target, value, members = i.operands[0], *(reader_of(x, np.uint32) for x in i.operands[1:])
    if i.opcode[2:] not in [("add", "s32"), ("add", "u32")]:
        raise NotImplementedError(f"PTX instruction {i.text}")

    def run(m: Machine) -> None:
        m.whole("redux.sync", 32)
        if (members(m) != 0xFFFFFFFF).any():
            raise NotImplementedError("redux.sync of a part of a warp")
        x = np.broadcast_to(value(m), (m.C, m.T)).reshape(m.C, m.W, 32)
        m.write(target, np.repeat(x.sum(-1, dtype=np.uint32), 32, 1))

    return run


def _elect(i: Instruction) -> Execute:
    leader, predicate = i.operands[0]

    def run(m: Machine) -> None:
        m.whole("elect.sync", 32)
        if isinstance(leader, Register):
            m.write(leader, np.zeros((1, 1), np.uint32))
        m.write(predicate, (np.arange(m.T) % 32 == 0)[None])

    return run


def _barrier(i: Instruction) -> Execute:
    if i.opcode[:2] == ("bar", "warp"):

        def converge(m: Machine) -> None:
            m.whole("bar.warp.sync", 32)

        return converge
    if len(i.operands) != 1 or not isinstance(i.operands[0], Immediate):
        raise NotImplementedError(f"PTX instruction {i.text}")

    def run(m: Machine) -> None:
        passing = m.whole("bar.sync", m.T)[:, 0]
        m.shared.epoch[passing] += 1
        if m.counters is not None:
            m.counters.barriers += int(passing.sum())

    return run


def _fence(i: Instruction) -> Execute:
    def run(m: Machine) -> None:
        if i.opcode[:3] == ("fence", "proxy", "async"):
            lanes = m.lanes()
            m.shared.fences[lanes.row, lanes.warp] += 1

    return run


BUILDERS: dict[str, Callable[[Instruction], Execute]] = {
    "mov": _move, "setp": _compare, "selp": _select, "cvt": _convert, "cvta": _convert, "shfl": _shuffle,
    "redux": _warp_sum, "elect": _elect, "bar": _barrier, "barrier": _barrier, "fence": _fence, "membar": _fence,
    "griddepcontrol": _fence, "ld": transfers.load, "st": transfers.store,
    "atom": transfers.atomic_add, "red": transfers.atomic_add, "cp": bulk.copy, "mbarrier": bulk.mbarrier,
    "mma": matrix.mma, "ldmatrix": matrix.ldmatrix, "stmatrix": matrix.ldmatrix, "wgmma": matrix.wgmma,
}  # fmt: skip
