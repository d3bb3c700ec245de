"""What happened on the device."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from pathlib import Path

import torch

GRANULE = 512  # bytes; the caching allocator rounds up to it
_OUTSIDE = ("/torch/", "/triton/", "/cuda_device/", "/contextlib.py", "/threading.py", "/functools.py")


class Log:
    """Counters since `clear`, and bytes of storages that live now (`allocated`) and at most (`peak`)."""

    def __init__(self) -> None:
        self.syncs: Counter[tuple[str, str]] = Counter()  # (operation, line)
        self.copies: Counter[str] = Counter()  # host to device, by line
        self.launches: Counter[str] = Counter()  # by kernel of Triton's
        self.operations: Counter[str] = Counter()  # of PyTorch that compute, fill or cast: one kernel each, or a few
        self.moved = 0  # bytes that kernels load and store, and of tensors that operations are given and make
        self.allocated = self.peak = 0
        self._tensors: Counter[int] = Counter()  # that show a storage, by its address

    def clear(self) -> None:
        """Forget what happened; what lives goes on living."""
        self.syncs.clear()
        self.copies.clear()
        self.launches.clear()
        self.operations.clear()
        self.moved = 0
        self.peak = self.allocated

    def sync(self, operation: str) -> None:
        self.syncs[operation, line()] += 1

    def copy(self) -> None:
        self.copies[line()] += 1

    def hold(self, owner: object, storage: torch.UntypedStorage) -> None:
        """Count `storage` for as long as any `owner` of it lives."""
        address, size = storage.data_ptr(), -(-storage.nbytes() // GRANULE) * GRANULE
        if not size:
            return
        self._tensors[address] += 1
        if self._tensors[address] == 1:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        weakref.finalize(owner, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            del self._tensors[address]
            self.allocated -= size


LOG = Log()


def line() -> str:
    """The innermost line outside torch, Triton and this package."""
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in _OUTSIDE):
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
    return "?"
