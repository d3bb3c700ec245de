"""The first experiment on a GPU: does every path run at all, is it right, how long does a first call take?

Each case runs in a process of its own, all at once, because a kernel that traps breaks its process and compiling takes
seconds: `python -m benchmarks.gpu.smoke CASE DEVICE` prints one JSON line. Truth is `impl="torch"` on the same inputs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.plan import SLOW
from benchmarks.gpu.run import Run
from benchmarks.harness.data import Batch, make_batch
from benchmarks.harness.shapes import Shape
from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs
from lad_kernels.head import dispatch
from lad_kernels.testing import relative_error

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape("smoke", 4, 80, 256, 4096, "the layout of real heads, so that compiled kernels serve the experiments too")
TINY = Shape("smoke", 2, 20, 64, 512, "for the interpreter")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Two right implementations differ by their roundings: 16-bit dW by up to 2.4 times 2^-9 (one pass), float32 by 3e-6.
# A smoke test needs no more than an order of magnitude.
LIMIT = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 5e-5}
EXACT, TAILED = LADConfig(tail_mass=0.0), LADConfig(tail_mass=3e-4, tail="drop")


@dataclass(frozen=True)
class Case:
    """One call: a path of the loss, or None for the scoring head."""

    path: str | None
    dtype: str
    data: str = "peaked"
    entropy: bool = False
    softcap: float | None = None


CASES = {
    "score": Case(None, "bf16", entropy=True),
    "two passes": Case("two_pass", "bf16"),
    "one pass": Case("one_pass", "bf16"),
    "routed": Case("routed", "bf16"),
    "two passes, softcap": Case("two_pass", "bf16", softcap=30.0),
    "two passes, fp16": Case("two_pass", "fp16"),
    "one pass, fp32": Case("one_pass", "fp32", "flat"),
    "routed, fp32": Case("routed", "fp32"),
}


def call(case: Case, batch: Batch, impl: str) -> tuple[Tensor, ...]:
    """Log-probs [N] (and entropy), dH [N, D], dW [V, D]."""
    if case.path is None:
        out = linear_logprobs(
            batch.hidden, batch.weight, batch.targets, return_entropy=case.entropy, softcap=case.softcap, impl=impl
        )
        found = torch.autograd.grad(out.logprobs, (batch.hidden, batch.weight), batch.upstream)
        return out.logprobs.detach(), out.entropy.detach(), *found
    padded = batch.hidden.view(*batch.padded, -1), batch.weight, batch.targets.view(batch.padded), batch.old_logprobs
    config = TAILED if case.path == "routed" else EXACT
    with dispatch.force(case.path) if impl == "triton" or case.path == "routed" else contextlib.nullcontext():
        out = linear_lad_loss(*padded, advantages=batch.advantages, config=config, softcap=case.softcap, impl=impl)
    return out.logprobs, *torch.autograd.grad(out.loss, (batch.hidden, batch.weight))


def main(name: str, device: str) -> None:
    """Compare, time the first and a later call, print."""
    case = CASES[name]
    if device == "cpu":
        from tests.support import interpreter

        interpreter.install()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    batch = make_batch(SMALL if device == "cuda" else TINY, case.data, DTYPES[case.dtype], device)
    truth = call(case, batch, "torch")
    seconds = []
    for _ in range(2):
        synchronize()
        begin = time.perf_counter()
        found = call(case, batch, "triton")
        synchronize()
        seconds.append(time.perf_counter() - begin)
    errors = [relative_error(x, y) for x, y in zip(found, truth)]
    worst = max(errors) if all(e == e for e in errors) else float("inf")
    print(json.dumps({"error": worst, "first_call_s": seconds[0], "next_call_ms": 1e3 * seconds[1]}))


def smoke(run: Run) -> None:
    """All cases at once; what traps, hangs or is wrong is named, and fails the experiment."""
    command = [sys.executable, "-m", "benchmarks.gpu.smoke"]
    cases = list(CASES)[: 3 if run.dry_run else None]
    children = {
        name: subprocess.Popen(
            [*command, name, run.device],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in cases
    }
    wrong = []
    for name, child in children.items():
        case, row = CASES[name], {}
        try:
            out, err = child.communicate(timeout=max(run.time_left() - 1, 0.1))
            row = json.loads(out.splitlines()[-1])
            verdict = "right" if row["error"] <= LIMIT[case.dtype] else "WRONG"
        except subprocess.TimeoutExpired:
            verdict = SLOW
        except (IndexError, ValueError):
            print(f"{name}: {err[-3000:]}")
            verdict = f"exit status {child.returncode}: {(err.strip().splitlines() or ['no message'])[-1][-200:]}"
        finally:
            child.kill()
        # Only the plain bf16 cases stand for a path that later experiments take.
        path = case.path if case.dtype == "bf16" and case.softcap is None and case.path else ""
        run.add("smoke", case=name, path=path, dtype=case.dtype, verdict=verdict, allowed=LIMIT[case.dtype], **row)
        wrong += [name] * (verdict != "right")
    if wrong:
        raise SystemExit(f"not right: {', '.join(wrong)}")


EXPERIMENTS: dict[str, Callable[[Run], None]] = {"smoke": smoke}

if __name__ == "__main__":
    main(*sys.argv[1:])
