"""Turns instructions into functions of a machine: registers, control, threads of a warp, barriers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx import arithmetic, bulk, matrix, transfers
from ptx.arithmetic import TYPES, to_bits
from ptx.machine import Code, Execute, Machine, reader_of
from ptx.memory import BARRIER, WARP
from ptx.reader import Instruction, Kernel, Register

Place = tuple[int, int]  # line and column of the Python source


def translate(kernel: Kernel, unfilled: frozenset[Place] = frozenset()) -> Code:
    """`unfilled`: places of masked loads without `other`, whose masked-off elements are anything."""
    for i in (i for block in kernel.blocks for i in block.instructions):
        i.unfilled = i.place[1:] in unfilled
    return [[(i, _guarded(i, _execute(i))) for i in block.instructions] for block in kernel.blocks]


def _execute(i: Instruction) -> Execute | None:
    if i.opcode[0] in ("bra", "ret"):
        return None
    for pattern, build in MODELLED.items():
        if re.fullmatch(pattern, i.name):
            return build(i)
    raise NotImplementedError(f"PTX instruction {i.text}")


def _guarded(i: Instruction, execute: Execute | None) -> Execute | None:
    if execute is None or i.guard is None:
        return execute

    def run(m: Machine) -> None:
        saved, guard = m.mask, m.read(i.guard) ^ i.negated
        if guard.all():
            return execute(m)
        m.mask = guard if saved is None else saved & guard
        if m.mask.any():
            execute(m)
        m.mask = saved

    return run


def _compute(i: Instruction) -> Execute:
    """All that only touches registers: the first operand is a function of the others."""
    f, (target, *sources), name, dtype = arithmetic.function(i.opcode), i.operands, i.opcode[0], i.opcode[-1]
    if not isinstance(target, Register):  # two predicates
        raise NotImplementedError(f"PTX instruction {i.text}")
    kinds: list = [TYPES[dtype]] * len(sources)
    if name in ("shl", "shr", "bfe"):
        kinds[1:] = [np.uint32] * (len(sources) - 1)
    elif name == "selp":
        kinds[2] = np.bool_
    elif i.opcode[:2] == ("mad", "wide"):
        kinds[2] = arithmetic.WIDER[dtype]
    sources = [reader_of(x, kind) for x, kind in zip(sources, kinds, strict=True)]
    return lambda m: m.write(target, to_bits(f(*(source(m) for source in sources))))


def _move(i: Instruction) -> Execute:
    """mov and cvta, since all addresses are generic. The halves of a register go in braces, the lower one first."""
    target, source = i.operands
    if i.unfilled and source == 0 and i.opcode[1][0] == "u":
        source = -1  # the compiler writes 0 before a masked load, as the interpreter does; Triton promises nothing
    dtype = np.dtype(TYPES[target.kind] if isinstance(target, Register) else TYPES[i.opcode[-1]])
    half, shift = f"u{dtype.itemsize // 2}", dtype.type(4 * dtype.itemsize)
    if isinstance(source, tuple):

        def join(m: Machine) -> None:
            """A half that nothing was written to, which LLVM adds where the other is taken out alone, is all ones."""
            for x in source:
                if isinstance(x, Register) and m.registers[x.number] is None:
                    m.registers[x.number] = ~np.zeros((1, 1), half)
            low, high = (read(m).astype(dtype) for read in readers)
            m.write(target, low | high << shift)

        readers = [reader_of(x, half) for x in source]
        return join
    value = reader_of(source, dtype)
    if isinstance(target, Register):
        return lambda m: m.write(target, value(m))

    def split(m: Machine) -> None:
        whole = value(m)
        for register, part in zip(target, (whole, whole >> shift), strict=True):
            if isinstance(register, Register):
                m.write(register, part.astype(half))

    return split


def _shuffle(i: Instruction) -> Execute:
    """Among all lanes of a warp; one whose source is beyond the warp keeps its own value."""
    mode, target, (value, by) = i.opcode[2], i.operands[0], (reader_of(x, np.uint32) for x in i.operands[1:3])
    if not isinstance(target, Register) or i.operands[3:] != [0 if mode == "up" else 31, -1]:
        raise NotImplementedError(f"PTX instruction {i.text}")
    lane = np.arange(32)

    def run(m: Machine) -> None:
        m.whole("a shuffle", 32)
        x, step = (np.broadcast_to(operand(m), (m.C, m.T)).reshape(m.C, m.W, 32) for operand in (value, by))
        step = step.astype(np.int64)
        source = {"bfly": lane ^ step, "idx": step & 31, "up": lane - step, "down": lane + step}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        m.write(target, np.take_along_axis(x, source, -1).reshape(m.C, m.T))

    return run


def _warp_sum(i: Instruction) -> Execute:
    """redux.sync.add"""
    target, value, members = i.operands[0], *(reader_of(x, np.uint32) for x in i.operands[1:])

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
        if leader != "_":
            m.write(leader, np.zeros((1, 1), np.uint32))
        m.write(predicate, (np.arange(m.T) % 32 == 0)[None])

    return run


def _barrier(i: Instruction) -> Execute:
    if i.operands != [0]:
        raise NotImplementedError(f"PTX instruction {i.text}")

    def run(m: Machine) -> None:
        passing = m.whole("bar.sync", m.T)[:, 0]
        m.everyone.stamp.reshape(m.C, m.T)[passing] += BARRIER
        if m.counters is not None:
            m.counters.barriers += int(passing.sum())

    return run


def _fence(i: Instruction) -> Execute:
    """fence.proxy.async"""

    def run(m: Machine) -> None:
        lanes = m.lanes()
        m.shared.fences[lanes.row, lanes.stamp & WARP] += 1

    return run


# What is modelled, as patterns of whole opcodes. Anything else is refused by name.
HINT = r"(\.(nc|ca|cg|cs|wb|L1::\w+))*"
KIND = r"\.(v[248]\.)?[bsuf](8|16|32|64)"
MODELLED: dict[str, Callable[[Instruction], Execute]] = {
    **dict.fromkeys(arithmetic.MODELLED, _compute),
    r"mov\.(pred|[bsuf](16|32|64))|cvta(\.to)?\.(param|global|shared)\.u64": _move,
    r"shfl\.sync\.(bfly|idx|up|down)\.b32": _shuffle,
    r"redux\.sync\.add\.[su]32": _warp_sum,
    r"elect\.sync": _elect,
    r"bar\.sync": _barrier,
    r"bar\.warp\.sync": lambda i: lambda m: m.whole("bar.warp.sync", 32),
    r"fence\.proxy\.async(\.shared::cta)?": _fence,
    r"wgmma\.fence\.sync\.aligned": lambda i: lambda m: None,
    rf"ld\.(param|global|shared){HINT}{KIND}": transfers.load,
    rf"st\.(global|shared){HINT}{KIND}": transfers.store,
    r"(atom|red)\.global(\.gpu)?(\.relaxed|\.acq_rel)?\.add(\.v[248])?\.f32": transfers.atomic_add,
    r"cp\.async\.c[ag]\.shared\.global": transfers.asynchronous_copy,
    r"(cp\.async(\.bulk)?|wgmma)\.(commit|wait)_group(\.read)?(\.sync\.aligned)?": transfers.group,
    r"cp\.async\.bulk\.tensor\.2d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes": bulk.copy,
    r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group": bulk.store,
    r"mbarrier\.(init|inval|arrive\.expect_tx|wait\.parity)\.shared(::cta)?\.b64": bulk.mbarrier,
    r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": matrix.ldmatrix,
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32": matrix.mma,
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(f16\.f16|bf16\.bf16)": matrix.wgmma,
}
