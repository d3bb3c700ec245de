"""Every kernel that the head's host functions launch compiles for every target, without a GPU and without spills.

Run as a script this file compiles for one architecture and prints one JSON row per kernel; the tests run it so, since
a process that interprets kernels cannot compile them. `PYTHONPATH=.:tests/support python
tests/head/test_compiles.py sm_90` prints the same rows.

Layouts: `aligned` is Qwen's 151,936 x 2,048; `odd V` is GPT-2's 50,257 entries at a D that tiles evenly; `unaligned`
has rows of odd length, which neither TMA nor wide copies can read; `ragged` has rows of whole 16 bytes that are no
multiple of 16 elements, which TMA reads and pointers must not assume.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.harness.aot import FULLEST, TARGETS, compiling, resources

LAYOUTS = {"aligned": (2048, 151936), "odd V": (896, 50257), "unaligned": (897, 50257), "ragged": (1000, 50257)}
PLAIN, RICH, ALL = "plain", "entropy+temperature", "bias+softcap+entropy+temperature"
CASES = [("bfloat16", "aligned", features) for features in (PLAIN, RICH, ALL, "softcap+entropy")]
CASES += [("bfloat16", "odd V", PLAIN), ("bfloat16", "unaligned", PLAIN), ("bfloat16", "unaligned", ALL)]
CASES += [("bfloat16", "ragged", ALL), ("float32", "aligned", ALL), ("float32", "unaligned", PLAIN)]
DEMANDING = [CASES[2], CASES[6], CASES[8]]  # all features: aligned, unaligned, float32
EXTRA = {FULLEST: [("float16", "aligned", RICH), ("float16", "unaligned", ALL), ("float32", "aligned", PLAIN)]}
# Tiles are chosen for triton 3.6, which torch 2.11 brings. Measured on 3.9.0: 24 bytes in the richest ragged backward
# on sm_90 and sm_100, 32 bytes in the forward with entropy and temperatures on sm_100, none elsewhere.
SAME_BITS = ("_partials_kernel", "_target_kernel", "_finalize_kernel")
SPILLED = 0 if version("triton").startswith("3.6.") else 32
TILED = ("_partials_kernel", "_logit_gradient_kernel")
ROUTED = ("pairs_kernel", "weight_kernel", "hidden_kernel")
CHOICE = ("_token_kernel", "_mark_kernel", "_count_kernel", "_drop_kernel", "_list_kernel")


def compile_all(arch: str, cases: list[tuple[str, str, str]]) -> None:
    """Print one JSON row per compiled kernel."""
    import torch

    from lad_kernels.head.kernels import dense, forward
    from lad_kernels.head.kernels.routed import launch as routed
    from lad_kernels.head.records import BLOCK, MANY, LogitGradient, LogitTransform, Needs, Routing

    dense.accumulate = lambda *arguments, **options: None  # the library's product of what was never computed
    for dtype, layout, features in cases:
        (d, v), n, kind = LAYOUTS[layout], 256, getattr(torch, dtype)
        hidden, weight = torch.empty(n, d, dtype=kind), torch.empty(v, d, dtype=kind)  # [N, D], [V, D]
        targets, numbers = torch.zeros(n, dtype=torch.int64), torch.ones(n)  # [N], [N]
        bias = torch.zeros(v, dtype=kind) if "bias" in features else None  # [V]
        entropy = "entropy" in features
        transform = LogitTransform(
            softcap=30.0 if "softcap" in features else None, temperature=numbers if "temperature" in features else 0.9
        )
        with compiling(arch) as compiled:
            wanted = {"want_entropy": entropy, "want_block_lse": True, "want_correct": entropy}
            forward.forward(hidden, weight, targets, bias, transform, **wanted)
            gradient = LogitGradient(numbers, numbers, numbers if entropy else None)
            needs = Needs(True, False, bias is not None)
            arguments = (hidden, weight, targets, bias, transform, numbers, gradient)
            dense.backward(*arguments, needs=needs)
            needs = needs._replace(weight=True)
            for whole, joint in ((0, 0), (64, 64), (64, 0)):  # dense tokens: none, with the pairs, by the library
                routed.JOINT, offsets = joint, [0] + [n - whole] * -(-v // BLOCK)
                scale = numbers[whole:] if entropy else None  # [P]
                routing = Routing(torch.arange(whole, n), scale, offsets, torch.arange(whole))
                for tiles in {routed.tiles_for(hidden, weight, pairs, transform) for pairs in (0, MANY)}:
                    routed.backward(*arguments, routing, needs=needs, tiles=tiles)
                routed.backward(*arguments, routing, needs=needs, atomics=True, workspace_bytes=1)  # a block in pieces
        for name, kernel in compiled.values():
            found = vars(resources(name, kernel, arch))
            print(json.dumps({"dtype": dtype, "layout": layout, "features": features, **found}), flush=True)


def compile_choice(arch: str) -> None:
    """Print the rows of the kernels that choose pairs, in all their forms."""
    import torch

    from lad_kernels.head.kernels.routed import route
    from lad_kernels.head.records import LogitGradient

    numbers, longest, tolist = torch.ones(256), torch.ones(1187), torch.Tensor.tolist
    torch.Tensor.tolist = lambda self: [1] * len(self)  # of counts that no kernel has written
    for entropy, unbiased in itertools.product((False, True), repeat=2):
        gradient, masses = LogitGradient(numbers, numbers, numbers if entropy else None), torch.ones(1187, 256)
        targets = torch.zeros(256, dtype=torch.int64)
        given = (targets, numbers, numbers, masses, gradient, 0.1, lambda: (longest, numbers), lambda lost: lost)
        with compiling(arch) as compiled:
            route.choose(*given, dense_share=0.3, unbiased=unbiased, most_pairs=None)
        features = "+".join(n for n, on in (("entropy", entropy), ("unbiased", unbiased)) if on) or PLAIN
        for name, kernel in compiled.values():
            found = vars(resources(name, kernel, arch))
            print(json.dumps({"dtype": "float32", "layout": "choice", "features": features, **found}), flush=True)
    torch.Tensor.tolist = tolist


@functools.cache
def rows(arch: str) -> list[dict]:
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: a hit would hide a compiler's complaint
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        result = subprocess.run(
            [sys.executable, __file__, arch], env=environment, capture_output=True, text=True, cwd=root
        )
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    print(f"\n{arch:7} {'case':55} {'kernel':24} {'registers':>9} {'spilled':>7} {'shared':>7}")
    for row in found:
        case = f"{row['dtype']} {row['layout']} {row['features']}"
        print(f"{'':7} {case:55} {row['name']:24} {row['registers']:9} {row['spilled']:7} {row['shared']:7}")
    return found


def tiled(arch: str, names=TILED, **wanted: str) -> list[dict]:
    """Rows of the kernels with a tile product, in the cases that match."""
    found = [r for r in rows(arch) if r["name"] in names and all(r[key] == value for key, value in wanted.items())]
    assert found, f"nothing was compiled for {wanted}"
    return found


@pytest.mark.parametrize("arch", TARGETS)
def test_no_spills_and_shared_memory_within_the_device(arch):
    assert {r["name"] for r in rows(arch)} == {
        *TILED,
        "_target_kernel",
        "_target_columns_kernel",
        "_finalize_kernel",
        *ROUTED,
        *CHOICE,
        "items_kernel",
        "bias_kernel",
        "token_kernel",
    }
    for row in rows(arch):
        assert row["spilled"] <= SPILLED, row
        assert row["shared"] <= TARGETS[arch].shared, row


@pytest.mark.parametrize("arch", TARGETS)
def test_tensor_cores(arch):
    """16-bit products run on the tensor cores in every layout; aligned float32 never becomes tf32.

    And ptxas finds nothing to fuse in the kernels that promise the same bits.
    """
    for row in tiled(arch, TILED + ROUTED, dtype="bfloat16"):
        assert row["instructions"][TARGETS[arch].tensor_core] > 0, row
    if TARGETS[arch].is_cuda:
        for row in tiled(arch, TILED + ROUTED, dtype="float32"):
            assert not any(row["instructions"][name] for name in ("mma.sync", "wgmma", "tcgen05")), row
        for row in tiled(arch, SAME_BITS):  # a product and a sum that ptxas joined would move the bits of a token
            assert row["instructions"]["may fuse"] == 0, row
        assert any(row["instructions"]["may fuse"] for row in tiled(arch, ("_logit_gradient_kernel",)))


@pytest.mark.parametrize("arch", [a for a, target in TARGETS.items() if target.copies == "tma"])
@pytest.mark.parametrize("layout", ["aligned", "odd V", "ragged"])
def test_bulk_copies(arch, layout):
    for row in tiled(arch, dtype="bfloat16", layout=layout):
        assert row["instructions"]["tma"] > 0, row


@pytest.mark.parametrize("arch", [a for a, target in TARGETS.items() if target.is_cuda])
def test_wide_stores(arch):
    """Of dR: a mask of which the compiler cannot tell how wide it holds would make it store 2 bytes at a time."""
    for row in tiled(arch, ("_logit_gradient_kernel", "pairs_kernel"), dtype="bfloat16", layout="aligned"):
        assert row["instructions"]["wide stores"] > 0, row


@pytest.mark.parametrize("arch", [a for a, target in TARGETS.items() if target.copies == "cp.async"])
def test_asynchronous_copies(arch):
    for row in tiled(arch, TILED + ROUTED[:2], dtype="bfloat16", layout="aligned"):
        assert row["instructions"]["cp.async"] > 0, row


if __name__ == "__main__":
    arch = sys.argv[1]
    compile_all(arch, (CASES if TARGETS[arch].whole else DEMANDING) + EXTRA.get(arch, []))
    compile_choice(arch)
