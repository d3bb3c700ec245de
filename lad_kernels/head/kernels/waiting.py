"""A number of the device that the host needs, read while the device goes on with what was launched since."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """`read` waits for what had been launched when this was made, and for nothing behind it."""

    def __init__(self, value: Tensor):
        self._value = value.to("cpu", non_blocking=True)  # on a GPU into pinned memory
        self._done = None
        if value.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """The value, on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._value
