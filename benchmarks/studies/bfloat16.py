"""bfloat16 on a CPU: the head as it is, and with PyTorch's own switch for products of float32 in bfloat16.

    python -m benchmarks.studies.bfloat16     five minutes of one core

The head widens bfloat16 to float32 (docs/numerics.md). `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` lets
oneDNN multiply these exact values on a CPU's bfloat16 units (AMX) with float32 sums. It is global to the process, so
the package never sets it; who trains on a CPU may.
"""

from __future__ import annotations

import time

import torch

from benchmarks.harness import gate, machine
from benchmarks.harness.data import make_batches
from benchmarks.harness.eager import EAGER
from benchmarks.harness.measure import Rounds, ratio_interval, summary
from benchmarks.harness.providers import all_providers
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.shapes import Shape

FILE = RESULTS / "cpu-2core" / "bfloat16.json"
SHAPE = Shape("a 0.5B head", 8, 128, 896, 32_768, "long enough for products to run at their rate")
ROUNDS = 15
SWITCHED = {"as it is": "none", "bf16 products": "bf16"}


def main() -> None:
    torch.set_num_threads(1)
    machine.flush_subnormals()
    results = Results(machine.describe("cpu", "python -m benchmarks.studies.bfloat16"))
    results.machine["notes"] = ["One thread; CPU time; subnormal numbers are flushed to zero."]
    batches = make_batches(SHAPE, "flat", torch.bfloat16, "cpu")
    checked = gate.gate_batch("flat", torch.bfloat16, "cpu")
    for switch, precision in SWITCHED.items():
        torch.backends.mkldnn.matmul.fp32_precision = precision
        for job in ("head", "ce", "lad", "grpo"):
            chosen = [p for p in all_providers(job) if p.name in (EAGER, "lad_kernels (torch)")]
            rounds = Rounds(chosen, batches, time.thread_time)
            rounds.warm()
            for _ in range(ROUNDS):
                rounds()
            for p, samples in rounds.samples.items():
                row = {
                    "provider": p.name,
                    "ms": summary(samples)["total_ms"],
                    "errors": gate.measure(p, checked).errors,
                }
                low, middle, high = ratio_interval(samples, rounds.samples[chosen[0]])
                row |= {"vs_eager": middle, "interval": [low, high]}
                results.add("bfloat16 on a CPU", shape=str(SHAPE), float32=switch, job=job, **row)
                print(switch, job, *row.values(), flush=True)
    results.save(FILE)


if __name__ == "__main__":
    main()
