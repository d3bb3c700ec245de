"""Time, interleaved; and peak memory, in a process of its own on CPU.

All providers of a comparison run once per round, in another order each time, so that load on the machine and the memory
that a provider leaves to the next affect all of them; ratios are taken round by round and their median is reported.
CPU: wall clock, or one thread's CPU time where the machine is too busy for that. CUDA: events, and inputs that rotate
among copies larger than the cache.

python -m benchmarks.harness.measure SET SHAPE DATA     peak memory of every provider's step on CPU, in bytes, as JSON
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.data import REAL, Batch, fit, make_batch
from benchmarks.harness.eager import EAGER
from benchmarks.harness.machine import cores, flush_subnormals
from benchmarks.harness.provider import SLOW, Provider
from benchmarks.harness.providers import TAIL_MASS, all_providers, split_available
from benchmarks.harness.shapes import REAL_TOKENS, SETS, TINY, Shape

ROOT = Path(__file__).resolve().parents[2]
M_MMAP_THRESHOLD = -3  # of malloc.h
Clock = Callable[[], float]
FOCUS = (EAGER, "torch, 512-row checkpoints", "lad_kernels (torch)", f"lad_kernels (torch), tail_mass {TAIL_MASS:g}")


def runs_on_cpu(provider: Provider, set_name: str, shape: Shape, *, memory: bool = False) -> bool:
    """Whether a CPU has the time: providers that start slowly run at one shape, the full size is left to FOCUS."""
    of_policy = shape not in SETS[set_name]  # whose head is small
    has_time = shape == SETS[set_name][0] or (of_policy and provider.tags != SLOW)
    if provider.tags and (memory or not has_time):
        return False
    return of_policy or set_name != "full" or provider.name in FOCUS


def time_step(provider: Provider, batch: Batch, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """Seconds of (forward, backward); `clock` is for CPU alone."""
    if batch.hidden.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        _, backward = provider.step(batch)
        marks[1].record()
        backward()
        marks[2].record()
        marks[2].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
    start = clock()
    _, backward = provider.step(batch)
    middle = clock()
    backward()
    return middle - start, clock() - middle


class Rounds:
    """Calling it runs every provider once; `samples` holds their (forward, backward) seconds, round by round."""

    def __init__(self, providers: list[Provider], batches: list[Batch], clock: Clock = time.perf_counter):
        self.providers, self.batches, self.clock = list(providers), batches, clock
        self.samples: dict[Provider, list[tuple[float, float]]] = {p: [] for p in providers}
        self.failed: dict[str, str] = {}
        self.count = 0

    def __call__(self) -> None:
        batch = self.batches[self.count % len(self.batches)]
        order = random.Random(self.count).sample(self.providers, len(self.providers))
        self.count += 1
        for provider in order:
            self.run_one(provider, batch)

    def run_one(self, provider: Provider, batch: Batch) -> None:
        try:
            self.samples[provider].append(time_step(provider, batch, self.clock))
        except Exception as error:  # a peer's failure is a result; ours is a failure of the run
            if provider.ours:
                raise
            self.failed[provider.name] = describe(error)
            self.providers.remove(provider)
            del self.samples[provider]

    def warm(self) -> None:
        """One round whose times are thrown away: imports, compilation, first touch of memory."""
        self()
        for samples in self.samples.values():
            samples.clear()


def describe(error: Exception) -> str:
    """The last line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {(lines[-1] if lines else '')[:140]}".replace("|", "/")


def quartiles(seconds: list[float]) -> list[float]:
    """[25 %, median, 75 %] in milliseconds."""
    values = [1e3 * s for s in seconds]
    if len(values) < 2:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def summary(samples: list[tuple[float, float]]) -> dict[str, list[float]]:
    forward, backward = zip(*samples)
    return {
        "forward_ms": quartiles(forward),
        "backward_ms": quartiles(backward),
        "total_ms": quartiles([f + b for f, b in samples]),
    }


