"""The cost model: its choices, what they depend on, and the reasons it gives."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from lad_kernels.head import cost, dispatch, memory
from lad_kernels.head.dispatch import Shares, Sparsity
from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.routed.work import tiles_for
from lad_kernels.head.memory import Work
from lad_kernels.head.records import BLOCK, MANY, LogitTransform

SHAPES = [(512, 896, 151_936), (4096, 4096, 131_072), (16_384, 4096, 151_936), (64, 64, 50_257), (2048, 896, 151_936)]


ROUTABLE = Sparsity(3e-4, unbiased=True, backward="auto")


def works() -> list[Work]:
    return [Work(*shape, itemsize, arch) for shape, (arch, itemsize) in itertools.product(SHAPES, cost.SPEEDS)]


@pytest.mark.parametrize("work", works(), ids=str)
def test_the_cheapest_path_is_taken(work):
    """Whatever the shares, the path taken is that whose modelled time is least, of those that are possible."""
    for live_share, kept in itertools.product((1.0, 0.4, 0.02), (0.001, 0.02, 0.1, 0.5, 1.0)):
        live = int(live_share * work.tokens)
        pairs = int(live * work.blocks * kept)
        routed = dispatch.takes_routed(work, live, pairs, 0, backward="auto")
        shares = Shares(live / work.tokens, pairs / (live * work.blocks))
        one_pass = dispatch.takes_one_pass(work, ROUTABLE, shares)
        times = {
            "one_pass": cost.one_pass(work, live),
            "routed": cost.score(work) + cost.routed(work, pairs, active=live),
            "two_pass": cost.score(work) + cost.dense(work, live),
        }
        picked = "one_pass" if one_pass else "routed" if routed else "two_pass"
        assert times[picked] <= 1.01 * min(times.values())


def test_whole_tokens_cost_what_they_cost_in_the_dense_backward():
    """Nine tokens of ten are whole: as pairs they would be dearer than the dense backward of all."""
    work = Work(2048, 896, 151_936, 4, "cpu")
    dense = 9 * work.tokens // 10
    pairs = dense * work.blocks + work.tokens
    assert dispatch.takes_routed(work, work.tokens, pairs, dense, backward="auto")
    assert not dispatch.takes_routed(work, work.tokens, pairs, 0, backward="auto")
    seen = Shares(density=0.3, dense=0.2)  # of a sample
    assert not dispatch.takes_one_pass(work, ROUTABLE, seen)
    assert dispatch.takes_one_pass(work, ROUTABLE, Shares(density=0.3))


def test_the_call_looks_where_it_matters_and_costs_little():
    def looks(work: Work, theta: float = 3e-4, backward: str = "auto", known: bool = True) -> bool:
        return dispatch.needs_sample(work, Sparsity(theta, True, backward), all_active=known)

    for tokens in (4096, 8192, 32_768):
        for d, v in ((896, 151_936), (4096, 131_072), (1152, 262_144)):
            work = Work(tokens, d, v, 2, "sm_90")
            assert looks(work)
    for name, itemsize in cost.SPEEDS:
        for tokens in (4096, 8192, 32_768):
            work = Work(tokens, 4096, 151_936, itemsize, name)
            assert cost.sample(work, dispatch.sample_step(work)) <= 0.01 * cost.one_pass(work)
    work = Work(8192, 4096, 151_936, 2, "sm_90")
    assert looks(work)
    assert dispatch.sample_step(work) == 1
    assert dispatch.sample_step(dataclasses.replace(work, tokens=4096)) == 2
    assert dispatch.sample_step(dataclasses.replace(work, tokens=2048)) == 4
    assert dispatch.sample_step(Work(128, 128, 32_000, 4, "cpu_avx512")) == 2  # kernels alone take fewer
    assert looks(work, 0.0, known=False)  # how many tokens have a gradient
    assert not looks(work, 0.0)
    assert not looks(work, 3e-4, "dense")
    assert not looks(work, 3e-4, "routed")
    assert not looks(dataclasses.replace(work, tokens=512))  # reading W alone costs more than it may
    assert not looks(Work(128, 128, 32_000, 4, "cpu_avx512"))  # a tenth of the call was measured
    assert not looks(dataclasses.replace(work, tokens=0))
    exact = Work(2048, 896, 151_936, 4, "cpu")
    assert not looks(exact, 0.0, known=False)  # one pass drops what two passes drop
    assert looks(exact, 3e-4, known=False)
    with dispatch.force("two_pass"):
        assert not looks(work)


def test_what_is_asked_for_is_done():
    work = Work(2048, 896, 151_936, 4, "cpu")
    assert dispatch.takes_routed(work, 100, 100 * work.blocks, 0, backward="routed")
    may_route = lambda theta, backward: dispatch.may_route(work, Sparsity(theta, True, backward))  # noqa: E731
    assert not may_route(3e-4, "dense")
    assert not may_route(0.0, "auto")
    assert not dispatch.takes_one_pass(work, ROUTABLE._replace(backward="routed"))
    for path in dispatch.PATHS:
        with dispatch.force(path):
            assert dispatch.takes_one_pass(work, ROUTABLE) == (path == "one_pass")
            assert may_route(3e-4, "auto") == (path == "routed")
    assert not dispatch.takes_routed(work, 100, 100 * work.blocks, 0, backward="auto")  # as before `force`
    with pytest.raises(ValueError, match="'two_pass'"), dispatch.force("two-pass"):
        pass


def test_default_tail_mass():
    assert dispatch.threshold(None, torch.float32) == dispatch.threshold(None, torch.float64) == 0.0
    assert dispatch.threshold(None, torch.bfloat16) == dispatch.DEFAULT_TAIL_MASS
    assert dispatch.threshold(0.0, torch.bfloat16) == 0.0


def test_chunks_of_the_one_pass():
    """As few as fit the budget and the room of a 16-bit dW, of one size."""
    assert Work(16_384, 4096, 131_072, 2, "sm_90").chunk_rows() == 4096
    assert Work(16_384, 896, 151_936, 2, "sm_90").chunk_rows() == 2432
    assert min(Work(2048, d, v, 2, "sm_90").chunk_rows() for d, v in ((896, 152_064), (1152, 262_144))) == 2048
    assert Work(100, 4096, 131_072, 2, "sm_90").chunk_rows() == 128
    assert Work(0, 4096, 131_072, 2, "sm_90").chunk_rows() == 128
    assert Work(2048, 896, 151_936, 4, "cpu").chunk_rows() * 151_936 * 4 <= 128 << 20
    for work in (Work(1 << 20, d, v, 2, "sm_90") for d in (896, 4096, 8192) for v in (32_000, 151_936)):
        assert 2 * work.chunk_rows() * work.vocab_size <= memory.BUDGET + 2 * work.vocab_size * work.hidden_size


def test_masses_and_pairs_that_do_not_fit_are_not_kept():
    """On an accelerator what routing needs must fit the budget and the room of gradients that do not exist yet."""
    sizes = (896, 151_936, 2, "sm_90")
    assert dispatch.may_route(Work(16_384, *sizes), ROUTABLE)
    assert not dispatch.may_route(Work(1 << 20, *sizes), ROUTABLE)
    assert dispatch.may_route(Work(170_000, *sizes), ROUTABLE)
    assert not dispatch.may_route(Work(170_000, *sizes, need_hidden=False), ROUTABLE)
    for tokens in (4096, 100_000, 1 << 20):
        work = Work(tokens, 4096, 131_072, 2, "sm_90")
        most, masses = memory.most_pairs(work), memory.MASS_BYTES * tokens * work.blocks
        assert masses + memory.LIST_BYTES * most <= memory.BUDGET + work.gradient_bytes
        assert memory.PAIR_BYTES * most <= memory.BUDGET // 4


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("gathered", [False, True])
def test_pieces_and_chunks_fit_the_budget_at_any_n(gathered, item, needs):
    """Workspace, float32 dH, gathered rows and the rounding of a piece together; dW's room counts in several alone."""
    need_hidden, need_weight = needs
    for n, d, v in itertools.product(range(1000, 300_000, 1777), (896, 4096, 8192), (32_000, 151_936)):
        work = Work(n, d, v, item, "sm_90", *needs)
        rows, workspace = work.token_chunk(n, gathered=gathered)
        several = rows < n
        each = d * (4 * need_hidden * (item == 2 or several) + item * gathered)
        late = 2 * v * d if several and item == 2 and need_weight else 0
        assert rows * each + workspace + memory.TOKEN_BYTES * n <= memory.BUDGET + late, (n, d, v)
        logits, room = work.chunk_rows() * item * v, 2 * v * d if item == 2 and need_weight else 0
        room *= 1 + (work.chunk_rows() >= n)  # of the float32 dW that one chunk does not need, or of the rounded dW
        assert logits <= memory.BUDGET + room or work.chunk_rows() == 128


