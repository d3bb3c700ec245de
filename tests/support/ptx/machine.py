"""Runs a kernel for some programs (CTAs) of a grid, all their threads in lock-step.

C CTAs of T threads run together. A register is an array [C, T], or one that broadcasts to it: what depends on the CTA
alone stays [C, 1], on the thread alone [1, T]. Where threads take different branches, both sides run one after the
other under a mask, until the branches meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import TYPES
from ptx.counters import Counters
from ptx.memory import BASE, Fault, GlobalMemory, Lanes, SharedMemory, stamp
from ptx.reader import Address, Instruction, Kernel, Operand, Register

Execute = Callable[["Machine"], None]
Code = list[list[tuple[Instruction, Execute | None]]]  # by block; None for branches and returns
THREADS_TOGETHER = 8192


@dataclass
class Groups:
    """Asynchronous operations of one kind: functions that finish one in the CTAs that they are given, [C] bool."""

    open: list[Callable[[np.ndarray], None]] = field(default_factory=list)  # issued and not committed
    committed: list[tuple[list, np.ndarray]] = field(default_factory=list)  # and where they are pending; oldest first


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        code: Code,
        programs: np.ndarray,  # [C, 3] their coordinates in the grid
        grid: tuple[int, int, int],
        parameters: dict,  # name -> int or TensorMap
        memory: GlobalMemory,
        shared: int,  # bytes
        counters: Counters | None,
    ):
        self.kernel, self.code, self.grid, self.parameters = kernel, code, grid, parameters
        self.C, self.T, self.W = len(programs), kernel.threads, kernel.threads // 32
        self.programs = programs
        self.numbers = programs[:, 0] + grid[0] * (programs[:, 1] + grid[1] * programs[:, 2])  # [C]
        self.registers: list[np.ndarray | None] = [None] * kernel.registers
        self.mask: np.ndarray | None = None  # broadcasts to [C, T] bool; None: all
        self.memory, self.shared = memory, SharedMemory(self.C, shared)
        self.counters = counters
        self.groups = {"cp": Groups(), "bulk": Groups(), "wgmma": Groups()}
        self.accumulating: set[int] = set()  # registers of a wgmma that was not awaited
        self.mbarriers: dict = {}  # by CTA and shared address
        self.fragments: dict = {}  # matrix operands already converted, see matrix.py
        index = np.arange(self.C * self.T)
        row = index // self.T
        self.everyone = Lanes(index, row, stamp(self.numbers[row], index % self.T // 32))

    # --- control flow

    def run(self) -> None:
        blocks = self.kernel.blocks
        end = len(blocks)
        stack: list[list] = [[0, end, None]]  # block to run, block at which to stop, mask
        with np.errstate(all="ignore"):
            while stack:
                number, stop, self.mask = stack[-1]
                if number in (stop, end):
                    stack.pop()
                    continue
                condition, block, active = self._run_block(number), blocks[number], self.active()
                taken, other = block.successors[0], block.successors[-1]
                if condition is None or (condition | ~active).all():
                    stack[-1][0] = taken
                elif not (condition & active).any():
                    stack[-1][0] = other
                else:
                    stack[-1][0] = block.meeting
                    stack.append([other, block.meeting, active & ~condition])
                    stack.append([taken, block.meeting, active & condition])
        if self.groups["bulk"].open or self.groups["bulk"].committed:
            raise Fault(f"{self.kernel.name} ends while a bulk copy reads its shared memory")

    def _run_block(self, number: int) -> np.ndarray | None:
        """Execute; return what the branch at its end depends on, or None."""
        for instruction, execute in self.code[number]:
            try:
                if self.counters is not None:
                    self.counters.issued(instruction.name, int(self.active().reshape(-1, 32).any(-1).sum()))
                if execute is None:
                    guard = instruction.guard
                    return None if guard is None else self.read(guard) ^ instruction.negated
                if self.accumulating and instruction.opcode[0] != "wgmma":
                    touched = [r.name for r in instruction.registers if r.number in self.accumulating]
                    if touched:
                        raise Fault(f"uses {touched[0]}, into which a wgmma that was not awaited accumulates")
                execute(self)
            except Fault as fault:
                raise self._located(instruction, fault) from fault
        return None

    def _located(self, instruction: Instruction, fault: Fault) -> Fault:
        text = str(fault)
        if fault.lane is not None:
            lanes = self.lanes()
            lane = fault.lane if fault.lane < len(lanes.index) else 0
            text = f"program {self.numbers[lanes.row[lane]]}, thread {lanes.index[lane] % self.T}: {text}"
        file, line, _ = instruction.place
        return Fault(f"{self.kernel.name}, {file}:{line}: {text}\n    {instruction.text[:160]}")

    # --- registers and threads

    def read(self, register: Register) -> np.ndarray:
        value = self.registers[register.number]
        if value is None:
            raise Fault(f"reads {register.name} before anything is written to it")
        return value

    def write(self, register: Register, value: np.ndarray) -> None:
        """Bits that broadcast to [C, T], in the active threads; what the others never wrote stays all ones."""
        if self.mask is not None:
            old = self.registers[register.number]
            value = np.where(self.mask, value, ~np.zeros((1, 1), value.dtype) if old is None else old)
        self.registers[register.number] = value

    def write_lanes(self, register: Operand, lanes: Lanes, values: np.ndarray) -> None:
        """Values [n] of the active threads, into their register or the sink."""
        if isinstance(register, Register):
            full = np.empty(self.C * self.T, TYPES[register.kind])
            full[lanes.index] = values
            self.write(register, full.reshape(self.C, self.T))

    def active(self) -> np.ndarray:
        """[C, T] bool"""
        return np.broadcast_to(True if self.mask is None else self.mask, (self.C, self.T))

    def lanes(self) -> Lanes:
        """Active threads."""
        return self.everyone if self.mask is None else self.everyone[np.flatnonzero(self.active())]

    def of_lanes(self, value: np.ndarray, lanes: Lanes) -> np.ndarray:
        """A register's values [n] in these threads."""
        full = np.broadcast_to(value, (self.C, self.T)).reshape(-1)
        return full if lanes is self.everyone else full[lanes.index]

    def whole(self, what: str, unit: int) -> np.ndarray:
        """[C, T / unit] bool: which warps or CTAs are active; none may be in part."""
        parts = self.active().reshape(self.C, -1, unit)
        some = parts.any(-1)
        if (some & ~parts.all(-1)).any():
            raise Fault(f"{what} that not all {unit} threads reach")
        return some

    def one_per_cta(self, *values: np.ndarray) -> list[tuple[int, ...]]:
        """(CTA, values of registers in its active thread) where there is one; there must not be more."""
        lanes = self.lanes()
        if len(np.unique(lanes.row)) != len(lanes.row):
            raise Fault("several threads of a CTA issue what one should")
        return list(zip(lanes.row.tolist(), *(self.of_lanes(x, lanes).tolist() for x in values), strict=True))

    def space(self, name: str) -> GlobalMemory | SharedMemory:
        return self.memory if name == "global" else self.shared

    def count(self, space: str, kind: str, at: np.ndarray, size: int, lanes: Lanes) -> None:
        """`size` bytes at addresses [n] for the counters, if there are any."""
        if self.counters is not None:
            count = self.counters.global_access if space == "global" else self.counters.shared_access
            count(kind, at, size, lanes.index)

    # --- asynchronous operations

    def commit(self, groups: Groups) -> None:
        groups.committed.append((groups.open, self.whole("a commit", self.T)[:, 0]))
        groups.open = []

    def wait(self, groups: Groups, allowed: int) -> None:
        """Finish, oldest first, all groups of the active CTAs but the `allowed` newest."""
        active, newer, due = self.whole("a wait", self.T)[:, 0], np.zeros(self.C, int), []
        for members, pending in reversed(groups.committed):
            due.insert(0, (members, pending, pending & active & (newer >= allowed)))
            newer += pending
        for members, _, now in due:
            if now.any():
                for finish in members:
                    finish(now)
        groups.committed = [(members, pending & ~now) for members, pending, now in due if (pending & ~now).any()]
        if not self.groups["wgmma"].open + self.groups["wgmma"].committed:
            self.accumulating.clear()


