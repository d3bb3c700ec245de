"""Kernels with one mistake each, which Triton's interpreter passes and compiled kernels on tests/support/ptx do not.

Some mistakes are in the kernel, others are a compiler's: an edit of the PTX. Run as a script this file prints what
becomes of each on a given architecture; the tests run it so, since this process interprets its kernels.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

SIZE, STEP, K = 64, 64, 256  # of the products' tiles


@triton.jit
def sums(x, out, N, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """out [rows] of x [rows, N]"""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * N + columns, mask=columns < N, other=OTHER)  # [BLOCK]
    tl.store(out + row, tl.sum(values, 0))


@triton.jit
def double(x, out, N, BLOCK: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """out [N] of x [N]"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    pointers = tl.multiple_of(x + at, 16) if ALIGNED else x + at  # [BLOCK]
    values = tl.load(pointers, mask=at < N, other=0.0)  # [BLOCK]
    tl.store(out + at, 2 * values, mask=(at < N) | (not MASKED))


@triton.jit
def total(x, out, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """out [1] of x [programs * BLOCK]"""
    part = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(out, part)
    else:
        tl.store(out, tl.load(out) + part)


@triton.jit
def reverse(x, out, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """out [2, BLOCK] of x [BLOCK]: x, and x backwards, read from what the program wrote"""
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + BLOCK + at, tl.load(out + (BLOCK - 1 - at)))


@triton.jit
def product(a, b, out, K, SIZE: tl.constexpr, STEP: tl.constexpr, FLIP: tl.constexpr):
    """out [SIZE, SIZE] = a b^T, or -a b^T, for a, b [SIZE, K], through pointers or descriptors"""
    rows, steps = tl.arange(0, SIZE), tl.arange(0, STEP)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, STEP):
        if isinstance(a, tl.tensor):
            x = tl.load(a + rows[:, None] * K + k + steps[None, :])  # [SIZE, STEP]
            y = tl.load(b + rows[:, None] * K + k + steps[None, :])  # [SIZE, STEP]
        else:
            x, y = a.load([0, k]), b.load([0, k])
        if FLIP:  # all signs, in registers: y then goes to shared memory by ordinary stores
            y = (y.to(tl.int16, bitcast=True) ^ -32768).to(tl.float16, bitcast=True)
        acc = tl.dot(x, tl.trans(y), acc)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], acc)


