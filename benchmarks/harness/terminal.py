"""Prints the results of one run: `python -m benchmarks.harness.terminal FILE`. It does not import torch."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness import expected
from benchmarks.harness.results import RESULTS, Results, number, spread


def short(run: Results, entries: list[dict] | None = None) -> str:
    """Ceilings, the claim, totals, the status of experiments, and which predictions are off."""
    lines = [run.machine["device"], *run.machine.get("notes", []), ""]
    for r in run.tables.get("ceilings", [])[:10]:
        lines.append(f"{r['what']}: " + (f"{r['tflops']:.0f} TFLOP/s" if r["tflops"] else f"{r['gb_per_s']:.0f} GB/s"))
    for r in run.tables.get("lad against grpo", []):
        memory = f", memory {r['memory_ratio']:.3f}" if "memory_ratio" in r else ""
        lines.append(f"LAD / GRPO, {r['shape']}, {r['data']}: time {r['time_ratio']:.3f}{memory}")
    for r in run.tables.get("speed", []):
        if r["job"] in ("head", "grpo") and r["shape"] == run.tables["speed"][0]["shape"]:
            lines.append(
                f"{r['job']}, {r['data']}, {r['provider']}: {spread(r['total_ms'])} ms, {number(r['vs_eager'])}x"
            )
    tiles = [r for r in run.tables.get("forward tiles", []) if r["ms"] and not r["entropy"]]
    for r in sorted(tiles, key=lambda r: -r["tflops"])[:4]:
        lines.append(
            f"{r['tiles']}, {r['shape']}: {r['tflops']:.3g} TFLOP/s, {r['of_library_product']:.2f} of the library"
        )
    lines += [f"{r['experiment']}: {r['status']}" for r in run.tables.get("experiments", [])]
    return "\n".join(lines + marked(run, expected.load(RESULTS) if entries is None else entries))


def marked(run: Results, entries: list[dict], most: int = 20) -> list[str]:
    """The predictions that a run misses by far, one a line."""
    if not expected.on_gpu(run):
        return []
    found = expected.compare(entries, [run])
    lines = ["", found.counts()]
    for row in [row for row in found.rows if row.marked][:most]:
        e = row.entry
        claims = "".join(f"; published {number(p['value'])} ({p['what']}, {p['device']})" for p in e["published"])
        lines.append(
            f"{100 * row.off:+.0f} % {e['experiment']}, {expected.what(e)}: {e['quantity']} measured "
            f"{number(row.measured)}, predicted {number(e['predicted'])}{claims}"
        )
    return lines


if __name__ == "__main__":
    print(short(Results.load(Path(sys.argv[1]))))
