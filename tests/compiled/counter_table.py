"""What compiled kernels issue and ask memory for, into benchmarks/results/compiled: `make test-compiled` ends with it.

Counts of the machine in tests/support/ptx for one small call of each path, by kernel. They say how the code is made up
and which accesses ask for more than they need, not how long it takes.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import torch
from head_formula import DTYPES, FEATURES, make
from ptx.counters import CLASSES, Counters
from ptx.device import Launch, running

from benchmarks.harness import machine
from benchmarks.harness.results import RESULTS, Results
from lad_kernels import LADConfig
from lad_kernels.head.records import BLOCK

N, D, V = 256, 128, 1024
COLUMNS = [*CLASSES, "integer and control"]


def launches(arch: str, dtype: str, features: tuple[str, ...]) -> list[Launch]:
    """Of a forward, and of the gradient in two passes, in one, and routed."""
    import test_head_kernels as two_pass
    import test_one_pass_kernels as one_pass
    import test_routed_kernels as routed

    inputs = make("cpu", DTYPES[dtype], features, n=N, d=D, v=V)
    with running(arch, counting=True) as device:
        outputs = two_pass.run(inputs, want_correct=bool(features))
        two_pass.run_backward(inputs, outputs.lse, two_pass.logit_gradient(inputs, outputs.entropy))
        routed.run(inputs, routed.route(inputs, 0.3, scaled=True))
        if dtype != "float16":
            one_pass.run(
                one_pass.make("cpu", dtype, "plain" if not features else "bias", n=N, d=D, v=V), chunks=[slice(0, N)]
            )
    return device.launches


def float32_calls() -> dict[str, Callable[[], object]]:
    """What is computed in float32 whatever the model's dtype: the choice of pairs, and the objective of N tokens."""
    import test_objective_kernel as objective
    import test_route_kernels as choice

    given = objective.inputs("cpu", (N // 2, N // 4, N // 4))  # three sequences
    signal = dict(rewards=torch.tensor([1.0, 0.0, 0.25]), group_ids=torch.tensor([0, 0, 0]))  # [B]
    calls: dict[str, Callable[[], object]] = {
        name: partial(objective.ours, given, config, **signal)
        for name, config in {"js": LADConfig(), **objective.CONFIGS}.items()
    }
    for case, unbiased in (("unbiased tail", True), ("dropped tail", False)):
        calls[case] = partial(choice.case(N, V // BLOCK, "cpu").choose, unbiased=unbiased)
    return calls


def ratios(asked: Counter, needed: Counter, title: str, kinds: tuple[str, ...]) -> dict[str, float | str]:
    """Asked for over needed, 1 is best."""
    return {f"{title}, {kind}": asked[kind] / needed[kind] if needed[kind] else "-" for kind in kinds}


def totals(found: list[Launch]) -> dict[str, Counters]:
    """By kernel."""
    total: dict[str, Counters] = defaultdict(Counters)
    for launch in found:
        sums, counted = total[launch.name], launch.counters
        sums.barriers += counted.barriers
        for name in ("instructions", "sectors", "sectors_needed", "passes", "passes_needed"):
            getattr(sums, name).update(getattr(counted, name))
    return total


def add(results: Results, arch: str) -> None:
    """A row a kernel and case: instructions of a warp by class, sectors and passes over those needed, barriers."""
    title = f"{arch}, N = {N}, D = {D}, V = {V}"
    for dtype in ("bfloat16", "float32"):
        for features in ((), FEATURES):
            case = f"{dtype}, {'all' if features else 'plain'}"
            for name, counted in totals(launches(arch, dtype, features)).items():
                row(results, title, name, case, counted)
    for case, call in float32_calls().items():
        with running(arch, counting=True) as device:
            call()
        for name, counted in totals(device.launches).items():
            row(results, title, name, f"float32, {case}", counted)


def row(results: Results, title: str, kernel: str, case: str, counted: Counters) -> None:
    results.add(
        title,
        kernel=kernel.strip("_"),
        case=case,
        **{c: counted.instructions[c] for c in COLUMNS},
        **ratios(counted.sectors, counted.sectors_needed, "sectors", ("load", "store")),
        **ratios(counted.passes, counted.passes_needed, "banks", ("load", "store", "ldmatrix")),
        barriers=counted.barriers,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    results = Results(machine.describe("cpu", "make test-compiled"))
    results.machine["notes"] = ["Counts of compiled code on a CPU: no GPU ran them."]
    for arch in sys.argv[1:]:
        add(results, arch)
    results.save(RESULTS / "compiled" / "results.json")
