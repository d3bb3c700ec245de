"""Compile what host functions launch, for any GPU, on a machine without one; and read what the compiler spent.

`compiling(target)` makes every `kernel[grid](...)` compile for `target` instead of running, specialised exactly as a
launch would specialise it (dtypes, alignment, integers divisible by 16); host code meets a stand-in driver and, through
`tile_table.probe`, a stand-in device. `resources(kernel)` reads registers, spills, shared memory and the instructions
that matter with the tools inside the Triton wheel. Kernels must not have been imported in an interpreter process.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lad_kernels.head.kernels import tile_table

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = {"sm_80": 0, "sm_86": 0, "sm_90": 132, "sm_100": 148, "gfx942": 0}  # as tile_table.probe would answer


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel costs. On gfx942 `registers` counts VGPRs and `spilled` spilled VGPRs."""

    name: str
    registers: int
    spilled: int  # bytes of spill stores and loads, and of local memory
    shared: int  # bytes
    warps: int
    instructions: dict[str, int]


class _Driver:
    """As much of a driver as JITFunction.run asks for before a launch."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[dict]:
    """Yield a dict that fills with (kernel name, compiled kernel) by hash."""
    run, probe, active = JITFunction.run, tile_table.probe, driver._active
    compiled, met = {}, set()

    def compile_only(self, *arguments, grid, warmup, **options):
        if self not in met:  # what it compiled for another target is cached under the same device number
            self.device_caches.clear()
            met.add(self)
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = (self.__name__, kernel)
        return kernel

    driver.set_active(_Driver(TARGETS[arch]))
    tile_table.probe = lambda device: tile_table.Device(arch, PROCESSORS[arch])
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run, tile_table.probe, driver._active = run, probe, active


def _tool(name: str) -> str:
    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def resources(name: str, kernel, arch: str) -> Resources:
    """Registers, spills, shared memory and counts of tensor-core and bulk-copy instructions."""
    if arch == "gfx942":
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        counts = {"v_mfma": len(re.findall(r"\bv_mfma", text))}
        return Resources(name, registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps, counts)
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, local = (int(x) for x in found.groups())
    ptx = kernel.asm["ptx"]
    patterns = {
        "mma.sync": r"mma\.sync",
        "wgmma": r"wgmma\.mma_async",
        "tcgen05": r"tcgen05\.mma",
        "tma": r"cp\.async\.bulk\.tensor\.\dd\.shared",
        "cp.async": r"cp\.async\.c[ag]\.",
    }
    counts = {key: len(re.findall(pattern, ptx)) for key, pattern in patterns.items()}
    return Resources(name, registers, stack + local, kernel.metadata.shared, kernel.metadata.num_warps, counts)
