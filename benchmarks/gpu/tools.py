"""The GPU experiments that look inside: a table of every kernel, the memory and race checkers, hardware counters.

python -m benchmarks.gpu.tools small | large      the step for a checker or profiler
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.run import Run
from benchmarks.harness.data import Batch, make_batch
from benchmarks.harness.shapes import GPU, TINY
from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs
from lad_kernels.head import dispatch

ROOT = Path(__file__).resolve().parents[2]
OURS = "_kernel"  # every Triton kernel of the package ends so
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)


class DeviceTime(NamedTuple):
    """What the device did under one name."""

    calls: int
    ms: float


def device_times(function: Callable[[], object]) -> dict[str, DeviceTime]:
    """Kernels and copies by name, longest first, of one call of `function`; empty without a device."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    found: dict[str, DeviceTime] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            before = found.get(event.name, DeviceTime(0, 0.0))
            found[event.name] = DeviceTime(before.calls + 1, before.ms + event.time_range.elapsed_us() / 1e3)
    return dict(sorted(found.items(), key=lambda item: -item[1].ms))


def compiled() -> dict[str, dict[str, int]]:
    """What each Triton kernel that this process has launched was compiled to; of several, the last."""
    from triton.runtime.jit import JITFunction

    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("lad_kernels")]:
        for kernel in [x for x in vars(module).values() if isinstance(x, JITFunction)]:
            for caches in kernel.device_caches.values():
                for binary in caches[0].values():
                    found[kernel.__name__] = {
                        "registers": binary.n_regs,
                        "spilled": binary.n_spills,
                        "shared": binary.metadata.shared,
                        "warps": binary.metadata.num_warps,
                    }
    return found


def step(batch: Batch, path: str) -> None:
    """Forward and backward of the loss on `path`."""
    padded = batch.hidden.view(*batch.padded, -1), batch.weight, batch.targets.view(batch.padded), batch.old_logprobs
    with dispatch.force(path):
        out = linear_lad_loss(*padded, advantages=batch.advantages, impl="triton", config=LADConfig(tail_mass=3e-4))
    torch.autograd.grad(out.loss, (batch.hidden, batch.weight))


def kernels(run: Run) -> None:
    """Time of every kernel in a step of each path at three shapes, with what it was compiled to."""
    middle = replace(run.shapes[0], sequences=2 * run.shapes[0].sequences)
    for shape in (middle,) if run.dry_run else (middle, run.shapes[3], run.shapes[1]):
        batch = make_batch(shape, "peaked", torch.bfloat16, run.device)
        for path in run.paths:
            step(batch, path)
            if run.device != "cuda":
                run.add("kernels", shape=str(shape), path=path, kernel="no device", calls=0, ms=0.0, share=0.0)
                continue
            times = device_times(lambda batch=batch, path=path: step(batch, path))
            total, spent = sum(t.ms for t in times.values()), compiled()
            for name, found in list(times.items())[:16]:
                resources = spent.get(name, dict.fromkeys(("registers", "spilled", "shared", "warps")))
                run.add(
                    "kernels",
                    shape=str(shape),
                    path=path,
                    kernel=name[:70],
                    calls=found.calls,
                    ms=found.ms,
                    share=found.ms / total,
                    **resources,
                )
            launches = sum(t.calls for t in times.values())
            run.add(
                "kernels",
                shape=str(shape),
                path=path,
                kernel="all",
                calls=launches,
                ms=total,
                share=1.0,
                **dict.fromkeys(("registers", "spilled", "shared", "warps")),
            )
            if run.time_left() < 5:
                return


