"""Tensor-core instructions: mma.sync, ldmatrix and stmatrix, wgmma. Fragments lie in registers as PTX lays them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.arithmetic import UNSIGNED, bf16_to_f32, to_bits
from ptx.bulk import swizzled
from ptx.machine import Execute, Machine, address_of, reader_of
from ptx.memory import Fault
from ptx.reader import Instruction, Register


def _to_float64(halves: np.ndarray, kind: str) -> np.ndarray:
    """Products of such values, and sums of some, are exact."""
    return (bf16_to_f32(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)


def _fragment(m: Machine, registers: Sequence[Register], kind: str) -> np.ndarray:
    """Values [R, C, W, 8, 4, 2] of R registers with two 16-bit floats each; kept while the registers are unchanged."""
    key, arrays = (tuple(r.number for r in registers), kind), [m.read(r) for r in registers]
    kept = m.fragments.get(key)
    if kept is None or any(x is not y for x, y in zip(kept[0], arrays, strict=True)):
        bits = np.stack([np.broadcast_to(x, (m.C, m.T)) for x in arrays]).reshape(-1, m.C, m.W, 8, 4, 1)
        kept = m.fragments[key] = arrays, _to_float64(bits.view(np.uint16), kind)
    return kept[1]


def mma(i: Instruction) -> Execute:
    """D = A B + C for A [16, 16], B [16, 8]."""
    (d, a, b, c), kind = i.operands, i.opcode[-3]
    old = [reader_of(x, np.float32) for x in c]

    def run(m: Machine) -> None:
        m.whole("mma.sync", 32)
        left = _fragment(m, a, kind).reshape(2, 2, m.C, m.W, 8, 4, 2)  # quarters: by columns, by rows
        left = left.transpose(2, 3, 1, 4, 0, 5, 6).reshape(m.C, m.W, 16, 16)
        right = _fragment(m, b, kind).transpose(1, 2, 0, 4, 5, 3).reshape(m.C, m.W, 16, 8)
        product = np.matmul(left, right).reshape(m.C, m.W, 2, 8, 4, 2)
        for j, (before, new) in enumerate(zip(old, d, strict=True)):
            part = product[:, :, j >> 1, :, :, j & 1].reshape(m.C, m.T)
            m.write(new, to_bits((before(m) + part).astype(np.float32)))

    return run


def ldmatrix(i: Instruction) -> Execute:
    """ldmatrix and stmatrix: 8x8 matrices of 16 bits, whose rows the lanes' addresses name, one register each."""
    store, transposed = i.opcode[0] == "stmatrix", "trans" in i.opcode
    registers, where = i.operands[::-1] if store else i.operands
    address, lane = address_of(where), np.arange(32)
    row, column = (2 * (lane % 4), 2 * (lane // 4)) if transposed else (lane // 4, 4 * (lane % 4))  # bytes
    size = 2 if transposed else 4  # transposed, the second half of a register comes from the next row

    def run(m: Machine) -> None:
        m.whole(i.opcode[0], 32)
        lanes = m.lanes()
        starts = np.broadcast_to(address(m), (m.C, m.T)).reshape(-1, 32)  # [warps, 32]
        for j, register in enumerate(registers):
            at = [(starts[:, 8 * j + row + k] + column).reshape(-1)[lanes.index] for k in range(4 // size)]  # [n] each
            if store:
                value = m.of_lanes(m.read(register), lanes)
                for k, x in enumerate(at):
                    m.shared.store(x, [(value >> np.uint32(16 * k)).astype(UNSIGNED[size])], lanes)
            else:
                found = [m.shared.load(x, size, 1, lanes)[0].astype(np.uint32) for x in at]
                m.write_lanes(register, lanes, found[0] if size == 4 else found[0] | found[1] << np.uint32(16))
        using = lanes[lanes.index % 32 < 8 * len(registers)]
        m.count("shared", i.opcode[0], starts.reshape(-1)[using.index], 16, using)

    return run


def wgmma(i: Instruction) -> Execute:
    """D = A B, plus D where a predicate says so, for A [64, 16] and B [16, columns] of each group of four warps."""
    accumulators, a, b, keep, sign_a, sign_b, *transposed = i.operands
    if (sign_a, sign_b) != (1, 1) or isinstance(a, tuple):
        raise NotImplementedError(f"PTX instruction {i.text}")
    element, columns = i.opcode[-1], int(i.opcode[4].split("n")[1].split("k")[0])
    descriptors, keep = [reader_of(x, np.uint64) for x in (a, b)], reader_of(keep, np.bool_)

    def issue(m: Machine) -> None:
        m.whole("wgmma", m.T)
        given, kept = [descriptor(m) for descriptor in descriptors], keep(m)
        m.accumulating.update(r.number for r in accumulators)

        def finish(now: np.ndarray) -> None:
            """In the CTAs `now` [C]."""
            chosen = np.flatnonzero(now)
            x = _operand(m, given[0], chosen, 64, element, transposed[0])  # [n, groups, 64, 16]
            y = _operand(m, given[1], chosen, columns, element, transposed[1])  # [n, groups, columns, 16]
            product = np.zeros((m.C, m.W, 2, 8, columns // 8, 4, 2))  # of rows: warp, half, 8; of columns: 8, 4, 2
            product[chosen] = np.matmul(x, y.swapaxes(-1, -2)).reshape(-1, *product.shape[1:])
            saved, m.mask = m.mask, None if now.all() else now[:, None]
            for j, register in enumerate(accumulators):
                part = product[:, :, j >> 1 & 1, :, j >> 2, :, j & 1].reshape(m.C, m.T)
                if kept.any():
                    part = np.where(kept, m.read(register).view(np.float32) + part, part)
                m.write(register, to_bits(part.astype(np.float32)))
            m.mask = saved

        m.groups["wgmma"].open.append(finish)

    return issue


def _operand(m: Machine, descriptor: np.ndarray, chosen: np.ndarray, rows: int, element: str, transposed: int):
    """Values [n, groups, rows, 16] in the shared memory of CTAs `chosen` [n], through a descriptor per four warps."""
    descriptor = np.broadcast_to(descriptor, (m.C, m.T)).reshape(m.C, -1, 128)[chosen]
    if (descriptor != descriptor[..., :1]).any():
        raise Fault("threads of a warp group give different matrix descriptors")
    at = descriptor_bytes(descriptor[..., 0].astype(np.int64), rows, transposed)  # [n, groups, rows, 16]
    first = chosen[:, None] * m.T + np.arange(0, m.T, 128)  # threads [n, groups]
    readers = m.everyone[np.broadcast_to(first[..., None, None], at.shape).reshape(-1)]
    found = m.shared.load(at.reshape(-1), 2, 1, readers, "wgmma")[0]
    return _to_float64(found.reshape(at.shape), element)


def descriptor_bytes(d: np.ndarray, rows: int, transposed: int) -> np.ndarray:
    """Shared addresses [..., rows, 16] of the elements that the descriptors d [...] describe.

    In CUTLASS's terms: offsets between atoms of 8 rows (`stride`) and between atoms of `span` bytes (`leading`); the
    swizzle applies to the sum. Transposed, the rows of an atom are the operand's columns.
    """
    start, leading, stride = ((d >> low & 0x3FFF)[..., None, None] * 16 for low in (0, 16, 32))
    layouts, offsets = d >> 62 & 3, d >> 49 & 7
    layout = int(layouts.reshape(-1)[0])
    if layout == 0 or (layouts != layout).any() or offsets.any():
        raise NotImplementedError("matrix descriptors without a swizzle, with a base offset, or of several layouts")
    mode = 4 - layout
    span = 16 << mode  # bytes of a row of an atom
    r, k = np.arange(rows)[:, None], np.arange(16)[None]
    at = r % 8 * span + r // 8 * stride + k * 2
    if transposed:
        at = k % 8 * span + k // 8 * stride + r % (span // 2) * 2 + r // (span // 2) * leading
    return swizzled(start + at, mode)
