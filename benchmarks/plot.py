"""Time and memory against N for every provider: `python -m benchmarks.plot` draws the saved results of the sweep.

`pytest benchmarks --bench-set sweep --save` measures them; sweep.png is written next to RESULTS.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.harness.results import RESULTS, Results

JOB = "grpo"  # the job that most peers can express


def curves(rows: list[dict], key, **wanted: str) -> dict[str, list[tuple[int, float]]]:
    """{provider: [(N, value)]} of the rows that match."""
    found: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        if all(r[k] == v for k, v in wanted.items()):
            n = int(re.search(r"N=(\d+)", r["shape"])[1])
            found.setdefault(r["provider"], []).append((n, key(r)))
    return {name: sorted(points) for name, points in found.items()}


def draw(results: Results, target: Path) -> Path:
    """Two panels of time (flat, peaked) and one of memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), layout="constrained")
    panels = figure.subplots(1, 3)
    time, memory = results.tables["speed"], results.tables["memory"]
    drawn = [
        (f"time, {data} data", "ms, forward and backward", curves(time, lambda r: r["total_ms"][1], job=JOB, data=data))
        for data in ("flat", "peaked")
    ]
    drawn.append(
        ("peak memory beyond inputs and gradients", "MiB", curves(memory, lambda r: r["beyond_gradients_mib"], job=JOB))
    )
    names = list(dict.fromkeys(name for _, _, found in drawn for name in found))
    for axes, (title, unit, found) in zip(panels, drawn):
        for name, points in found.items():
            ours = name.startswith("lad_kernels")
            axes.plot(
                *zip(*points), marker="o", label=name, color=f"C{names.index(name)}", linewidth=2.5 if ours else 1
            )
        axes.set(title=title, xlabel="tokens N", ylabel=unit, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    shape = re.search(r"D=\d+ V=\d+", time[0]["shape"])[0]
    machine = results.machine
    figure.suptitle(
        f"GRPO loss and gradients, {shape}, {time[0]['dtype']}; {machine['device']}, commit {machine['commit']}"
    )
    figure.savefig(target, dpi=120)
    return target


if __name__ == "__main__":
    sources = [Path(p) for p in sys.argv[1:]] or sorted(RESULTS.glob("*/sweep.json"))
    for path in sources:
        print(draw(Results.load(path), RESULTS.with_name(f"sweep-{path.parent.name}.png")))