def watched(size: str) -> None:
    """The step under a checker or profiler, in bf16, at a small shape or a large one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = size == "large" and device == "cuda"
    batch = make_batch(GPU[0] if large else TINY[0], "peaked", torch.bfloat16, device)
    with first_launches() if large else contextlib.nullcontext():
        for path in ("routed", "one_pass", "two_pass"):
            step(batch, path)
        linear_logprobs(batch.hidden, batch.weight, batch.targets, return_entropy=True, impl="triton")
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def first_launches() -> Iterator[None]:
    """Let a profiler that waits for cudaProfilerStart see the first launch of each Triton kernel, and no other."""
    from triton import knobs

    met: set[str] = set()

    def enter(metadata) -> None:
        if (name := metadata.get()["name"]) not in met:
            met.add(name)
            torch.cuda.profiler.start()

    def leave(metadata) -> None:
        torch.cuda.profiler.stop()

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)


def tool(run: Run, name: str, arguments: list[str], size: str) -> tuple[int | None, str] | None:
    """(exit status or None if it ran out of time, what it said); None, and a reason, where the tool is absent."""
    if shutil.which(name) is None:
        run.missing({name: f"{name} is not on the path"})
        return None
    target = [sys.executable, "-m", "benchmarks.gpu.tools", size]
    environment = dict(os.environ)
    if size == "small":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation: its bounds are then watched
    begin = time.monotonic()
    try:
        subprocess.run(target, cwd=ROOT, check=False, timeout=run.time_left() / 2)  # alone first: kernels compile once
        done = subprocess.run(
            [name, *arguments, *target],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=max(run.time_left() - 1, 1),
        )
    except subprocess.TimeoutExpired as cut:
        said = cut.stdout or b"no output"  # None where it was the run before that took too long
        return None, said.decode(errors="replace") if isinstance(said, bytes) else said
    print(f"{name}: {time.monotonic() - begin:.0f} s")
    return done.returncode, done.stdout


def checked(run: Run, kind: str) -> None:
    """compute-sanitizer over small shapes; library kernels are left out, which makes it several times faster."""
    arguments = ["--tool", kind, "--error-exitcode", "9", "--kernel-name", f"kernel_substring={OURS}"]
    done = tool(run, "compute-sanitizer", arguments, "small")
    if done is None:
        return
    code, said = done
    print(said[-6000:])
    lines = [line for line in said.splitlines() if "SUMMARY" in line] or [line for line in said.splitlines() if line]
    shown = "ran out of time" if code is None else f"exit status {code}"
    run.add("sanitizer", tool=kind, outcome=shown, summary=(lines or ["no output"])[-1][:200])
    if code:
        raise SystemExit(f"{kind}: exit status {code}")


def memcheck(run: Run) -> None:
    """Accesses out of bounds."""
    checked(run, "memcheck")


def racecheck(run: Run) -> None:
    """Races in shared memory."""
    checked(run, "racecheck")


def counters(run: Run) -> None:
    """What limits each kernel, at the first shape, one launch each; the whole text goes to counters.txt."""
    text = Path(os.environ.get("LAD_KERNELS_OUT", run.path.parent)) / "counters.txt"
    arguments = ["--clock-control", "none", "--profile-from-start", "off", "--log-file", str(text), "-f"]
    done = tool(run, "ncu", [*arguments, *(x for s in SECTIONS for x in ("--section", s))], "large")
    if done is None:
        return
    code, said = done
    print(said[-2000:])
    wanted = ("_kernel", "Duration", "Compute (SM) Throughput", "Memory Throughput", "L2 Cache Throughput", "Registers")
    found = text.read_text(errors="replace") if text.exists() else ""
    for line in found.splitlines():
        if any(word in line for word in wanted):
            run.add("counters", line=" ".join(line.split())[:160])
    if code != 0:
        run.missing({"ncu": "ran out of time" if code is None else f"exit status {code}: {(said + found)[-200:]}"})


EXPERIMENTS: dict[str, Callable[[Run], None]] = {f.__name__: f for f in (kernels, memcheck, racecheck, counters)}

if __name__ == "__main__":
    if not torch.cuda.is_available():
        from tests.support import interpreter

        interpreter.install()
    watched(sys.argv[1])
