"""Shared memory of the CTAs that run together, one array for all.

Shadows remember for every two bytes at which epoch (barriers passed) and by which warp they were last written and read:
between two barriers no warp may read or overwrite what another wrote, nor overwrite what another read. Bytes that were
never written, or into which an asynchronous copy is under way, must not be read.
"""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import UNSIGNED
from ptx.global_memory import Fault

BASE = 1024  # address of a CTA's first byte: no address is 0, and swizzles see whole kilobytes
UNWRITTEN, UNDER_WAY, AWAITED = -1, 1 << 30, -2  # in place of an epoch; AWAITED: visible to all that waited
SEVERAL, NO_WARP = -2, -1  # in place of a warp
FENCED = -1  # in place of a fence's number: visible to the asynchronous proxy


class SharedMemory:
    def __init__(self, ctas: int, size: int, warps: int):
        self.size = size
        self.stride = BASE + (size + 1023) // 1024 * 1024  # bytes from one CTA to the next
        self.bytes = np.zeros(ctas * self.stride, np.uint8)
        self.views = {n: self.bytes.view(dtype) for n, dtype in UNSIGNED.items()}
        pairs = ctas * self.stride // 2
        self.write_epoch, self.writer = np.full(pairs, UNWRITTEN, np.int32), np.zeros(pairs, np.int16)
        self.read_epoch, self.reader = np.full(pairs, -1, np.int32), np.zeros(pairs, np.int16)
        self.unfenced = np.full(pairs, FENCED, np.int32)  # how many fences the writer had passed
        self.epoch = np.zeros(ctas, np.int32)  # barriers passed
        self.fences = np.zeros((ctas, warps), np.int32)  # fence.proxy.async passed

    def flat(self, addresses: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
        """Addresses [n] of CTAs `rows` [n] -> indices of `bytes`."""
        at = addresses.astype(np.int64)
        if (at % size).any():
            lane = int(np.argmax(at % size != 0))
            raise Fault(f"shared address {at[lane]} is not a multiple of {size}", lane)
        wrong = (at < BASE) | (at + size > BASE + self.size)
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise Fault(f"byte {at[lane] - BASE} of {self.size} bytes of shared memory", lane)
        return at + rows * self.stride

    def load(self, at: np.ndarray, size: int, count: int, rows: np.ndarray, warps: np.ndarray) -> list[np.ndarray]:
        """`count` elements of `size` bytes from each flat index [n], as `count` arrays [n]."""
        self.note_read(at, size * count, rows, warps)
        return [self.views[size][at // size + j] for j in range(count)]

    def store(self, at: np.ndarray, values: list[np.ndarray], rows: np.ndarray, warps: np.ndarray) -> None:
        size = values[0].dtype.itemsize
        view, index = self.views[size], at // size
        same = all((view[index + j] == value).all() for j, value in enumerate(values))
        self.note_write(at, size * len(values), rows, warps, same)
        for j, value in enumerate(values):
            view[index + j] = value

    @staticmethod
    def pairs(at: np.ndarray, size: int) -> np.ndarray:
        """Indices [n, size / 2] of the shadows."""
        return (at[:, None] >> 1) + np.arange(max(size // 2, 1))

    @staticmethod
    def _refuse(wrong: np.ndarray, text: str) -> None:
        """wrong [n, size / 2]"""
        if wrong.any():
            raise Fault(text, int(np.argmax(wrong.any(1))))

    def note_read(self, at: np.ndarray, size: int, rows: np.ndarray, warps: np.ndarray) -> None:
        pairs, epoch, me = self.pairs(at, size), self.epoch[rows][:, None], warps[:, None]
        written = self.write_epoch[pairs]
        self._refuse(written == UNWRITTEN, "reads shared memory that was never written")
        self._refuse(written == UNDER_WAY, "reads shared memory before its copy was awaited")
        race = (written == epoch) & (self.writer[pairs] != me)
        self._refuse(race, "reads shared memory that another warp wrote since the last barrier")
        other = (self.read_epoch[pairs] == epoch) & (self.reader[pairs] != me)
        self.reader[pairs] = np.where(other, SEVERAL, me)
        self.read_epoch[pairs] = epoch
        clash = self.reader[pairs] != me
        if clash.any():
            self.reader[pairs[clash]] = SEVERAL

    def note_write(self, at: np.ndarray, size: int, rows: np.ndarray, warps: np.ndarray, same: bool = False) -> None:
        """`same`: nothing changes, and then other warps may have touched it."""
        pairs, epoch, me = self.pairs(at, size), self.epoch[rows][:, None], warps[:, None]
        if not same:
            race = (self.read_epoch[pairs] == epoch) & (self.reader[pairs] != me)
            self._refuse(race, "overwrites shared memory that another warp read since the last barrier")
            race = (self.write_epoch[pairs] == epoch) & (self.writer[pairs] != me)
            self._refuse(race, "overwrites shared memory that another warp wrote since the last barrier")
        self._refuse(self.write_epoch[pairs] == UNDER_WAY, "writes shared memory into which a copy is under way")
        self.write_epoch[pairs], self.writer[pairs] = epoch, me
        self.unfenced[pairs] = self.fences[rows, warps][:, None]

    def start_copy(self, at: np.ndarray, size: int, rows: np.ndarray, warps: np.ndarray) -> None:
        """A copy into [at, at + size) is under way."""
        self.note_write(at, size, rows, warps)
        self.write_epoch[self.pairs(at, size)] = UNDER_WAY

    def end_copy(self, at: np.ndarray, data: np.ndarray, epochs: np.ndarray, warps: np.ndarray) -> None:
        """Its data [n, size] arrives, as if written at `epochs` [n] by `warps` [n]."""
        size = data.shape[1]
        self.bytes[at[:, None] + np.arange(size)] = data
        pairs = self.pairs(at, size)
        self.write_epoch[pairs], self.writer[pairs] = epochs[:, None], warps[:, None]
        self.unfenced[pairs] = FENCED

    def note_asynchronous_read(self, at: np.ndarray, rows: np.ndarray, warps: np.ndarray) -> None:
        """wgmma reads two bytes at each index [n]; what a warp wrote, its own fence must have made visible before."""
        self.note_read(at, 2, rows, warps)
        pairs = at >> 1
        fences = self.unfenced[pairs]
        missing = (fences != FENCED) & (self.fences[rows, np.maximum(self.writer[pairs], 0)] <= fences)
        self._refuse(missing[:, None], "wgmma reads what was written without a fence.proxy.async since")
