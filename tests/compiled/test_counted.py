"""Instructions of a tile, counted in SASS for an H100, against those in benchmarks/results/compiled/tiles.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from pages import ROOT

from benchmarks.counted import ARCH, FILE, KERNELS, by_pipe, parts
from benchmarks.harness.results import Results
from lad_kernels.head import dispatch

MORE = 1.03


def worse(found: dict[str, dict[str, int]], kept: dict[str, dict[str, int]]) -> list[str]:
    """Every count that is more than 3 % above the one that was kept; single pipes may trade work between them."""
    whole = ("registers", "shared memory", "step", "epilogue")
    names = [(kernel, what) for kernel in kept for what in whole]
    return [
        f"{kernel}: {what} {found[kernel][what]}, kept {kept[kernel][what]}"
        for kernel, what in names
        if found[kernel][what] > MORE * kept[kernel][what]
    ]


def kept_calls() -> dict[str, dict[str, float]]:
    """{"launches", "bytes" or "syncs": {path: number}}."""
    rows = Results.load(FILE).tables["a call with a mask, one chunk"]
    return {row["what"].split(",")[0]: {path: row[path] for path in dispatch.PATHS} for row in rows}


@pytest.fixture
def kept() -> dict[str, dict]:
    rows = Results.load(FILE).tables[f"{ARCH}, bfloat16, a tile"]
    return {row.pop("kernel"): row for row in rows}


@pytest.mark.skipif(not version("triton").startswith("3.6."), reason="kept of triton 3.6; lost: that none takes more")
def test_no_kernel_takes_more_than_was_kept(kept, tmp_path):
    """Compiled in a process of its own: this one may interpret kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.counted", "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    every = json.loads((tmp_path / "counts.json").read_text())
    found = every["counts"]
    assert found.keys() == kept.keys() == KERNELS.keys()
    for kernel in ("score", "gradient", "exponentials"):
        assert every["epilogue"][kernel] == found[kernel]["epilogue"]
        assert 0.8 < every[kernel]["896"] < every[kernel]["4096"] < 1
    assert every["flat_4096"]["4096"] > every["peaked_5"]["4096"] > every["peaked_1"]["4096"] > 1 / 3
    whole = kept_calls()
    assert whole["launches"] == {"one_pass": 55, "two_pass": 48, "routed": 88}
    assert whole["syncs"] == dict.fromkeys(dispatch.PATHS, 2)
    assert whole["bytes"].keys() == whole["launches"].keys()
    for what, by_path in whole.items():
        assert all(every[what][path] <= MORE * number for path, number in by_path.items()), (what, every[what])
    print(done.stdout)
    assert worse(found, kept) == []


def test_a_regression_names_its_kernel(kept):
    more = {kernel: dict(counts) for kernel, counts in kept.items()}
    more["pairs"]["epilogue"] = int(1.04 * kept["pairs"]["epilogue"])
    assert worse(kept, kept) == []
    assert worse(more, kept) == [f"pairs: epilogue {more['pairs']['epilogue']}, kept {kept['pairs']['epilogue']}"]


STEP = ["HGMMA.64x256x16.F32.BF16 R24", "BAR.SYNC"]


def test_a_flattened_loop_is_taken_apart():
    """The loop over D and that over tiles are one; its epilogue is jumped over."""
    code = ["MOV R1, R2", *STEP, "@P0 BRA", *["FFMA R1, R2"] * 150, "BRA", "EXIT"]
    step, epilogue = parts(code, [(3, 154), (154, 1)])
    assert step == [*STEP, "@P0 BRA", "BRA"]
    assert epilogue == ["FFMA R1, R2"] * 150


def test_nested_loops_are_taken_apart():
    code = ["MOV R1, R2", *STEP, "@P0 BRA", *["MUFU.EX2 R1, R2"] * 9, "BRA", "EXIT"]
    step, epilogue = parts(code, [(3, 1), (13, 0)])
    assert step == [*STEP, "@P0 BRA"]
    assert epilogue == ["MUFU.EX2 R1, R2"] * 9 + ["BRA"]


def test_instructions_are_told_by_what_executes_them():
    found = by_pipe(["@!P0 MUFU.EX2 R1, R2", "FFMA R1", "STG.E R2", "UTMALDG.2D R3", "SYNCS.X", "VOTEU.ANY"])
    assert found == {"special": 1, "float": 1, "global": 2, "wait": 1, "other": 1}
    assert ARCH == "sm_90"
