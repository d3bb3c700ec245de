"""`with running("sm_80") as device:` makes `kernel[grid](...)` compile for that GPU and run its PTX, on CPU tensors.

Everything up to the launch is Triton's own: specialisation, compiler, ptxas. `device.launches` lists what ran.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from triton.compiler.compiler import CompiledKernel

from benchmarks.harness.aot import targeting
from ptx.bulk import TensorMap
from ptx.counters import Counters
from ptx.instructions import Place, translate
from ptx.machine import Code, launch
from ptx.memory import GlobalMemory
from ptx.reader import Kernel, read

PROCESSORS = {"sm_80": 0, "sm_90": 5}  # few, so that the programs of a persistent grid walk over several tiles


@dataclass
class Launch:
    name: str
    grid: tuple[int, int, int]
    seconds: float
    counters: Counters | None


@dataclass
class Device:
    counting: bool = False
    edit: tuple[str, str] | None = None  # a pattern in the PTX and its replacement: a compiler's mistake
    edited: int = 0  # places
    launches: list[Launch] = field(default_factory=list)

    def run(self, compiled: CompiledKernel, x: int, y: int, z: int, *rest) -> None:
        """As Triton's launcher is called: after the grid stream, function, metadata, hooks, then the arguments."""
        began, memory = time.perf_counter(), GlobalMemory()
        values = list(_parameters(compiled, rest[6:], memory))
        text = compiled.asm["ptx"]
        if self.edit:
            text, count = re.subn(*self.edit, text, flags=re.S)
            self.edited += count
        kernel, code = _translated(text, compiled.asm["ttir"])
        values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, of which nothing is asked for
        parameters = dict(zip(kernel.parameters, values, strict=True))
        counters = Counters() if self.counting else None
        seed = len(self.launches)
        launch(kernel, code, (x, y, z), parameters, memory, compiled.metadata.shared, counters=counters, seed=seed)
        self.launches.append(Launch(compiled.name, (x, y, z), time.perf_counter() - began, counters))


@functools.lru_cache(256)
def _translated(ptx: str, ttir: str) -> tuple[Kernel, Code]:
    kernel = read(ptx)
    return kernel, translate(kernel, _unfilled(ttir))


def _unfilled(ttir: str) -> frozenset[Place]:
    """Line and column of masked loads without `other`."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.M))

    def place(name: str) -> Place:
        """Its own, or that of what it names, calls or fuses."""
        found = re.match(r'"[^"]*":(\d+):(\d+)', locations[name])
        return (int(found[1]), int(found[2])) if found else place(re.search(r"#loc\d*", locations[name])[0])

    loads = re.findall(r"tt\.load ([^:]*):.*loc\((#loc\d*)\)", ttir)
    return frozenset(place(name) for operands, name in loads if operands.count("%") == 2)


def _parameters(compiled: CompiledKernel, arguments, memory: GlobalMemory) -> Iterator[int | TensorMap]:
    """Kernel parameters as the launcher passes them; their storages become memory that the launch may touch."""
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [])  # none before sm_90: pointers instead
    for (name, kind), value in zip(compiled.src.signature.items(), arguments, strict=True):
        if kind.startswith(("tensordesc", "*")):
            storage = (value if kind.startswith("*") else value.base).untyped_storage()
            memory.register(name, storage.data_ptr(), storage.nbytes())
        if kind.startswith("tensordesc"):
            if value.padding != "zero":
                raise NotImplementedError("tensor descriptors with NaN outside of the tensor")
            meta, extent = next(metas, None), [int(n) for n in (*value.shape, *value.strides)]
            yield from [_tensor_map(value, meta)] if meta else [value.base.data_ptr(), *extent, 0]  # 0: no NaN outside
            yield from extent
        elif kind.startswith("*"):
            yield value.data_ptr()
        elif kind in ("fp32", "fp16", "bf16"):  # travel as float32
            yield int.from_bytes(struct.pack("f", value), "little")
        elif kind != "constexpr":
            yield int(value)


def _tensor_map(descriptor, meta: dict) -> TensorMap:
    base, size = descriptor.base.data_ptr(), meta["elem_size"]
    if base % 16 or any(s * size % 16 for s in descriptor.strides[:-1]):
        raise ValueError("cuTensorMapEncodeTiled: base and strides must be multiples of 16 bytes")
    box, swizzle = tuple(meta["block_size"]), meta["swizzle"]
    return TensorMap(base, tuple(descriptor.shape), descriptor.strides[0], size, box, swizzle)


@contextlib.contextmanager
def running(arch: str, processors: int | None = None, **options) -> Iterator[Device]:
    """`processors`: of the GPU that host code asks for; `options`: fields of Device."""
    device = Device(**options)
    saved = CompiledKernel._init_handles, CompiledKernel.run
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = property(lambda self: functools.partial(device.run, self))
    try:
        with targeting(arch, PROCESSORS[arch] if processors is None else processors):
            yield device
    finally:
        CompiledKernel._init_handles, CompiledKernel.run = saved
