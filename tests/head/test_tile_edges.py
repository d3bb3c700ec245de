"""What the shapes of the kernel tests say of tile edges, against the tables that choose the tiles.

A loop over tiles, or over steps of a product, is tested where it runs more than once and ends in a remainder. So each
shape says, by axis, how many full default tiles stand in front of a remainder, at least: 0, 1, or 2 for two and more.
The interpreter's tiles are compared exactly, in both sizes of an element: when a table moves, a shape or its claim has
to move too. On every other architecture a claim must hold as well.
"""

from __future__ import annotations

import itertools

import head_formula
import pytest
import test_one_pass_kernels as one_pass
import test_routed_kernels as routed
import torch
from cases import CASES, CROSSES
from torch import Tensor

from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.routed import work
from lad_kernels.head.records import BLOCK, LogitTransform
from lad_kernels.testing import make_inputs

ARCHS = sorted({arch for arch, _ in tile_table._TABLE})
LETTERS = {"tokens": "N", "hidden_size": "D", "vocab_size": "V"}
PLAIN, CAPPED = LogitTransform(), LogitTransform(softcap=9.0)


@pytest.fixture(params=ARCHS)
def arch(request, monkeypatch) -> str:
    monkeypatch.setattr(tile_table, "probe", lambda device: tile_table.Device(request.param, 0))
    return request.param


def compare(edges: dict[str, int], claimed: dict[str, int], arch: str) -> None:
    assert all(edges[axis] >= claimed.get(axis, 0) for axis in edges), (edges, claimed)
    if arch == tile_table._INTERPRETED:
        assert edges == {axis: claimed.get(axis, 0) for axis in edges}


def crossed(size: int, *tiles: int) -> int:
    """Full tiles in front of a remainder, of the tile that has fewest: 0, 1, or 2 for more."""
    return min(2, *(size // tile if size % tile else 0 for tile in tiles))


def head_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, *transforms: LogitTransform) -> list:
    """What the head's kernels choose for these operands, in both sizes of an element."""
    pairs = [(hidden.to(dtype), weight.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    return [tile_table.tiles_for(h, w, bias, t) for (h, w), t in itertools.product(pairs, transforms)]


def head_edges(N: int, D: int, V: int, tiles: list) -> dict[str, int]:
    return {
        "N": crossed(N, *(t.block_n for t in tiles)),
        "D": crossed(D, *(t.block_k for t in tiles)),
        "V": crossed(V, *(t.block_v for t in tiles)),
    }


@pytest.mark.parametrize("name", CASES)
def test_cases_of_the_head(name, arch):
    options = CASES[name]
    x = make_inputs(**options)
    tiles = head_tiles(x.hidden, x.weight, x.bias, LogitTransform(softcap=options.get("softcap")))
    edges = head_edges(int(x.loss_mask.sum()), *x.weight.shape[::-1], tiles)
    compare(edges, {LETTERS[axis]: tiles for axis, tiles in CROSSES.get(name, {}).items()}, arch)


def test_cases_of_the_head_kernels(arch):
    x = head_formula.make("cpu")
    tiles = head_tiles(x.hidden, x.weight, None, PLAIN, CAPPED)
    compare(head_edges(head_formula.N, head_formula.D, head_formula.V, tiles), head_formula.CROSSES, arch)


def test_cases_of_the_one_pass(arch):
    x = one_pass.make("cpu").inputs
    longest = max(rows.stop - rows.start for rows in one_pass.CHUNKS)
    tiles = head_tiles(x.hidden, x.weight, None, PLAIN, CAPPED)
    compare(head_edges(longest, one_pass.D, one_pass.V, tiles), one_pass.CROSSES, arch)


@pytest.mark.parametrize("d", routed.CROSSES)
def test_cases_of_the_routed_backward(d, arch):
    """N pairs of a block, where all are kept; D is tiled or stepped through by all three products."""
    tiles = []
    for dtype in ("bfloat16", "float32"):
        x = routed.inputs_of("cpu", dtype, d=d)
        tiles.append(work.tiles_for(x.hidden, x.weight, routed.N, PLAIN))
    features = [s.block_d for t in tiles for s in (t.pairs, t.weight, t.hidden)]
    edges = dict(N=crossed(routed.N, *(t.block_n for t in tiles)), D=crossed(d, *features), V=crossed(routed.V, BLOCK))
    compare(edges, routed.CROSSES[d], arch)


def test_a_wider_tile_is_noticed(monkeypatch):
    """The comparison can fail: with twice as many tokens, or words, in a tile the claims are wrong."""
    wide = tile_table.Tiles(256, 512, 32, 8, 8, 3)
    monkeypatch.setitem(tile_table._TABLE, ("sm_80", 2), tile_table.Row(wide, wide))
    for test in (test_cases_of_the_head_kernels, test_cases_of_the_one_pass):
        with pytest.raises(AssertionError):
            test("sm_80")
    with pytest.raises(AssertionError):
        test_cases_of_the_head("two tiles and a remainder", "sm_80")
