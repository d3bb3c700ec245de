"""Time, memory, error and bound of the paths that skip work, next to eager torch, and on high-entropy data.

The gate is the measurement itself: an exact entry must be within the tolerance rule's float32 constant (or twice the
error of eager torch), a routed one within its reported bound, before its row is written.
What the package chooses may take 1.1 times the best path that can be forced.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import machine, sparse
from benchmarks.harness.data import fit, make_batch, missing
from benchmarks.harness.measure import Rounds, ratio, summary
from benchmarks.harness.provider import Provider
from benchmarks.harness.shapes import REAL_TOKENS
from lad_kernels.testing import CONTRACT_MARGIN, FP32_TOLERANCE

MIB = 2**20
SLACK = 1.1
SHORT_ROUNDS = 40  # of calls of 60 ms: one path took 0.90 to 1.14 of its own time in twelve runs of five, 1.00 after 40
REGIONS = ("dH", "dW target rows", "dW other rows")


@pytest.mark.parametrize("case", sparse.CASES)
def test_sparse(bench, data, case, rounds):
    shape = sparse.shape_of(bench.set_name, data)
    batch = sparse.make(shape, data, case, bench.dtype, bench.device)
    entries = sparse.entries(data, case)
    true, found = sparse.truth(batch, case), {}
    for entry in entries:
        _, backward = sparse.provider(entry, case).step(batch)
        found[entry] = sparse.errors(*backward(), *true, batch.targets)
    del true
    eager = found[entries[0]]
    for entry in entries[1:]:
        metrics = sparse.outputs[entry].metrics
        bounds = {"dH absolute": metrics["dhidden_bound"].item(), "dW absolute": metrics["dweight_bound"].item()}
        exact = not any(bounds.values())
        for region in REGIONS:
            allowed = max(FP32_TOLERANCE, CONTRACT_MARGIN * eager[region])
            assert not exact or bench.device == "cuda" or found[entry][region] <= allowed, (entry.name, region)
        for region, bound in bounds.items():
            assert exact or found[entry][region] <= bound, (entry.name, region)
    run = Rounds([sparse.provider(e, case) for e in entries], [batch], bench.clock)
    short = bench.set_name == "small" and data in ("flat", "peaked")
    for _ in range(max(rounds, SHORT_ROUNDS) if short else rounds):
        run()
    peaks = sparse.peaks_cpu(bench.set_name, data, case) if bench.device == "cpu" else {}
    add_rows(bench, shape, data, case, batch, entries, found, run, peaks)
    if case == "off-policy" and bench.set_name != "tiny":
        check_choices({p.name: samples for p, samples in run.samples.items()})


def keeping_subnormals(entry: sparse.Entry, keep: bool) -> Provider:
    """The entry in a process that keeps subnormal numbers, as Python starts, or in one that flushes them."""
    usual = sparse.provider(entry, "off-policy")

    def forward(batch):
        torch.set_flush_denormal(not keep)
        return usual.forward(batch)

    return replace(usual, name=f"{entry.name}, subnormals {'kept' if keep else 'flushed'}", forward=forward)


def test_what_flushing_hides(bench, rounds):
    """All other rows flush subnormal numbers, which spares stored logits the most at low temperatures.

    One thread, because others keep the mode in which they were started.
    """
    data = "real, T=0.3"
    if reason := missing(data):
        pytest.skip(f"{reason}; lost: what subnormal numbers cost")
    if bench.device == "cuda" or bench.set_name not in ("small", "full"):
        pytest.skip("it is about CPUs, on real states; lost: nothing elsewhere")
    if not machine.flush_subnormals():
        pytest.skip(f"{machine.NOT_FLUSHED}; lost: the comparison")
    shape, threads = fit(replace(REAL_TOKENS["small"], length=16), data), torch.get_num_threads()
    batch = make_batch(shape, data, bench.dtype, bench.device)
    entries = [e for e in sparse.ENTRIES if e.name in (sparse.EAGER, "exact, as chosen")]
    run = Rounds([keeping_subnormals(e, keep) for e in entries for keep in (False, True)], [batch], bench.clock)
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            run()
    finally:
        torch.set_num_threads(threads)
        machine.flush_subnormals()
    flushed = run.samples[run.providers[0]]
    for provider, samples in run.samples.items():
        total = summary(samples)["total_ms"]
        row = {"entry": provider.name, "total_ms": total, "vs_eager_flushed": ratio(samples, flushed)}
        bench.results.add("subnormals", shape=str(shape), data=data, **row)


def check_choices(samples: dict[str, list[tuple[float, float]]]) -> None:
    """What the package chose takes at most 1.1 times what any path that could have been forced takes."""
    forced = [name for name in samples if ", " in name and "chosen" not in name]
    for chosen in ("exact, as chosen", f"tail_mass {sparse.TAIL_MASS:g}, as chosen"):
        for path in forced:
            if path.startswith("exact") or not chosen.startswith("exact"):
                assert ratio(samples[chosen], samples[path]) <= SLACK, (chosen, path)


def add_rows(bench, shape, data, case, batch, entries, found, run, peaks) -> None:
    samples = {p.name: s for p, s in run.samples.items()}
    for entry in entries:
        row = {"shape": str(shape), "data": data, "case": case, "entry": entry.name}
        row |= {"total_ms": summary(samples[entry.name])["total_ms"]}
        row |= {"vs_eager": ratio(samples[entry.name], samples[entries[0].name])}
        if entry.name in peaks:
            row["mib_beyond_gradients"] = max(peaks[entry.name] - batch.gradient_bytes, 0) / MIB
        row |= {f"error {k}": found[entry][k] for k in REGIONS}
        if entry.config is not None:
            metrics = sparse.outputs[entry].metrics
            unit = shape.tokens * shape.hidden_size * shape.vocab_size
            row |= {"flops / N D V": metrics["head_flops"].item() / unit, "kept_share": metrics["kept_share"].item()}
            scale = {k: found[entry][f"{k} absolute"] for k in ("dH", "dW")}
            row |= {
                "bound over error dH": metrics["dhidden_bound"].item() / scale["dH"],
                "bound over error dW": metrics["dweight_bound"].item() / scale["dW"],
            }
        bench.results.add("sparse", **row)
