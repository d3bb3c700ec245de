"""Peak memory of one forward and backward beyond the inputs, and beyond inputs and gradients.

CPU: resident memory of a process of its own, one provider after the other. CUDA: the allocator's peak. Of made data
`flat` alone: only a routed backward allocates by the values of its input, and for that the states of a policy count.
"""

from __future__ import annotations

from benchmarks.harness.data import MADE

MIB = 2**20


def test_memory(bench, shape, data):
    item = bench.dtype.itemsize
    gradients = (shape.tokens + shape.vocab_size) * shape.hidden_size * item  # dH and dW
    for job, peaks in bench.peaks(shape, data).items():
        assert any(name.startswith("lad_kernels") for name in peaks)
        for name, peak in peaks.items():
            if isinstance(peak, str):
                bench.results.missing[f"{name}, memory"] = peak
                continue
            bench.results.add(
                "memory",
                job=job,
                shape=str(shape) if data in MADE else f"{shape}, {data}",
                provider=name,
                ours=name.startswith("lad_kernels"),
                peak_mib=peak / MIB,
                beyond_gradients_mib=max(peak - gradients, 0) / MIB,
            )
