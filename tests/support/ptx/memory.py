"""Global and shared memory, with shadows that remember who wrote and read every two bytes last.

Global memory is the process's own, of which a launch may touch the storages of its arguments. Two programs must not
touch the same bytes unless both only read, or both add atomically; and what a warp wrote, another warp of its program
may read only after a barrier.

Shared memory is one array for all CTAs that run together. Between two barriers no warp may read or overwrite what
another wrote, nor overwrite what another read. Bytes that were never written, or into which an asynchronous copy is
under way, must not be read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import UNSIGNED

NOBODY = 0  # in place of a stamp
SEVERAL, ATOMIC = -1 << 32, -2 << 32  # in place of a stamp in global memory: programs, additions
UNDER_WAY, AWAITED = -1, -2  # in place of a stamp in shared memory: a copy that is, or that all who read it waited for
WARPS, HARDWARE = 1 << 6, 1 << 7  # in a stamp of shared memory: several warps, none
WARP, BARRIER = 31, 1 << 8  # bits of a stamp: the warp in its program, one barrier more
FENCED = -1  # in place of a fence's number: visible to the asynchronous proxy
BASE = 1024  # address of a CTA's first byte: no address is 0, and swizzles see whole kilobytes


class Fault(Exception):
    """What a GPU would do silently, or not survive."""

    def __init__(self, text: str, lane: int | None = None):
        super().__init__(text)
        self.lane = lane  # which of the accessing threads


def refuse(wrong: np.ndarray, text: str | Callable[[int], str]) -> None:
    """A fault of the first thread that is wrong, of [n] or [n, ...]."""
    if wrong.any():
        lane = int(np.argwhere(wrong)[0, 0])
        raise Fault(text if isinstance(text, str) else text(lane), lane)


def stamp(program: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Who accesses memory: program, barriers passed (none yet) and warp, in one positive int64."""
    return program + 1 << 32 | warp


@dataclass(frozen=True)
class Lanes:
    """Threads that execute an instruction."""

    index: np.ndarray  # [n] of all C * T that run together
    row: np.ndarray  # [n] of C
    stamp: np.ndarray  # [n] who they are to a memory

    def __getitem__(self, chosen) -> Lanes:
        return Lanes(*(x[chosen] for x in vars(self).values()))