def ratio(samples: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> float:
    """Median over rounds of total time / baseline's total time."""
    return statistics.median(sum(a) / sum(b) for a, b in zip(samples, baseline))


def ratio_interval(
    samples: list[tuple[float, float]], baseline: list[tuple[float, float]], draws: int = 2000
) -> tuple[float, float, float]:
    """(2.5 %, median, 97.5 %) of the median paired ratio, by bootstrap over rounds with a fixed seed."""
    ratios = [sum(a) / sum(b) for a, b in zip(samples, baseline)]
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], statistics.median(ratios), medians[-draws // 40]


def claim(lad: Provider, grpo: Provider, eager: Provider, batches: list[Batch], pairs: int) -> dict[str, object]:
    """The time part of the row "LAD costs what GRPO costs": interleaved pairs whose order alternates.

    On CPU one thread runs and its own CPU time counts: a few hundred small operations are at stake, and on a shared
    machine each barrier between threads can cost more than all of them.
    """
    clock, threads = time.process_time, torch.get_num_threads()
    torch.set_num_threads(1)
    paired, against = Rounds([lad, grpo], batches, clock), Rounds([lad, eager], batches, clock)
    for rounds, count in ((paired, pairs), (against, max(min(pairs, 3), pairs // 10))):
        rounds.warm()
        for _ in range(count):
            rounds()
    torch.set_num_threads(threads)
    low, middle, high = ratio_interval(paired.samples[lad], paired.samples[grpo])
    return {
        "pairs": pairs,
        "lad_ms": summary(paired.samples[lad])["total_ms"],
        "grpo_ms": summary(paired.samples[grpo])["total_ms"],
        "time_ratio": middle,
        "interval": [low, high],
        "lad_to_eager_grpo_time": ratio(against.samples[lad], against.samples[eager]),
    }


def peak_bytes_cuda(provider: Provider, batch: Batch) -> int:
    """Most memory allocated during one step beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, backward = provider.step(batch)
    gradients = backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del gradients
    return peak


def peaks_cpu(set_name: str, shape: Shape, data: str) -> dict[str, dict[str, int | str]]:
    """{job: {provider: peak bytes, or why it failed}} of all providers, from one fresh process.

    For `flat` providers that drop a tail get peaked data: no other allocates by the values of its input.
    """
    command = [sys.executable, "-m", "benchmarks.harness.measure", set_name, shape.name, data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_bytes_cpu(provider: Provider, batch: Batch) -> int:
    """Highest resident memory during one step minus that just before it.

    A step on a tiny batch has loaded libraries; compiled providers also run once at full size, so that their
    compiler's memory is not counted. Writing 5 to clear_refs resets the high-water mark (Linux).
    """
    provider.step(make_batch(TINY[0], "flat", torch.float32, "cpu"))[1]()
    if any(tag.startswith("compiled") for tag in provider.tags):
        provider.step(batch)[1]()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    _, backward = provider.step(batch)
    gradients = backward()
    peak = resident("VmHWM") - before
    del gradients
    return peak


def all_peaks_cpu(set_name: str, shape_name: str, data: str) -> dict[str, dict[str, int | str]]:
    """What `peaks_cpu` returns, measured in this process."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that freed tensors leave the resident memory at once
    torch.set_num_threads(cores())
    if data in REAL:
        shape = fit(REAL_TOKENS[set_name], data)
        batches = dict.fromkeys((False, True), make_batch(shape, data, torch.float32, "cpu"))
    else:
        shape = next(s for s in SETS[set_name] if s.name == shape_name)
        batches = {False: make_batch(shape, data, torch.float32, "cpu")}
        batches[True] = make_batch(shape, "peaked", torch.float32, "cpu", weight=batches[False].weight.detach())
    found: dict[str, dict[str, int | str]] = {}
    for provider in split_available(all_providers(), batches[False])[0]:
        if not runs_on_cpu(provider, set_name, shape, memory=True):
            continue
        try:
            found.setdefault(provider.job, {})[provider.name] = peak_bytes_cpu(provider, batches[provider.promise > 0])
        except Exception as error:  # a peer's failure is a result
            if provider.ours:
                raise
            found.setdefault(provider.job, {})[provider.name] = describe(error)
    return found


if __name__ == "__main__":
    flush_subnormals()
    print(json.dumps(all_peaks_cpu(*sys.argv[1:])))