@triton.jit
def copies(x, out, N, SIZE: tl.constexpr, STEP: tl.constexpr):
    """2 x to out [SIZE or less, N], for x [SIZE, N], through a descriptor"""
    rows, columns = tl.arange(0, SIZE), tl.arange(0, STEP)
    for column in range(0, N, STEP):
        at = rows[:, None] * N + column + columns[None, :]  # [SIZE, STEP]
        values = 2 * tl.load(x + at, mask=column + columns[None, :] < N, other=1.0)  # [SIZE, STEP]
        out.store([0, column], values.to(out.dtype))


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest, over the largest number."""
    return ((out.double() - truth).abs().max() / truth.abs().max()).item()


def storage(*shape: int, dtype=torch.float32, spare: int = 0) -> torch.Tensor:
    """Ends where its last element does, or `spare` elements later."""
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    return torch.randn(size + spare, generator=generator).to(dtype)[:size].view(shape)


def run_sums(right: bool) -> float:
    x, out = storage(4, 100, spare=28), torch.zeros(4)
    sums[(4,)](x, out, 100, BLOCK=128, OTHER=0.0 if right else None)
    return error(out, x.double().sum(1))


def run_double(masked: bool = True, aligned: bool = False, spare: int = 0) -> float:
    spare = spare if triton.knobs.runtime.interpret else 0  # where the interpreter may write without harm
    x, out = storage(209)[1:], torch.zeros(209 + spare)[1:]
    double[(1,)](x, out, 208, BLOCK=512, MASKED=masked, ALIGNED=aligned)
    return error(out[:208], 2 * x)


def run_total(right: bool) -> float:
    x, out = storage(4 * 64), torch.zeros(1)
    total[(4,)](x, out, BLOCK=64, ATOMIC=right)
    return error(out, x.double().sum())


def run_reverse(right: bool) -> float:
    x, out = storage(256), torch.zeros(2, 256)
    reverse[(1,)](x, out, BLOCK=256, BARRIER=right)
    return error(out[1], x.flip(0))


def run_product(descriptors: bool = False, flip: bool = False) -> float:
    a, b, out = storage(SIZE, K, dtype=torch.float16), storage(SIZE, K, dtype=torch.float16), torch.zeros(SIZE, SIZE)
    wrap = lambda x: TensorDescriptor(x, [SIZE, K], [K, 1], [SIZE, STEP]) if descriptors else x  # noqa: E731
    product[(1,)](wrap(a), wrap(b), out, K, SIZE=SIZE, STEP=STEP, FLIP=flip, num_warps=4, num_stages=3)
    return error(out, (-1 if flip else 1) * (a.double() @ b.double().T))


def run_copies() -> float:
    rows, columns = SIZE - 3, K - 8  # the last box goes over both edges
    x, out = storage(SIZE, columns).half().float(), storage(rows, columns, dtype=torch.float16)
    copies[(1,)](x, TensorDescriptor(out, [rows, columns], [columns, 1], [SIZE, STEP]), columns, SIZE=SIZE, STEP=STEP)
    return error(out, 2 * x[:rows].double())


@dataclass(frozen=True)
class Bug:
    run: Callable[[], float]  # the largest error
    found: str  # in the fault's text; "": the result is wrong
    arch: str = "sm_80"
    edit: tuple[str, str] | None = None  # of the PTX: a pattern, and what replaces it
    control: Callable[[], float] | None = None  # without the bug; None: `run` without the edit


part = functools.partial
BULK = part(run_product, descriptors=True)
AWAIT = r"(?s)cp\.async\.bulk\.wait_group\S*\s+\d;"
BUGS = {
    "masked load without other": Bug(part(run_sums, False), "", control=part(run_sums, True)),
    "an other lost": Bug(part(run_sums, True), "", edit=(r"mov\.u32 (%r\d+), %r\d+;(\s+@%p\d+ ld\.global)", r"\2")),
    "store without mask": Bug(part(run_double, False, spare=304), "0 bytes after out", control=run_double),
    "misaligned vector": Bug(part(run_double, aligned=True), "not a multiple of 16", control=run_double),
    "race between programs": Bug(part(run_total, False), "race: program", control=part(run_total, True)),
    "no barrier around memory": Bug(part(run_reverse, False), "without a barrier", control=part(run_reverse, True)),
    "missing barrier": Bug(run_product, "since the last barrier", edit=(r"bar\.sync\s+0;", "")),
    "read before wait_group": Bug(run_product, "before its copy was", edit=(r"cp\.async\.wait_group\s+\d+;", "")),
    "one wait too short": Bug(run_product, "before its copy was", edit=(r"wait_group\s+2;", "wait_group 3;")),
    "wrong swizzle": Bug(BULK, "", "sm_90", (r"or\.b64 (.*?), 4611686293\d+;", r"or.b64 \1, 9223372105574252544;")),
    "product not awaited": Bug(BULK, "that was not awaited", "sm_90", (r"wgmma\.wait_group\.sync\.aligned \d;", "")),
    "mbarrier not awaited": Bug(BULK, "before its copy", "sm_90", (r"\{\s*\.reg \.pred\s+complete;.*?\n\s*\}", "")),
    "too few bytes announced": Bug(BULK, "forever", "sm_90", (r"(expect_tx\.shared\S* _, \[%r\d+\]), \d+", r"\1, 64")),
    "store not awaited": Bug(run_copies, "that a bulk copy reads", "sm_90", (AWAIT, "")),
    "last store not awaited": Bug(run_copies, "ends while", "sm_90", (AWAIT + r"(?!.*wait_group)", "")),
    "no fence of a store": Bug(run_copies, "without a fence", "sm_90", (r"fence\.proxy\.async\.\S+;", "")),
    "no proxy fence": Bug(part(run_product, flip=True), "without a fence", "sm_90", (r"fence\.proxy\.async\.\S+;", "")),
}  # fmt: skip


def outcome(run: Callable[[], float]) -> float | str:
    """The largest error, or the fault's first line."""
    from ptx.memory import Fault

    try:
        return run()
    except Fault as fault:
        return str(fault).splitlines()[0]


def main(arch: str) -> None:
    """Print {bug: [outcome, outcome without it, whether the PTX changed]}."""
    from ptx.device import running

    found = {}
    for name, bug in BUGS.items():
        if bug.arch == arch:
            with running(arch, edit=bug.edit) as device:
                result = outcome(bug.run)
            with running(arch):
                control = outcome(bug.control or bug.run)
            found[name] = result, control, bug.edit is None or device.edited > 0
    print(json.dumps(found))


@functools.cache
def found_on(arch: str) -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BUGS)
def test_bug(name):
    bug, limit = BUGS[name], 1e-6  # measured without bugs: up to 1.4e-7, in sums of 256 products
    found, control, edited = found_on(bug.arch)[name]
    assert edited, "nothing to edit"
    assert control <= limit
    if bug.found:
        assert isinstance(found, str) and bug.found in found, found
    else:
        assert not found <= limit, found  # a NaN is not
    if triton.knobs.runtime.interpret:
        assert bug.run() <= limit


if __name__ == "__main__":
    main(sys.argv[1])