class Memory:
    """Bytes, and who touched them."""

    def __init__(self, memory: np.ndarray):
        size = len(memory)
        self.size, self.bytes = size, memory
        self.views = {n: memory[: size // n * n].view(dtype) for n, dtype in UNSIGNED.items()}  # [size / n]
        self.writer, self.reader = np.zeros((2, size // 2 + 1), np.int64)  # stamps; cost memory only where touched

    @staticmethod
    def pairs(at: np.ndarray, size: int) -> np.ndarray:
        """Indices [n, size / 2] of the shadows."""
        return (at[:, None] >> 1) + np.arange(max(size // 2, 1))


class Allocation(Memory):
    """A storage of the process [size]."""

    def __init__(self, name: str, base: int, size: int):
        if base % 16:
            raise Fault(f"{name}: the storage starts at {base:#x}, not a multiple of 16")
        super().__init__(np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8))
        self.name, self.base, self.end = name, base, base + size


class GlobalMemory:
    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def register(self, name: str, base: int, size: int) -> None:
        if size and all(a.base != base for a in self.allocations):
            self.allocations.append(Allocation(name, base, size))

    def _resolve(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Allocation, np.ndarray, np.ndarray]]:
        """(allocation, which of the addresses [n] lie in it, their bytes in it) of each one that is touched."""
        refuse(addresses % size != 0, lambda n: f"address {addresses[n]:#x} is not a multiple of {size}")
        low, high, unresolved = addresses.min(), addresses.max(), np.ones(len(addresses), bool)
        for a in self.allocations:
            if a.base <= high and low < a.end:
                chosen = np.flatnonzero((addresses >= a.base) & (addresses + size <= a.end))
                unresolved[chosen] = False
                yield a, chosen, addresses[chosen] - a.base
        refuse(unresolved, lambda n: self._describe(int(addresses[n]), size))

    def _describe(self, address: int, size: int) -> str:
        if not self.allocations:
            return f"{size} bytes at {address:#x}, and no argument has any"
        nearest = min(self.allocations, key=lambda a: max(a.base - address, address - a.end, 0))
        where = f"{address - nearest.end} bytes after"
        if address < nearest.base:
            where = f"{nearest.base - address} bytes before"
        elif address < nearest.end:
            where = f"over the end, at byte {address - nearest.base}, of"
        return f"{size} bytes out of bounds: {where} {nearest.name} ({nearest.size} bytes)"

    def load(self, addresses: np.ndarray, size: int, count: int, lanes: Lanes) -> list[np.ndarray]:
        """`count` elements of `size` bytes from each address [n], as `count` arrays [n]."""
        found = [np.empty(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for allocation, chosen, at in self._resolve(addresses, size * count):
            for j in range(count):
                found[j][chosen] = allocation.views[size][at // size + j]
            self._note_read(allocation, at, size * count, lanes.stamp[chosen])
        return found

    def store(self, addresses: np.ndarray, values: list[np.ndarray], lanes: Lanes) -> None:
        size = values[0].dtype.itemsize
        for allocation, chosen, at in self._resolve(addresses, size * len(values)):
            stamps, view = lanes.stamp[chosen], allocation.views[size]
            self._note_write(allocation, at, size * len(values), stamps, stamps)
            for j, value in enumerate(values):
                view[at // size + j] = value[chosen]
            lost = [view[at // size + j] != value[chosen] for j, value in enumerate(values)]
            if np.any(lost):
                where = f"byte {at[np.argmax(np.any(lost, 0))]} of {allocation.name}"
                raise Fault(f"threads store different values in one place, {where}")

    def add(self, addresses: np.ndarray, values: list[np.ndarray], lanes: Lanes) -> list[np.ndarray]:
        """Add float32 bits atomically; returns what was there before the instruction, as `len(values)` arrays [n]."""
        old = [np.empty(len(addresses), np.uint32) for _ in values]
        for allocation, chosen, at in self._resolve(addresses, 4 * len(values)):
            view = allocation.views[4].view(np.float32)
            for j, value in enumerate(values):
                old[j][chosen] = view[at // 4 + j].view(np.uint32)
                np.add.at(view, at // 4 + j, value[chosen].view(np.float32))
            self._note_write(allocation, at, 4 * len(values), lanes.stamp[chosen], np.full(len(at), ATOMIC))
        return old

    def _note_read(self, a: Allocation, at: np.ndarray, size: int, stamps: np.ndarray) -> None:
        pairs, me = a.pairs(at, size), stamps[:, None]
        writer, reader = a.writer[pairs], a.reader[pairs]
        wrong = (writer != NOBODY) & (writer >> 32 != me >> 32)
        self._refuse(wrong, a, "reads what", writer, "wrote", at, stamps)
        wrong = (writer >> 8 == me >> 8) & (writer != me)
        self._refuse(wrong, a, "reads, without a barrier, what another warp of", writer, "wrote", at, stamps)
        marks = np.where((reader != NOBODY) & (reader >> 32 != me >> 32), SEVERAL, me)
        a.reader[pairs] = marks
        clash = a.reader[pairs] >> 32 != marks >> 32
        a.reader[pairs[clash]] = SEVERAL

    def _note_write(self, a: Allocation, at: np.ndarray, size: int, stamps: np.ndarray, marks: np.ndarray) -> None:
        """`marks` [n]: the stamps, or ATOMIC."""
        pairs, marks = a.pairs(at, size), marks[:, None]
        writer, reader = a.writer[pairs], a.reader[pairs]
        wrong = (writer != NOBODY) & (writer >> 32 != marks >> 32)
        self._refuse(wrong, a, "overwrites what", writer, "wrote", at, stamps)
        wrong = (reader != NOBODY) & (reader >> 32 != stamps[:, None] >> 32)
        self._refuse(wrong, a, "overwrites what", reader, "read", at, stamps)
        a.writer[pairs] = marks
        writer = a.writer[pairs]
        self._refuse(writer >> 32 != marks >> 32, a, "overwrites what", writer, "writes", at, stamps)

    @staticmethod
    def _refuse(wrong, a: Allocation, verb: str, others, done: str, at, stamps) -> None:
        """wrong, others [n, size / 2]"""
        if wrong.any():
            lane, pair = np.argwhere(wrong)[0]
            other = others[lane, pair]
            who = {SEVERAL: "several programs", ATOMIC: "an atomic"}.get(other, f"program {(other >> 32) - 1}")
            where = f"byte {at[lane] + 2 * pair} of {a.name}"
            raise Fault(f"race: program {(stamps[lane] >> 32) - 1} {verb} {who} {done}, {where}", int(lane))


class SharedMemory(Memory):
    def __init__(self, ctas: int, size: int):
        self.given = size
        self.stride = BASE + (size + 1023) // 1024 * 1024  # bytes from one CTA to the next
        super().__init__(np.zeros(ctas * self.stride, np.uint8))
        self.unfenced = np.full(len(self.writer), FENCED, np.int32)  # how many fences the writer had passed
        self.fences = np.zeros((ctas, 32), np.int32)  # fence.proxy.async passed, by warp

    def flat(self, addresses: np.ndarray, size: int, lanes: Lanes) -> np.ndarray:
        """Addresses [n] in the CTAs of the lanes -> indices of `bytes`."""
        refuse(addresses % size != 0, lambda n: f"shared address {addresses[n]} is not a multiple of {size}")
        outside = (addresses < BASE) | (addresses + size > BASE + self.given)
        refuse(outside, lambda n: f"byte {addresses[n] - BASE} of {self.given} bytes of shared memory")
        return addresses + lanes.row * self.stride

    def load(
        self, addresses: np.ndarray, size: int, count: int, lanes: Lanes, asynchronous: str = ""
    ) -> list[np.ndarray]:
        """`count` elements of `size` bytes from each address [n], as `count` arrays [n]."""
        at = self.flat(addresses, size * count, lanes)
        pairs, me = self.pairs(at, size * count), lanes.stamp[:, None]
        written = self.writer[pairs]
        refuse(written == NOBODY, "reads shared memory that was never written")
        refuse(written == UNDER_WAY, "reads shared memory before its copy was awaited")
        race = self._since_barrier(written, me)
        refuse(race, "reads shared memory that another warp wrote since the last barrier")
        if asynchronous:  # what a warp wrote, its own fence must have made visible before
            unfenced = self.unfenced[pairs]
            passed = self.fences[lanes.row[:, None], written & WARP]
            missing = (unfenced != FENCED) & (passed <= unfenced)
            refuse(missing, f"{asynchronous} reads what was written without a fence.proxy.async since")
        marks = np.where(self._since_barrier(self.reader[pairs], me), me | WARPS, me)
        marks = np.where(self.reader[pairs] == UNDER_WAY, UNDER_WAY, marks)
        self.reader[pairs] = marks
        clash = self.reader[pairs] != marks
        self.reader[pairs[clash]] = marks[clash] | WARPS
        return [self.views[size][at // size + j] for j in range(count)]

    def store(self, addresses: np.ndarray, values: list[np.ndarray], lanes: Lanes) -> None:
        size = values[0].dtype.itemsize
        at = self.flat(addresses, size * len(values), lanes)
        view, index = self.views[size], at // size
        same = all((view[index + j] == value).all() for j, value in enumerate(values))
        self._note_write(at, size * len(values), lanes, lanes.stamp, same)
        for j, value in enumerate(values):
            view[index + j] = value

    def start_copy(self, addresses: np.ndarray, size: int, lanes: Lanes, mark: int = 0) -> np.ndarray:
        """A copy into [address, address + size) is under way, by the lanes or by HARDWARE; returns flat indices [n]."""
        at = self.flat(addresses, size, lanes)
        self._note_write(at, size, lanes, lanes.stamp | mark)
        self.writer[self.pairs(at, size)] = UNDER_WAY
        return at

    def end_copy(self, at: np.ndarray, data: np.ndarray, stamps: np.ndarray) -> None:
        """Its data [n, size] arrives, as if written by `stamps` [n] now."""
        size = data.shape[1]
        self.bytes[at[:, None] + np.arange(size)] = data
        pairs = self.pairs(at, size)
        self.writer[pairs], self.unfenced[pairs] = stamps[:, None], FENCED

    def start_read(self, addresses: np.ndarray, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
        """A copy of 16 bytes from each address [n] is under way; returns flat indices [n] and the data [n, 16]."""
        data = np.stack(self.load(addresses, 8, 2, lanes, "a bulk copy"), 1).view(np.uint8)
        at = self.flat(addresses, 16, lanes)
        self.reader[self.pairs(at, 16)] = UNDER_WAY
        return at, data

    def end_read(self, at: np.ndarray, stamp: int) -> None:
        """It has read the bytes at flat indices [n], as if `stamp` had now."""
        self.reader[self.pairs(at, 16)] = stamp

    def _note_write(self, at: np.ndarray, size: int, lanes: Lanes, stamps: np.ndarray, same: bool = False) -> None:
        """`same`: nothing changes, and then other warps may have touched it."""
        pairs, me = self.pairs(at, size), stamps[:, None]
        written = self.writer[pairs]
        if not same:
            race = self._since_barrier(self.reader[pairs], me)
            refuse(race, "overwrites shared memory that another warp read since the last barrier")
            race = self._since_barrier(written, me)
            refuse(race, "overwrites shared memory that another warp wrote since the last barrier")
        refuse(written == UNDER_WAY, "writes shared memory into which a copy is under way")
        refuse(self.reader[pairs] == UNDER_WAY, "writes shared memory that a bulk copy reads")
        self.writer[pairs] = me
        self.unfenced[pairs] = self.fences[lanes.row, lanes.stamp & WARP][:, None]

    @staticmethod
    def _since_barrier(others: np.ndarray, me: np.ndarray) -> np.ndarray:
        """Stamps of other warps after the last barrier of the program."""
        return (others >> 8 == me >> 8) & (others != me)