def test_why_names_the_path_and_its_cost():
    shape = (4096, 4096, 151_936)
    routed = dispatch.why(*shape, device="cpu", dtype=torch.bfloat16, kept_share=0.01)
    assert "routed, 1.0% of pairs kept" in routed
    assert "2.06 N D V" in routed
    half = dispatch.why(*shape, device="cpu", dtype=torch.bfloat16, kept_share=0.01, live_share=0.5)
    assert "2.03 N D V" in half
    flat = dispatch.why(*shape, device="cpu", dtype=torch.bfloat16, kept_share=0.9, one_pass=True)
    assert "one pass" in flat
    exact = dispatch.why(*shape, device="cpu", dtype=torch.float32, live_share=0.4)
    assert "two passes" in exact
    assert "4.4 N D V" in exact


def test_every_card_has_its_own_speeds(monkeypatch):
    """An A100 is bound by its products sooner than a B200, and float32 by its arithmetic; a card that is not there is
    taken for an H100."""
    probe = tile_table.probe.__wrapped__
    for (arch, itemsize), tiles in tile_table._TABLE.items():
        assert cost.SPEEDS[arch, itemsize].flops > 0, tiles
    seconds = {arch: cost.one_pass(Work(8192, 4096, 151_936, 2, arch)) for arch in ("sm_80", "sm_90", "sm_100")}
    assert seconds["sm_80"] > 1.5 * seconds["sm_90"] > 2 * seconds["sm_100"]
    assert cost.one_pass(Work(8192, 4096, 151_936, 4, "sm_90")) > 5 * seconds["sm_90"]
    cuda = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        assert cost.architecture(cuda, triton=True) == "sm_90"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cost.architecture(torch.device("cuda", 1), triton=True) == "sm_90"
    monkeypatch.setattr(tile_table, "probe", lambda device: tile_table.Device("sm_80", 0))
    assert cost.architecture(cuda, triton=True) == "sm_80"
    assert cost.architecture(cuda, triton=False) == "cpu"
    monkeypatch.setattr(tile_table, "probe", lambda device: tile_table.Device("sm_90", 132))
    for memory_bytes, arch in ((80 << 30, "sm_90"), (140 << 30, "h200")):
        properties = SimpleNamespace(total_memory=memory_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert cost.architecture(cuda, triton=True) == arch
    monkeypatch.setattr(tile_table, "probe", probe)
    for minor, arch in ((6, None), (9, "sm_89")):
        properties = SimpleNamespace(major=8, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert cost.architecture(cuda, triton=True) == (arch or probe(cuda).arch)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", ["sm_90", "h200", "sm_80", "sm_89", "gfx942", "cpu"])
def test_a_token_is_whole_from_where_its_pairs_cost_as_much(arch, itemsize, monkeypatch):
    """By difference of the modelled times of whole calls, one run each, where products take longer than reading W."""
    monkeypatch.setattr(cost, "MANY", 1 << 40)
    work = Work(2048, 4096, 151_936, itemsize, arch)
    pairs = 180 * work.blocks
    as_pairs = cost.routed(work, 2 * pairs) - cost.routed(work, pairs)
    products = 3 * 2 * work.hidden_size * BLOCK / cost.speeds(work).flops  # of a pair in dense products
    assert pairs * products / as_pairs == pytest.approx(cost.dense_share(work))
    assert 0.1 < cost.dense_share(work) < 0.6


def test_pairs_cost_whole_items(monkeypatch):
    """Few pairs a block waste most of an item's places, unless reading W takes longer; a CPU has none to waste."""
    item, hidden, weight = cost.SPEEDS["sm_90", 2].item, *(torch.empty(128, 64, dtype=torch.bfloat16) for _ in "hw")
    plain, capped = LogitTransform(), LogitTransform(softcap=30.0)
    sizes = [tiles_for(hidden, weight, pairs, plain).block_n for pairs in (1, MANY - 1, MANY, 999)]
    assert sizes == [item, item, 2 * item, 2 * item]
    assert tiles_for(hidden, weight, 999, capped).block_n == item
    work = dataclasses.replace(Work(2048, 4096, 151_936, 2, "sm_90"), need_hidden=False)
    nothing, few, many = (cost.routed(work, pairs) for pairs in (0, 8 * work.blocks, 1000 * work.blocks))
    assert few == nothing
    monkeypatch.setitem(cost.SPEEDS, ("sm_90", 2), dataclasses.replace(cost.SPEEDS["sm_90", 2], bytes=1e18))
    nothing, few, many = (cost.routed(work, pairs) for pairs in (0, 8 * work.blocks, 1000 * work.blocks))
    assert (few - nothing) / 8 > 4 * (many - nothing) / 1000
    work = dataclasses.replace(work, architecture="cpu")
    nothing, few, many = (cost.routed(work, pairs) for pairs in (0, 8 * work.blocks, 1000 * work.blocks))
    assert (few - nothing) / 8 == pytest.approx((many - nothing) / 1000)


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "GenuineIntel", "cpu_avx512"),
        ("AVX512", "AuthenticAMD", "cpu"),
        ("AVX2", "GenuineIntel", "cpu"),
        ("AVX512", None, "cpu"),
    ],
)
def test_a_cpu_has_the_row_of_what_it_says_of_itself(capability, vendor, expected, monkeypatch, tmp_path):
    monkeypatch.undo()  # the row that all tests share
    cpuinfo = tmp_path / "cpuinfo"
    if vendor:
        cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cost, "Path", lambda name: cpuinfo)
    cost.intel_avx512.cache_clear()
    try:
        assert cost.architecture(torch.device("cpu"), triton=False) == expected
        assert cost.architecture(torch.device("cpu"), triton=True) == expected
        assert cost.architecture(torch.device("cuda"), triton=False) == "cpu"
    finally:
        cost.intel_avx512.cache_clear()
    work = Work(1024, 576, 49_152, 4, expected)
    assert not work.triton
    assert cost.speeds(work).flops > 0


def test_speeds_of_a_cpu_can_be_set(monkeypatch):
    assumed = cost.SPEEDS["cpu", 4]
    monkeypatch.setenv(cost.CPU_SPEEDS, "flops=2e11, routed_efficiency=0.7")
    assert cost.cpu_speeds(assumed) == dataclasses.replace(assumed, flops=2e11, routed_efficiency=0.7)
    monkeypatch.setenv(cost.CPU_SPEEDS, "")
    assert cost.cpu_speeds(assumed) == assumed


@pytest.mark.parametrize(
    "text", ["fast", "flops", "flops=", "flops=-1", "block=0", "element=nan", "bytes=inf", "waiting=1", "flops=1e9,"]
)
def test_speeds_that_make_no_sense_are_refused(text, monkeypatch):
    monkeypatch.setenv(cost.CPU_SPEEDS, text)
    with pytest.raises(ValueError, match=r"LAD_KERNELS_CPU_SPEEDS: expected NAME=NUMBER,\.\.\. .* got '"):
        cost.cpu_speeds(cost.SPEEDS["cpu", 4])
