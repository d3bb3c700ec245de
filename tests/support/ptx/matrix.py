"""Tensor-core instructions: mma.sync, ldmatrix and stmatrix, wgmma. Fragments lie in registers as PTX lays them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.arithmetic import UNSIGNED, bf16_to_f32, to_bits
from ptx.bulk import swizzled
from ptx.global_memory import Fault
from ptx.machine import Execute, Machine, address_of, reader_of
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


def _left(m: Machine, registers: Sequence[Register], kind: str) -> np.ndarray:
    """A [C, W, 16, 16] from its four registers: each holds a quarter, of 8 rows and 8 columns."""
    quarters = _fragment(m, registers, kind).reshape(2, 2, m.C, m.W, 8, 4, 2)
    return quarters.transpose(2, 3, 1, 4, 0, 5, 6).reshape(m.C, m.W, 16, 16)


def mma(i: Instruction) -> Execute:
    """D = A B + C for A [16, 16], B [16, 8]."""
    (d, a, b, c), kind = i.operands, i.opcode[-3]
    if i.opcode[2:] not in [("aligned", "m16n8k16", "row", "col", "f32", x, x, "f32") for x in ("f16", "bf16")]:
        raise NotImplementedError(f"PTX instruction {i.text}")
    old = [reader_of(x, np.float32) for x in c]

    def run(m: Machine) -> None:
        m.whole("mma.sync", 32)
        right = _fragment(m, b, kind).transpose(1, 2, 0, 4, 5, 3).reshape(m.C, m.W, 16, 8)
        product = np.matmul(_left(m, a, kind), right).reshape(m.C, m.W, 2, 8, 4, 2)
        for j, (before, new) in enumerate(zip(old, d, strict=True)):
            part = product[:, :, j >> 1, :, :, j & 1].reshape(m.C, m.T)
            m.write(new, to_bits((before(m) + part).astype(np.float32)))

    return run


def ldmatrix(i: Instruction) -> Execute:
    """ldmatrix and stmatrix: 8x8 matrices of 16 bits, whose rows the lanes' addresses name, one register each."""
    store, transposed = i.opcode[0] == "stmatrix", "trans" in i.opcode
    registers, where = (i.operands[1], i.operands[0]) if store else (i.operands[0], i.operands[1])
    registers = registers if isinstance(registers, tuple) else (registers,)
    address, lane = address_of(where, np.uint32), np.arange(32)
    if "b16" not in i.opcode or "m8n8" not in i.opcode:
        raise NotImplementedError(f"PTX instruction {i.text}")
    row, column = (2 * (lane % 4), 2 * (lane // 4)) if transposed else (lane // 4, 4 * (lane % 4))  # bytes
    size = 2 if transposed else 4  # transposed, the second half of a register comes from the next row

    def run(m: Machine) -> None:
        lanes = m.everyone[np.repeat(m.whole(i.opcode[0], 32).reshape(-1), 32)]
        starts = np.broadcast_to(address(m), (m.C, m.T)).reshape(-1, 32)  # [warps, 32]
        for j, register in enumerate(registers):
            halves = range(4 // size)
            at = [(starts[:, 8 * j + row + k] + column.astype(np.uint32)).reshape(-1)[lanes.index] for k in halves]
            flat = [m.shared.flat(x, lanes.row, size) for x in at]
            if store:
                value = m.of_lanes(m.read(register), lanes)
                for k, x in enumerate(flat):
                    part = (value >> np.uint32(16 * k)).astype(UNSIGNED[size])
                    m.shared.store(x, [part], lanes.row, lanes.warp)
            else:
                found = [m.shared.load(x, size, 1, lanes.row, lanes.warp)[0].astype(np.uint32) for x in flat]
                m.write_lanes(register, lanes, found[0] if size == 4 else found[0] | found[1] << np.uint32(16))
        if m.counters is not None:
            using = lanes.index % 32 < 8 * len(registers)
            at = starts.reshape(-1)[lanes.index[using]].astype(np.int64)
            m.counters.shared_access(i.opcode[0], at, 16, lanes.index[using])

    return run


def wgmma(i: Instruction) -> Execute:
    kind = i.opcode[1]
    if kind == "fence":
        return lambda m: None
    if kind == "commit_group":
        return lambda m: m.commit(m.products)
    if kind == "wait_group":

        def wait(m: Machine) -> None:
            m.wait(m.products, i.operands[0].bits, lambda m, product, now: product(m, now))
            if not m.products.committed and not m.products.open:
                m.accumulating.clear()

        return wait
    if kind != "mma_async" or i.opcode[5:] not in [("f32", x, x) for x in ("f16", "bf16")]:
        raise NotImplementedError(f"PTX instruction {i.text}")
    return _multiply(i)


def _multiply(i: Instruction) -> Execute:
    """D = A B, plus D where a predicate says so, for A [64, 16] and B [16, columns] of each group of four warps."""
    accumulators, a, b, keep, *signs_and_transposes = i.operands
    bits = [x.bits for x in signs_and_transposes]
    if bits[:2] != [1, 1]:
        raise NotImplementedError(f"PTX instruction {i.text}")
    element, columns = i.opcode[-1], int(i.opcode[4].split("n")[1].split("k")[0])
    in_registers = isinstance(a, tuple)
    left, right = None if in_registers else reader_of(a, np.uint64), reader_of(b, np.uint64)
    left_transposed, right_transposed = (0, bits[2]) if in_registers else bits[2:]
    keep = reader_of(keep, np.bool_)

    def issue(m: Machine) -> None:
        m.whole("wgmma", m.T)
        descriptors, kept = (None if in_registers else left(m), right(m)), keep(m)
        m.accumulating.update(r.number for r in accumulators)

        def finish(m: Machine, now: np.ndarray) -> None:
            """In the CTAs `now` [C]."""
            chosen, groups = np.flatnonzero(now), m.W // 4
            if in_registers:
                x = _left(m, a, element).reshape(m.C, groups, 64, 16)[chosen]  # [n, groups, 64, 16]
            else:
                x = _operand(m, descriptors[0], chosen, 64, element, left_transposed)  # [n, groups, 64, 16]
            y = _operand(m, descriptors[1], chosen, columns, element, right_transposed)  # [n, groups, columns, 16]
            product = np.zeros((m.C, m.W, 2, 8, columns // 8, 4, 2))  # of rows: warp, half, 8; of columns: 8, 4, 2
            product[chosen] = np.matmul(x, y.swapaxes(-1, -2)).reshape(-1, *product.shape[1:])
            saved, m.mask = m.mask, None if now.all() else now[:, None]
            for j, register in enumerate(accumulators):
                part = product[:, :, j >> 1 & 1, :, j >> 2, :, j & 1].reshape(m.C, m.T)
                if kept.any():
                    part = np.where(kept, m.read(register).view(np.float32) + part, part)
                m.write(register, to_bits(part.astype(np.float32)))
            m.mask = saved

        m.products.open.append(finish)

    return issue


def _operand(
    m: Machine, descriptor: np.ndarray, chosen: np.ndarray, rows: int, element: str, transposed: int
) -> np.ndarray:
    """Values [n, groups, rows, 16] in the shared memory of CTAs `chosen` [n], through a descriptor per four warps."""
    descriptor = np.broadcast_to(descriptor, (m.C, m.T)).reshape(m.C, -1, 128)[chosen]
    if (descriptor != descriptor[..., :1]).any():
        raise Fault("threads of a warp group give different matrix descriptors")
    at = descriptor_bytes(descriptor[..., 0].astype(np.int64), rows, transposed)  # [n, groups, rows, 16]
    owners = np.broadcast_to(chosen[:, None, None, None], at.shape).reshape(-1)
    first_warps = np.broadcast_to(4 * np.arange(m.W // 4)[:, None, None], at.shape).reshape(-1).astype(np.int16)
    flat = m.shared.flat(at.reshape(-1), owners, 2)
    m.shared.note_asynchronous_read(flat, owners, first_warps)
    return _to_float64(m.shared.views[2][flat >> 1].reshape(at.shape), element)


def descriptor_bytes(d: np.ndarray, rows: int, transposed: int) -> np.ndarray:
    """Shared addresses [..., rows, 16] of the elements that the descriptors d [...] describe.

    In CUTLASS's terms: offsets between atoms of 8 rows (`stride`) and between atoms of `span` bytes (`leading`); the
    swizzle applies to the sum. Transposed, the rows of an atom are the operand's columns.
    """
    start, leading, stride = ((d >> low & 0x3FFF)[..., None, None] * 16 for low in (0, 16, 32))
    modes, offsets = d.view(np.uint64) >> np.uint64(62), d >> 49 & 7
    if (modes != modes.reshape(-1)[0]).any() or offsets.any():
        raise NotImplementedError("matrix descriptors with a base offset, or of several layouts")
    mode = (0, 3, 2, 1)[int(modes.reshape(-1)[0])]
    span = 16 << mode  # bytes of a row of an atom
    r, k = np.arange(rows)[:, None], np.arange(16)[None]
    if mode and transposed:
        at = k % 8 * span + k // 8 * stride + r % (span // 2) * 2 + r // (span // 2) * leading
    elif mode:
        at = r % 8 * span + r // 8 * stride + k * 2
    elif transposed:
        at = k % 8 * 16 + k // 8 * leading + r % 8 * 2 + r // 8 * stride
    else:
        at = r % 8 * 16 + r // 8 * stride + k // 8 * leading + k % 8 * 2
    return swizzled(start + at, mode)
