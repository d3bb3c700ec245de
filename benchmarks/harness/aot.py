"""Compile what host functions launch, for any GPU, on a machine without one; and read the resources it needs.

`compiling(target)` makes every `kernel[grid](...)` compile for `target` instead of running, specialised exactly as a
launch would specialise it (dtypes, alignment, integers divisible by 16). `targeting` gives host code a placeholder
driver and, through `tile_table.probe`, a placeholder device; tests/support/ptx/ runs kernels under it.
`resources(kernel)` reads registers, spills, shared memory and the instructions that matter with the tools inside the
Triton wheel. Kernels must not have been imported in an interpreter process.
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


@dataclass(frozen=True)
class Target:
    """One architecture that kernels are compiled for, and what the tests expect of it."""

    gpu: GPUTarget
    processors: int  # as tile_table.probe would answer
    shared: int  # bytes of shared memory that a kernel may take
    tensor_core: str  # a key of Resources.instructions
    copies: str = ""  # the same of copies into shared memory
    whole: bool = True  # every case of the tables is compiled for it, or the most demanding alone

    @property
    def is_cuda(self) -> bool:
        return self.gpu.backend == "cuda"


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 0, 163 << 10, "mma.sync", "cp.async"),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 0, 99 << 10, "mma.sync", "cp.async", whole=False),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 227 << 10, "wgmma", "tma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 227 << 10, "tcgen05", "tma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 0, 64 << 10, "v_mfma"),
}
FULLEST = "sm_90"  # what is compiled for one target alone is compiled for this one


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel costs. On AMD `registers` counts VGPRs and `spilled` spilled VGPRs."""

    name: str
    registers: int
    spilled: int  # bytes of spill stores and loads, and of local memory
    shared: int  # bytes
    warps: int
    instructions: dict[str, int]


class _Driver:
    """As much of a driver as JITFunction.run asks for before a launch."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch].gpu

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.arch)  # Triton keeps compiled kernels by device number

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def targeting(arch: str, processors: int) -> Iterator[None]:
    """Launch code and Triton see a GPU of this architecture with so many processors (0: one program per tile)."""
    probe, active = tile_table.probe, driver._active
    driver.set_active(_Driver(arch))
    tile_table.probe = lambda device: tile_table.Device(arch, processors)
    try:
        yield
    finally:
        tile_table.probe, driver._active = probe, active


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[dict]:
    """Yield a dict that fills with (kernel name, compiled kernel) by hash."""
    run, compiled = JITFunction.run, {}

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = (self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        with targeting(arch, TARGETS[arch].processors):
            yield compiled
    finally:
        JITFunction.run = run


def _tool(name: str) -> str:
    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def sass(kernel) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions of a kernel compiled for NVIDIA, and (place, place it goes to) of every jump among them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"\s+", " ", instruction[1]).strip())
    targets = [re.search(r"BRA.*`\((\.L_x_\d+)\)", line) for line in code]
    return code, [(i, labels[t[1]]) for i, t in enumerate(targets) if t and t[1] in labels]


def resources(name: str, kernel, arch: str) -> Resources:
    """Registers, spills, shared memory and counts of tensor-core and bulk-copy instructions."""
    if not TARGETS[arch].is_cuda:
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
        "wide stores": r"st\.global\.v4|bulk\.tensor\.\dd\.global",  # 16 bytes, a box
        "may fuse": r"\b(?:mul|add|sub)(?:\.ftz)?\.f32",  # ptxas leaves those with a rounding, .rn, alone
    }
    counts = {key: len(re.findall(pattern, ptx)) for key, pattern in patterns.items()}
    return Resources(name, registers, stack + local, kernel.metadata.shared, kernel.metadata.num_warps, counts)
