"""Global memory: the process's own, of which a launch may touch the storages of its arguments.

Shadows remember for every two bytes who wrote and read them during the launch. Two programs must not touch the same
bytes unless both only read, or both add atomically; and what a warp wrote, another warp of its program may read only
after a barrier. `stamps` say who accesses: program, barriers passed and warp, in one int64 (see `stamp`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from ptx.arithmetic import UNSIGNED

NOBODY, SEVERAL, ATOMIC = -1, -2, -3  # in place of a program's number


class Fault(Exception):
    """What a GPU would do silently, or not survive."""

    def __init__(self, text: str, lane: int | None = None):
        super().__init__(text)
        self.lane = lane  # which of the accessing threads


def stamp(programs: np.ndarray, epochs: np.ndarray, warps: np.ndarray) -> np.ndarray:
    return programs.astype(np.int64) << 32 | epochs.astype(np.int64) << 8 | warps


class Allocation:
    """A storage [size] of bytes, and who touched it."""

    def __init__(self, name: str, base: int, size: int):
        if base % 16:
            raise Fault(f"{name}: the storage starts at {base:#x}, not a multiple of 16")
        self.name, self.base, self.size, self.end = name, base, size, base + size
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
        self.views = {n: memory[: size // n * n].view(dtype) for n, dtype in UNSIGNED.items()}  # [size / n]
        self.writer = self.reader = np.empty(0, np.int64)  # stamps, or NOBODY and so on, [size / 2]

    def shadow(self) -> None:
        if not len(self.writer):
            self.writer, self.reader = np.full((2, self.size // 2 + 1), NOBODY, np.int64)


def _program(stamps: np.ndarray) -> np.ndarray:
    return np.where(stamps < 0, stamps, stamps >> 32)


class GlobalMemory:
    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def register(self, name: str, base: int, size: int) -> None:
        if size and all(a.base != base for a in self.allocations):
            self.allocations.append(Allocation(name, base, size))

    def _resolve(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Allocation, np.ndarray | slice, np.ndarray]]:
        """(allocation, which of the addresses [n] lie in it, their bytes in it) of each one that is touched."""
        if not len(addresses):
            return
        odd = addresses % np.uint64(size) != 0
        if odd.any():
            lane = int(np.argmax(odd))
            raise Fault(f"address {int(addresses[lane]):#x} is not a multiple of {size}", lane)
        low, high = int(addresses.min()), int(addresses.max()) + size
        unresolved = np.ones(len(addresses), bool)
        for a in self.allocations:
            if a.base <= low and high <= a.end:
                yield a, slice(None), (addresses - np.uint64(a.base)).astype(np.int64)
                return
        inside = [(addresses >= a.base) & (addresses + np.uint64(size) <= a.end) for a in self.allocations]
        for mask in inside:
            unresolved &= ~mask
        if unresolved.any():
            lane = int(np.argmax(unresolved))
            raise Fault(self._describe(int(addresses[lane]), size), lane)
        for a, mask in zip(self.allocations, inside):
            if mask.any():
                yield a, np.flatnonzero(mask), (addresses[mask] - np.uint64(a.base)).astype(np.int64)

    def _describe(self, address: int, size: int) -> str:
        if not self.allocations:
            return f"{size} bytes at {address:#x}, and no argument has any"
        nearest = min(self.allocations, key=lambda a: max(a.base - address, address - a.end, 0))
        where = f"{address - nearest.end} bytes after"
        if address < nearest.base:
            where = f"{nearest.base - address} bytes before"
        if nearest.base <= address < nearest.end:
            where = f"over the end, at byte {address - nearest.base}, of"
        return f"{size} bytes out of bounds: {where} {nearest.name} ({nearest.size} bytes)"

    def load(self, addresses: np.ndarray, size: int, count: int, stamps: np.ndarray) -> list[np.ndarray]:
        """`count` elements of `size` bytes from each address [n], as `count` arrays [n]."""
        found = [np.empty(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for allocation, chosen, at in self._resolve(addresses, size * count):
            for j in range(count):
                found[j][chosen] = allocation.views[size][at // size + j]
            self._note_read(allocation, at, size * count, stamps[chosen])
        return found

    def store(self, addresses: np.ndarray, values: list[np.ndarray], stamps: np.ndarray) -> None:
        size = values[0].dtype.itemsize
        for allocation, chosen, at in self._resolve(addresses, size * len(values)):
            self._note_write(allocation, at, size * len(values), stamps[chosen], stamps[chosen])
            view = allocation.views[size]
            for j, value in enumerate(values):
                view[at // size + j] = value[chosen]
            for j, value in enumerate(values):
                lost = view[at // size + j] != value[chosen]
                if lost.any():
                    where = f"byte {at[np.argmax(lost)]} of {allocation.name}"
                    raise Fault(f"threads store different values in one place, {where}")

    def add(self, addresses: np.ndarray, values: list[np.ndarray], stamps: np.ndarray) -> list[np.ndarray]:
        """Add float32 bits atomically; returns what was there before the instruction, as `len(values)` arrays [n]."""
        old = [np.empty(len(addresses), np.uint32) for _ in values]
        for allocation, chosen, at in self._resolve(addresses, 4 * len(values)):
            view = allocation.views[4].view(np.float32)
            for j, value in enumerate(values):
                old[j][chosen] = view[at // 4 + j].view(np.uint32)
                np.add.at(view, at // 4 + j, value[chosen].view(np.float32))
            self._note_write(allocation, at, 4 * len(values), stamps[chosen], np.full(len(at), ATOMIC))
        return old

    @staticmethod
    def _pairs(at: np.ndarray, size: int) -> np.ndarray:
        """Indices [n, size / 2] of the shadows."""
        return (at[:, None] >> 1) + np.arange(max(size // 2, 1))

    def _note_read(self, allocation: Allocation, at: np.ndarray, size: int, stamps: np.ndarray) -> None:
        allocation.shadow()
        pairs, me = self._pairs(at, size), stamps[:, None]
        writer, reader = allocation.writer[pairs], allocation.reader[pairs]
        wrong = (writer != NOBODY) & (_program(writer) != me >> 32)
        self._refuse(wrong, allocation, "reads what", writer, "wrote", at, stamps)
        wrong = (writer >> 8 == me >> 8) & (writer != me)
        self._refuse(wrong, allocation, "reads, without a barrier, what another warp of", writer, "wrote", at, stamps)
        several = (reader != NOBODY) & (_program(reader) != me >> 32)
        allocation.reader[pairs] = np.where(several, SEVERAL, me)
        clash = _program(allocation.reader[pairs]) != me >> 32
        allocation.reader[pairs[clash]] = SEVERAL

    def _note_write(self, allocation: Allocation, at: np.ndarray, size: int, stamps: np.ndarray, marks: np.ndarray):
        """`marks` [n]: the stamps, or ATOMIC."""
        allocation.shadow()
        pairs, mark = self._pairs(at, size), _program(marks)[:, None]
        writer, reader = allocation.writer[pairs], allocation.reader[pairs]
        wrong = (writer != NOBODY) & (_program(writer) != mark)
        self._refuse(wrong, allocation, "overwrites what", writer, "wrote", at, stamps)
        wrong = (reader != NOBODY) & (_program(reader) != stamps[:, None] >> 32)
        self._refuse(wrong, allocation, "overwrites what", reader, "read", at, stamps)
        allocation.writer[pairs] = marks[:, None]
        writer = allocation.writer[pairs]
        self._refuse(_program(writer) != mark, allocation, "overwrites what", writer, "writes", at, stamps)

    @staticmethod
    def _refuse(wrong, allocation, verb: str, others, done: str, at, stamps) -> None:
        """wrong [n, size / 2]"""
        if not wrong.any():
            return
        lane, pair = (int(x) for x in np.argwhere(wrong)[0])
        other = int(_program(others)[lane, pair])
        who = {SEVERAL: "several programs", ATOMIC: "an atomic"}.get(other, f"program {other}")
        where = f"byte {int(at[lane]) + 2 * pair} of {allocation.name}"
        raise Fault(f"race: program {stamps[lane] >> 32} {verb} {who} {done}, {where}", lane)
