"""What a call launches and its kernels issue on an H100, counted in SASS and on a stand-in device without a GPU.

    python -m benchmarks.counted [--json FILE] [--save]

Compiles what a call in bfloat16 launches (plain logits, V a multiple of 128, D of 64; SASS does not depend on either
further) and counts the instructions of a warp: in one step over D, and in the epilogue that turns a tile of logits into
what the kernel leaves. An epilogue that is not hidden behind products is what a kernel loses to the library, so a test
holds these counts to within 3 %. They are no times: `benchmarks/RESULTS.md` has those that a GPU gave, beside what
harness/predicted.py makes of the counts: shares of the library's rate, and calls over three bare products.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks.harness import machine, predicted
from benchmarks.harness.aot import compiling, resources, sass
from benchmarks.harness.results import RESULTS, Results
from lad_kernels.head.records import BLOCK, MANY, LogitGradient, LogitTransform, Needs, Routing

ROOT = Path(__file__).resolve().parents[1]
ARCH = "sm_90"
N, D, V = 256, 2048, 151_936
KERNELS = {  # those of one name in the order of their first launch
    "score": "_partials_kernel",
    "gradient": "_logit_gradient_kernel",
    "exponentials": "_exponentials_kernel",
    "pairs": "pairs_kernel",
    "pairs, 128 an item": "pairs_kernel",
    "weight": "weight_kernel",
}
FILE = RESULTS / "compiled" / "tiles.json"
PIPES = {  # by the beginning of an instruction's name
    "tensor": ("HGMMA", "WARPGROUP"),
    "special": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FSET", "FSEL", "FMNMX", "F2FP"),
    "integer": ("IADD", "IMAD", "ISETP", "LEA", "LOP3", "SHF", "SEL", "VIADD", "PRMT", "PLOP3", "MOV", "CS2R", "SGXT"),
    "shared": ("LDS", "STS", "SHFL"),
    "global": ("LDG", "STG", "UTMA"),
    "wait": ("BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "FENCE"),
}


def launch_all() -> None:
    """Every kernel once; the values are of no interest."""
    from lad_kernels.head.kernels import dense, forward, one_pass
    from lad_kernels.head.kernels.routed import launch as routed

    dense.accumulate = dense.rounded_product = lambda *arguments, **options: None  # the library's
    hidden, weight = (torch.empty(rows, D, dtype=torch.bfloat16) for rows in (N, V))  # [N, D], [V, D]
    targets, numbers = torch.zeros(N, dtype=torch.int64), torch.ones(N)  # [N], [N]
    transform, gradient = LogitTransform(temperature=0.9), LogitGradient(numbers, numbers, None)
    given, needs = (hidden, weight, targets, None, transform), Needs(True, True, False)
    forward.forward(*given, want_entropy=False, want_block_lse=True)
    dense.backward(*given, numbers, gradient, needs=needs)
    one_pass.one_pass(
        *given, numbers, lambda rows, _: gradient.select(rows), chunks=[slice(0, N)], want_entropy=False, needs=needs
    )
    routing = Routing(torch.arange(N), numbers, [0] + [N] * -(-V // BLOCK), torch.arange(0))
    for pairs in (0, MANY):
        tiles = routed.tiles_for(hidden, weight, pairs, transform)
        routed.backward(*given, numbers, gradient, routing, needs=needs, tiles=tiles)


def parts(code: list[str], jumps: list[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Instructions of a step over D, and of the epilogue.

    A step is the smallest loop around all products. Where the loop over tiles was flattened into it, the epilogue is
    what its longest jump forward passes over; else what follows, up to the end of the loop around it or of the kernel.
    """
    products = [i for i, line in enumerate(code) if "HGMMA" in line]
    last = products[-1]
    loops = sorted((b - a, a, b) for b, a in jumps if a <= b and a <= last <= b)
    _, a, b = loops[0]
    length, first = max(((to - at, at) for at, to in jumps if a <= at <= b and to > at), default=(0, b))
    if length > 100:
        end = min(first + length, b)
        return code[a : first + 1] + code[end : b + 1], code[first + 1 : end]
    outer = next((stop for _, start, stop in loops[1:] if start < a and stop > b), len(code) - 1)
    return code[a : b + 1], code[b + 1 : outer + 1]


def by_pipe(lines: list[str]) -> Counter[str]:
    names = [re.sub(r"^@\S+ +", "", line).split()[0] for line in lines]
    return Counter(next((pipe for pipe, all_ in PIPES.items() if name.startswith(all_)), "other") for name in names)


def count() -> dict[str, dict[str, int]]:
    """{kernel: {what: count}}: registers, bytes of shared memory, a warp's instructions in step and epilogue."""
    with compiling(ARCH) as compiled:
        launch_all()
    found, of = {}, {name: iter([k for called, k in compiled.values() if called == name]) for name in KERNELS.values()}
    for kind, name in KERNELS.items():
        kernel = next(of[name])
        used = resources(name, kernel, ARCH)
        step, epilogue = parts(*sass(kernel))
        pipes = by_pipe(epilogue)
        found[kind] = {"registers": used.registers, "shared memory": used.shared, "step": len(step)}
        found[kind] |= {"epilogue": len(epilogue), **{f"epilogue, {pipe}": pipes[pipe] for pipe in (*PIPES, "other")}}
    return found


def calls() -> dict[str, dict[str, float]]:
    """Launches, bytes and host syncs, in a process whose kernels are interpreted."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.harness.calls"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted")
    parser.add_argument("--json", help="file for all of it")
    parser.add_argument("--save", action="store_true", help="keep them in benchmarks/results, for report and test")
    given = parser.parse_args()
    results, found = Results(machine.describe("cpu", "python -m benchmarks.counted --save")), count()
    results.machine["notes"] = ["Counts of compiled code: no GPU ran it."]
    for kind, counts in found.items():
        results.add(f"{ARCH}, bfloat16, a tile", kernel=kind, **counts)
        print(kind, *(f"{what} {number}" for what, number in counts.items()), sep=", ")
    epilogues = {kind: found[kind]["epilogue"] for kind in ("score", "gradient", "exponentials")}
    modelled, launched = predicted.modelled(epilogues), calls()
    for what, by_size in modelled.items():
        results.add("modelled, H200, V = 151,936", what=what, **{f"D = {d}": round(x, 3) for d, x in by_size.items()})
    for what, by_path in launched.items():
        unit = ", over inputs and gradients" if what == "bytes" else ""
        results.add("a call with a mask, one chunk", what=what + unit, **by_path)
    if given.json:
        every = {"counts": found, **modelled, **launched, "epilogue": epilogues}
        Path(given.json).write_text(json.dumps(every, indent=1) + "\n")
    if given.save:
        results.save(FILE)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton's kernels are imported
    main()
