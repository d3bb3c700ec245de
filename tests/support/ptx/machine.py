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
from ptx.global_memory import Fault, GlobalMemory, stamp
from ptx.reader import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol
from ptx.shared_memory import BASE, SharedMemory

Execute = Callable[["Machine"], None]
Code = list[list[tuple[Instruction, Execute | None]]]  # by block; None for branches and returns
THREADS_TOGETHER = 8192


@dataclass(frozen=True)
class Lanes:
    """Threads that execute an instruction."""

    index: np.ndarray  # [n] of C * T
    row: np.ndarray  # [n] of C
    warp: np.ndarray  # [n] int16, in the CTA
    program: np.ndarray  # [n]

    def __getitem__(self, chosen) -> Lanes:
        return Lanes(*(x[chosen] for x in vars(self).values()))


@dataclass
class Group:
    """Asynchronous operations that were committed together."""

    members: list
    pending: np.ndarray  # [C] bool


@dataclass
class Groups:
    """Asynchronous operations of one kind, oldest group first."""

    open: list = field(default_factory=list)  # issued and not committed
    committed: list[Group] = field(default_factory=list)


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
        self.kernel, self.code, self.grid, self.parameters, self.memory = kernel, code, grid, parameters, memory
        self.C, self.T, self.W = len(programs), kernel.threads, kernel.threads // 32
        self.programs = programs
        self.numbers = programs[:, 0] + grid[0] * (programs[:, 1] + grid[1] * programs[:, 2])  # [C]
        self.registers: list[np.ndarray | None] = [None] * kernel.registers
        self.mask: np.ndarray | None = None  # broadcasts to [C, T] bool; None: all
        self.shared = SharedMemory(self.C, shared, self.W)
        self.counters = counters
        self.copies, self.products = Groups(), Groups()  # cp.async and wgmma
        self.accumulating: set[int] = set()  # registers of a wgmma that was not awaited
        self.mbarriers: dict = {}  # by shared address
        self.fragments: dict = {}  # matrix operands already converted, see matrix.py
        lanes = np.arange(self.C * self.T)
        warps = (lanes % self.T // 32).astype(np.int16)
        self.everyone = Lanes(lanes, lanes // self.T, warps, self.numbers[lanes // self.T])

    # --- control flow

    def run(self) -> None:
        blocks = self.kernel.blocks
        stack: list[list] = [[0, -1, None]]  # block to run, block at which to stop, mask
        with np.errstate(all="ignore"):
            while stack:
                number, stop, self.mask = stack[-1]
                if number in (stop, -1):
                    stack.pop()
                    continue
                condition, block, mask = self._run_block(number), blocks[number], self.mask
                if condition is None:
                    stack[-1][0] = block.successors[0]
                    continue
                taken, other = block.successors
                active = np.broadcast_to(True if mask is None else mask, (self.C, self.T))
                if (condition | ~active).all():
                    stack[-1][0] = taken
                elif not (condition & active).any():
                    stack[-1][0] = other
                else:
                    stack[-1][0] = block.meeting
                    stack.append([other, block.meeting, active & ~condition])
                    stack.append([taken, block.meeting, active & condition])

    def _run_block(self, number: int) -> np.ndarray | None:
        """Execute; return what the branch at its end depends on, or None."""
        for instruction, execute in self.code[number]:
            try:
                if self.counters is not None:
                    self.counters.issued(instruction.name, self._active_warps())
                if execute is None:
                    guard = instruction.guard
                    return None if guard is None else self.read(guard) ^ instruction.negated
                if self.accumulating:
                    self._check_accumulators(instruction)
                execute(self)
            except Fault as fault:
                raise self._located(instruction, fault) from fault
        return None

    def _active_warps(self) -> int:
        if self.mask is None:
            return self.C * self.W
        return int(np.broadcast_to(self.mask, (self.C, self.T)).reshape(-1, 32).any(-1).sum())

    def _located(self, instruction: Instruction, fault: Fault) -> Fault:
        text = str(fault)
        if fault.lane is not None:
            lanes = self.lanes()
            lane = fault.lane if fault.lane < len(lanes.index) else 0
            text = f"program {lanes.program[lane]}, thread {lanes.index[lane] % self.T}: {text}"
        file, line, _ = instruction.place
        return Fault(f"{self.kernel.name}, {file}:{line}: {text}\n    {instruction.text[:160]}")

    def _check_accumulators(self, instruction: Instruction) -> None:
        if instruction.opcode[0] != "wgmma":
            touched = [r.name for r in instruction.sources() if r.number in self.accumulating]
            if touched:
                raise Fault(f"reads {touched[0]}, into which a wgmma that was not awaited accumulates")

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

    def lanes(self) -> Lanes:
        """Active threads."""
        if self.mask is None:
            return self.everyone
        return self.everyone[np.flatnonzero(np.broadcast_to(self.mask, (self.C, self.T)))]

    def of_lanes(self, value: np.ndarray, lanes: Lanes) -> np.ndarray:
        """A register's values [n] in these threads."""
        full = np.broadcast_to(value, (self.C, self.T)).reshape(-1)
        return full if lanes is self.everyone else full[lanes.index]

    def write_lanes(self, register: Register | Symbol, lanes: Lanes, values: np.ndarray) -> None:
        """Values [n] into a register of these threads."""
        if isinstance(register, Symbol):
            return
        dtype = TYPES[register.kind]
        values = values.astype(dtype, copy=False)
        if lanes is self.everyone:
            self.registers[register.number] = values.reshape(self.C, self.T)
            return
        old = self.registers[register.number]
        new = np.broadcast_to(~np.zeros((1, 1), dtype) if old is None else old, (self.C, self.T)).copy()
        new.reshape(-1)[lanes.index] = values
        self.registers[register.number] = new

    def whole(self, what: str, unit: int) -> np.ndarray:
        """[C, T / unit] bool: which warps or CTAs are active; none may be in part."""
        if self.mask is None:
            return np.ones((self.C, self.T // unit), bool)
        parts = np.broadcast_to(self.mask, (self.C, self.T)).reshape(self.C, -1, unit)
        some = parts.any(-1)
        if (some & ~parts.all(-1)).any():
            raise Fault(f"{what} that not all {unit} threads reach")
        return some

    def one_per_cta(self, *values: np.ndarray) -> tuple[np.ndarray, ...]:
        """CTAs with an active thread [n], and its values [n] of registers; there must be one."""
        lanes = self.lanes()
        if len(np.unique(lanes.row)) != len(lanes.row):
            raise Fault("several threads of a CTA issue what one should")
        return (lanes.row, *(self.of_lanes(x, lanes) for x in values))

    def stamps(self, lanes: Lanes) -> np.ndarray:
        """Who accesses global memory, [n]."""
        return stamp(lanes.program, self.shared.epoch[lanes.row], lanes.warp)

    # --- asynchronous operations

    def commit(self, groups: Groups) -> None:
        groups.committed.append(Group(groups.open, self.whole("a commit", self.T)[:, 0]))
        groups.open = []

    def wait(self, groups: Groups, allowed: int, finish: Callable) -> None:
        """Finish, oldest first, all groups of the active CTAs but the `allowed` newest."""
        active, newer, due = self.whole("a wait", self.T)[:, 0], np.zeros(self.C, int), []
        for group in reversed(groups.committed):
            due.append((group, group.pending & active & (newer >= allowed)))
            newer += group.pending
        for group, now in reversed(due):
            if now.any():
                for member in group.members:
                    finish(self, member, now)
                group.pending = group.pending & ~now
        groups.committed = [g for g in groups.committed if g.pending.any()]


# --- operands


def reader_of(operand: Operand, dtype) -> Callable[[Machine], np.ndarray]:
    """A function that returns the operand as an array of `dtype`; of a wider register the low part."""
    dtype = np.dtype(dtype)
    if isinstance(operand, Register):
        if dtype == np.bool_:
            return lambda m: m.read(operand)
        if np.dtype(TYPES[operand.kind]).itemsize == dtype.itemsize:
            return lambda m: m.read(operand).view(dtype)
        low = np.dtype(f"u{dtype.itemsize}")
        return lambda m: m.read(operand).astype(low).view(dtype)
    if isinstance(operand, Immediate):
        if dtype == np.bool_ or (dtype.kind == "f" and not operand.is_float):
            value = np.array([[operand.bits]]).astype(dtype)
        else:
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            value = np.array([[bits]], np.dtype(f"u{dtype.itemsize}")).view(dtype)
        return lambda m: value
    if not isinstance(operand, Symbol):
        raise NotImplementedError(f"PTX operand {operand}")
    return _symbol(operand.name, dtype)


def _symbol(name: str, dtype: np.dtype) -> Callable[[Machine], np.ndarray]:
    base, _, axis = name.partition(".")
    number = "xyz".find(axis) if axis else 0
    special: dict[str, Callable[[Machine], np.ndarray]] = {
        "%tid": lambda m: np.arange(m.T)[None] if number == 0 else np.zeros((1, 1)),
        "%ntid": lambda m: np.array([[1 if number else m.T]]),
        "%ctaid": lambda m: m.programs[:, number : number + 1],
        "%nctaid": lambda m: np.array([[m.grid[number]]]),
        "%laneid": lambda m: np.arange(m.T)[None] % 32,
        "global_smem": lambda m: np.array([[BASE]]),
    }
    if base in special:
        return lambda m: special[base](m).astype(dtype)
    if name.startswith("%") or "_param_" not in name:
        raise NotImplementedError(f"PTX operand {name}")
    return lambda m: np.array([[list(m.parameters).index(name)]], dtype)  # stands for a tensor map's address


def address_of(operand: Address, dtype: type) -> Callable[[Machine], np.ndarray]:
    """uint64 addresses of global memory, uint32 of shared memory."""
    base, offset = reader_of(operand.base, dtype), np.array([[operand.offset]], np.int64).astype(dtype)
    return (lambda m: base(m) + offset) if operand.offset else base


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
