"""The cost model: what it picks, what it remembers, and what it says."""

from __future__ import annotations

import itertools

import pytest
import torch

from lad_kernels.head import dispatch
from lad_kernels.head.dispatch import Work

SHAPES = [(512, 896, 151_936), (4096, 4096, 131_072), (16_384, 4096, 151_936), (64, 64, 50_257), (2048, 896, 151_936)]


@pytest.fixture(autouse=True)
def fresh():
    dispatch.forget()


def works() -> list[Work]:
    return [Work(*shape, 4 if d == "cpu" else 2, d) for shape, d in itertools.product(SHAPES, dispatch.SPEEDS)]


@pytest.mark.parametrize("work", works(), ids=str)
def test_the_cheapest_path_is_taken_once_shares_are_known(work):
    """Whatever the shares, the second call takes the path whose modelled time is least, of those that are possible."""
    for live_share, kept in itertools.product((1.0, 0.4, 0.02), (0.001, 0.02, 0.1, 0.5, 1.0)):
        dispatch.forget()
        live = int(live_share * work.tokens)
        pairs = int(live * work.blocks * kept)
        routed = dispatch.takes_routed(work, 3e-4, live, pairs, 0, backward="auto")
        one_pass = dispatch.takes_one_pass(work, 3e-4, backward="auto", known=False)
        times = {
            "one_pass": work.one_pass(),
            "routed": work.score() + work.routed(pairs),
            "two_pass": work.score() + work.dense(live),
        }
        picked = "one_pass" if one_pass else "routed" if routed else "two_pass"
        assert times[picked] <= 1.01 * min(times.values())


def test_a_flat_policy_is_measured_again_now_and_then():
    """While the one pass is taken nothing is learnt about sparsity: every PROBE calls the masses are looked at."""
    work = Work(4096, 4096, 131_072, 2, "cuda")
    dispatch.takes_routed(work, 3e-4, 4096, 4096 * work.blocks, 4096, backward="auto")
    taken = [dispatch.takes_one_pass(work, 3e-4, backward="auto", known=True) for _ in range(2 * dispatch.PROBE)]
    assert taken.count(False) == 2
    assert all(dispatch.takes_one_pass(work, 0.0, backward="auto", known=True) for _ in range(2 * dispatch.PROBE))


def test_what_is_asked_for_is_done():
    work = Work(2048, 896, 151_936, 4, "cpu")
    assert dispatch.takes_routed(work, 3e-4, 100, 100 * work.blocks, 0, backward="routed")
    assert not dispatch.may_route(3e-4, "dense")
    assert not dispatch.may_route(0.0, "auto")
    assert not dispatch.takes_one_pass(work, 3e-4, backward="routed", known=True)
    for path in dispatch.PATHS:
        with dispatch.force(path):
            assert dispatch.takes_one_pass(work, 3e-4, backward="auto", known=False) == (path == "one_pass")
            assert dispatch.may_route(3e-4, "auto") == (path == "routed")
    with pytest.raises(ValueError, match="'two_pass'"), dispatch.force("two-pass"):
        pass


def test_default_tail_mass():
    assert dispatch.tail_mass(None, torch.float32) == dispatch.tail_mass(None, torch.float64) == 0.0
    assert dispatch.tail_mass(None, torch.bfloat16) == dispatch.DEFAULT_TAIL_MASS
    assert dispatch.tail_mass(0.0, torch.bfloat16) == 0.0


def test_chunks_of_the_one_pass():
    assert Work(16_384, 4096, 131_072, 2, "cuda").chunk_rows() == 2048
    assert Work(16_384, 4096, 151_936, 2, "cuda").chunk_rows() == 2048  # 593 MiB: fewer would be all dW traffic
    assert Work(16_384, 4096, 32_000, 2, "cuda").chunk_rows() * 32_000 * 2 <= 512 << 20
    assert Work(2048, 896, 151_936, 4, "cpu").chunk_rows() * 151_936 * 4 <= 128 << 20


def test_why_names_the_path_and_its_cost():
    shape = (4096, 4096, 151_936)
    routed = dispatch.why(*shape, device="cpu", dtype=torch.bfloat16, kept_share=0.01)
    assert "routed, 1.0% of pairs kept" in routed
    assert "2.06 N D V" in routed
    flat = dispatch.why(*shape, device="cpu", dtype=torch.bfloat16, kept_share=0.9, one_pass=True)
    assert "one pass" in flat
    exact = dispatch.why(*shape, device="cpu", dtype=torch.float32, live_share=0.4)
    assert "two passes" in exact
    assert "4.4 N D V" in exact
