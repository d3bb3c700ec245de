"""pytest plugin: what the package's kernels are launched with in the interpreter, once for each way to compile them.

    RECORD=FOLDER PYTHONPATH=tests/support:tests/launch python -m pytest -p cuda_device.plugin -p record tests/head

Every process appends pickled `(module, kernel, ((argument, description), ...))` to a file of its own; ahead.py compiles
them. A description is a tag and what decides the compiled code: dtype and alignment of a tensor, a number's class.
"""

from __future__ import annotations

import inspect
import os
import pickle
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_launch = InterpretedFunction.run
_file = (Path(os.environ["RECORD"]) / f"{os.getpid()}.pickle").open("ab")
_known: set[str] = set()


def constant(x: Any) -> tuple:
    """Of an argument that is compiled in."""
    if isinstance(x, InterpretedFunction):
        return "function", x.fn.__module__, x.fn.__qualname__
    if isinstance(x, tuple):
        return "tuple", tuple(map(constant, x))
    return "value", x


def argument(x: Any) -> tuple:
    """Of an argument that a kernel gets when it runs."""
    if isinstance(x, TensorDescriptor):
        return "descriptor", str(x.base.dtype)[6:], tuple(map(int, x.block_shape))
    if isinstance(x, Tensor):
        return "tensor", str(x.dtype)[6:], x.data_ptr() % 16
    if isinstance(x, float):
        return "value", 1.5
    if isinstance(x, int) and not isinstance(x, bool) and x != 1:
        return "value", (16 if x % 16 == 0 else 17) + (0 if abs(x) < 2**31 else 2**40)
    return constant(x)


def run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """Record, then interpret."""
    if self.fn.__module__.startswith("lad_kernels"):
        parameters = inspect.signature(self.fn).parameters
        fixed = {n for n, p in parameters.items() if "constexpr" in str(p.annotation)}
        given = dict(zip(parameters, args)) | kwargs
        described = {n: constant(x) if n in fixed or n not in parameters else argument(x) for n, x in given.items()}
        row = (self.fn.__module__, self.fn.__name__, tuple(described.items()))
        if repr(row) not in _known:
            _known.add(repr(row))
            pickle.dump(row, _file)
            _file.flush()
    return _launch(self, *args, grid=grid, warmup=warmup, **kwargs)


InterpretedFunction.run = run