# --- operands

SPECIAL: dict[str, Callable[[Machine], np.ndarray]] = {
    "%tid.x": lambda m: np.arange(m.T)[None],
    "global_smem": lambda m: np.array([[BASE]]),
    **{f"%ctaid.{x}": lambda m, n=n: m.programs[:, n : n + 1] for n, x in enumerate("xyz")},
    **{f"%nctaid.{x}": lambda m, n=n: np.array([[m.grid[n]]]) for n, x in enumerate("xyz")},
}


def reader_of(operand: Operand, dtype) -> Callable[[Machine], np.ndarray]:
    """A function that returns the operand as an array of `dtype`; of a wider register the low part."""
    dtype = np.dtype(dtype)
    bits = dtype if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")  # as a register holds it
    if isinstance(operand, Register):
        return lambda m: m.read(operand).astype(bits, copy=False).view(dtype)
    if isinstance(operand, int):
        value = np.array([[operand & (1 << 8 * dtype.itemsize) - 1]]).astype(bits).view(dtype)
        return lambda m: value
    if operand in SPECIAL:
        return lambda m: SPECIAL[operand](m).astype(dtype)
    if not isinstance(operand, str) or "_param_" not in operand:
        raise NotImplementedError(f"PTX operand {operand}")
    return lambda m: np.array([[list(m.parameters).index(operand)]], dtype)  # stands for a tensor map's address


def address_of(operand: Address) -> Callable[[Machine], np.ndarray]:
    """Addresses as int64, of global and of shared memory."""
    wide = isinstance(operand.base, Register) and operand.base.kind == "b64"
    base = reader_of(operand.base, np.uint64 if wide else np.uint32)
    return lambda m: base(m).astype(np.int64) + operand.offset


def launch(
    kernel: Kernel,
    code: Code,
    grid: tuple[int, int, int],
    parameters: dict,
    memory: GlobalMemory,
    shared: int,
    *,
    counters: Counters | None = None,
    seed: int = 0,
) -> None:
    """All programs of the grid, in random order."""
    x, y, z = grid
    programs = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x))[::-1], 1)  # [programs, 3]
    programs = programs[np.random.default_rng(seed).permutation(len(programs))]
    together = max(THREADS_TOGETHER // kernel.threads, 1)
    for first in range(0, len(programs), together):
        batch = programs[first : first + together]
        Machine(kernel, code, batch, grid, parameters, memory, shared, counters).run()
