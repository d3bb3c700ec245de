"""Time of every provider, forward and backward apart, interleaved; on flat and on peaked data.

pytest-benchmark times whole rounds (all providers once); the split is in the report.
"""

from __future__ import annotations

import pytest

from benchmarks.harness.measure import Rounds
from benchmarks.harness.provider import JOBS


@pytest.mark.parametrize("job", tuple(JOBS))
def test_speed(benchmark, bench, shape, data, job, rounds):
    providers, verdicts = bench.providers(job, shape, data)
    assert providers
    run = Rounds(providers, bench.batches(shape, data), bench.clock)
    if bench.set_name != "full":  # there a step takes long enough, and the gate has loaded every library
        run.warm()
    benchmark.group = f"{job}, {data}, {shape}"
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=0)
    bench.add_speed(run, job, shape, data, verdicts)
    assert any(p.ours for p in run.samples)
