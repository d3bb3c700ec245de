"""What the kernels of the one pass compile to.

Run as a script this file compiles the kernels for one architecture and prints one JSON row per kernel, as
test_compiles.py does for the other kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.harness.aot import TARGETS, compiling, resources
from lad_kernels.head.kernels import dense, one_pass
from lad_kernels.head.records import LogitGradient, LogitTransform, Needs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"aligned": (2048, 151936), "odd V": (896, 50257), "unaligned": (897, 50257), "ragged": (1000, 50257)}
RICH = "bias+softcap+entropy+temperature"
COMPILED = [("bfloat16", layout, features) for layout in LAYOUTS for features in ("plain", RICH)]
COMPILED += [("bfloat16", "aligned", "entropy"), ("float32", "aligned", RICH), ("float32", "unaligned", RICH)]


def compile_all(arch: str, cases: list[tuple[str, str, str]]) -> None:
    """Print one JSON row per compiled kernel."""
    dense.accumulate = lambda *arguments, **options: None  # the library's product of what was never computed
    for dtype, layout, features in cases:
        (d, v), n, kind = LAYOUTS[layout], 256, DTYPES[dtype]
        hidden, weight = torch.empty(n, d, dtype=kind), torch.empty(v, d, dtype=kind)  # [N, D], [V, D]
        targets, numbers = torch.zeros(n, dtype=torch.int64), torch.ones(n)  # [N], [N]
        bias = torch.zeros(v, dtype=kind) if "bias" in features else None  # [V]
        transform = LogitTransform(
            softcap=30.0 if "softcap" in features else None, temperature=numbers if "temperature" in features else 0.9
        )
        with compiling(arch) as compiled:
            one_pass.one_pass(
                hidden,
                weight,
                targets,
                bias,
                transform,
                numbers,
                lambda rows, outputs: LogitGradient.of_logprobs(outputs.logprobs[rows]),
                chunks=[slice(0, n)],
                want_entropy="entropy" in features,
                want_correct="entropy" in features and ("softcap" not in features or "temperature" not in features),
                needs=Needs(True, False, bias is not None),
            )
        for name, kernel in compiled.values():
            found = vars(resources(name, kernel, arch))
            print(json.dumps({"dtype": dtype, "layout": layout, "features": features, **found}), flush=True)


def compiled_rows(arch: str) -> list[dict]:
    """What `compile_all` prints, in a process of its own."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: a hit would hide a compiler's complaint
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, arch]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch):
    """No spills; tensor cores for 16 bits only; bulk copies where rows allow them; F stored in wide pieces."""
    found = compiled_rows(arch)
    tiled = [row for row in found if row["name"] == "_exponentials_kernel"]
    assert len(tiled) == len(COMPILED)
    for row in found:
        print(*(row[key] for key in ("dtype", "layout", "features", "name", "registers", "spilled", "shared")))
        assert row["spilled"] == 0 and row["shared"] <= TARGETS[arch].shared, row
    for row in tiled:
        used = row["instructions"]
        if row["dtype"] == "bfloat16":
            assert used[TARGETS[arch].tensor_core] > 0, row
            assert (used.get("tma", 0) > 0) == (TARGETS[arch].copies == "tma" and row["layout"] != "unaligned"), row
        elif TARGETS[arch].is_cuda:
            assert not any(used[name] for name in ("mma.sync", "wgmma", "tcgen05")), row
        assert not TARGETS[arch].is_cuda or used["wide stores"] > 0, row


if __name__ == "__main__":
    compile_all(sys.argv[1], COMPILED)
