"""The head's kernels against the formula in float64: forward, block masses, dense backward.

Truth is the formula in float64 on inputs already rounded to the working dtype, differentiated by autograd. float32
outputs must lie within 2e-6 of it in relative Frobenius norm (measured: forward 1e-7, gradients 5e-7). Gradients may
have twice the error of the same formula in float32 cast once to the promised dtype (measured: up to 1.5 times; in
float32 this counts where products cancel, PTX for sm_90: 2.3e-6 of 4.8e-6), per region, so that no region hides behind
another: dH, rows of dW that are targets, rows that are not, db. What must not round is compared bitwise.

Shapes cross what they must at the default tiles: two full tiles of tokens, two of the vocabulary and a step of
features, each with a remainder (CROSSES; test_tile_edges.py compares it with the tables). Smaller tiles appear where
the edge is the point.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from head_formula import (
    CONTRACT_FACTOR,
    DTYPES,
    FEATURE_CASES,
    FEATURES,
    FLOAT32_LIMIT,
    D,
    Inputs,
    V,
    error,
    formula,
    make,
    regions,
    same,
)
from torch import Tensor

from lad_kernels.head.kernels import dense, forward, tile_table
from lad_kernels.head.kernels.tile import add_at
from lad_kernels.head.kernels.tile_table import Tiles
from lad_kernels.head.records import BLOCK, HeadForward, HeadGradients, LogitGradient, Needs

SMALL = Tiles(16, 128, 32, 2, 4, 2)


def run(inputs: Inputs, tiles=None, want_entropy=True, want_block_lse=True, want_correct=False) -> HeadForward:
    return forward.forward(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.bias,
        inputs.transform,
        want_entropy=want_entropy,
        want_block_lse=want_block_lse,
        want_correct=want_correct,
        tiles=tiles,
    )


def logit_gradient(inputs: Inputs, entropy: Tensor) -> LogitGradient:
    g_logp, g_lse, g_entropy = inputs.upstream
    return LogitGradient(g_logp, g_lse - g_logp - g_entropy * entropy, g_entropy)


def run_backward(inputs: Inputs, lse: Tensor, gradient: LogitGradient, needs=(True, True, True), **options):
    return dense.backward(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.bias,
        inputs.transform,
        lse,
        gradient,
        needs=Needs(*needs),
        **options,
    )


def check_forward(outputs: HeadForward, inputs: Inputs) -> None:
    truth = formula(inputs, torch.float64)[0]
    assert (outputs.lse_rest.abs() <= 2.0**-23 * outputs.lse.abs().clamp(min=1)).all()  # of one rounding
    for name, actual, expected in zip(truth._fields[:4], outputs, truth):
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        found = error(actual, expected)
        print(f"{name}: {found:.1e} of {FLOAT32_LIMIT:.0e}")
        assert found <= FLOAT32_LIMIT, name


def check_gradients(gradients: HeadGradients, inputs: Inputs) -> None:
    """Every region within its allowance."""
    truth = regions(formula(inputs, torch.float64)[1], inputs.targets)
    contract = regions(formula(inputs, torch.float32)[1], inputs.targets)
    dtype = inputs.hidden.dtype
    for name, actual in regions(gradients, inputs.targets).items():
        assert actual.dtype == dtype
        allowed = CONTRACT_FACTOR * error(contract[name].to(dtype), truth[name])
        if dtype == torch.float32:
            allowed = max(allowed, FLOAT32_LIMIT)
        found = error(actual, truth[name])
        print(f"{name}: {found:.1e} of {allowed:.1e}")
        assert found <= allowed, name


def check(inputs: Inputs, tiles=None, **options) -> None:
    """Forward and backward within their allowances."""
    outputs = run(inputs, tiles)
    check_forward(outputs, inputs)
    gradient = logit_gradient(inputs, outputs.entropy)
    check_gradients(run_backward(inputs, outputs.lse, gradient, tiles=tiles, **options), inputs)


@pytest.mark.parametrize(("dtype", "features"), FEATURE_CASES)
def test_forward_and_backward_match_float64(device, dtype, features):
    """Default tiles, whose edges are crossed along every axis."""
    check(make(device, DTYPES[dtype], features))


@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_descriptors(device, dtype, stores):
    """The tiles that read, and write, through host-made descriptors, which only Hopper and later choose."""
    inputs = make(device, DTYPES[dtype], FEATURES)
    tiles = Tiles(128, 128, 32, 8, 8, 2, tma=True, stores=stores)
    check(inputs, tiles, workspace_bytes=1)


@triton.jit
def _with_term(g, columns, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREAD: tl.constexpr):
    """out [programs * ROWS, COLUMNS]: g [programs * ROWS], with 3 added in one column"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    given = tl.zeros((ROWS, COLUMNS), tl.float32) + tl.load(g + rows)[:, None]  # [ROWS, COLUMNS]
    term = tl.full((ROWS, 1), 3.0, tl.float32)  # [ROWS, 1]
    given = add_at(given, tl.load(columns + rows)[:, None], term, COLUMNS, THREAD)  # [ROWS, COLUMNS]
    tl.store(out + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], given)


@pytest.mark.parametrize("thread", [0, 6, 31])
@pytest.mark.parametrize("width", [128, 256])
def test_a_term_is_added_in_one_column(device, width, thread):
    """Every column, and some that a tile has not; NaN stays."""
    columns = torch.cat([torch.arange(-width, 2 * width), torch.tensor([-(2**31), 2**31 - 1, 1 << 20, -100])])
    columns = torch.nn.functional.pad(columns, (0, -len(columns) % 64)).int().to(device)
    g = torch.linspace(-2, 2, len(columns), device=device)
    g[5] = g[width + 7] = float("nan")
    out = torch.empty(len(columns), width, device=device)
    _with_term[(len(columns) // 64,)](g, columns, out, ROWS=64, COLUMNS=width, THREAD=thread)
    want = g[:, None] + 3 * (columns[:, None] == torch.arange(width, device=device))
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("v", [2, 127, 128, 129, 257])
@pytest.mark.parametrize("d", [1, 33])
def test_small_vocabularies(device, d, v):
    """One word more or fewer than a block; a tile of 256 whose second block is empty, full or one word."""
    inputs = make(device, n=17, d=d, v=v)
    for tiles in (SMALL, dataclasses.replace(SMALL, block_v=256)):
        check(inputs, tiles)


def test_no_tokens(device):
    inputs = make(device, torch.bfloat16, FEATURES, n=0)
    outputs = run(inputs)
    assert [tuple(x.shape) for x in outputs[:5]] == [(0,), (0,), (0,), (5, 0), (0,)]
    gradients = run_backward(inputs, outputs.lse, logit_gradient(inputs, outputs.entropy))
    same(gradients, HeadGradients(*(torch.zeros_like(x) for x in (inputs.hidden, inputs.weight, inputs.bias))))


def test_spikes_on_tile_edges(device):
    """Each token's largest logit sits on the first or last column of a tile or block, or on the last word."""
    edges = torch.tensor(sorted({c for b in (0, 128, 256, 384, 512) for c in (b, b + 127)} - {639} | {V - 1}))
    inputs = make(device, d=128, n=2 * len(edges))
    spikes = edges.repeat(2).to(device)
    rows = torch.arange(len(spikes), device=device)
    hidden, weight = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)
    hidden[rows, rows] = 1.0
    weight[spikes, rows] = torch.linspace(1.0, 40.0, len(spikes), device=device)
    weight += 1e-2 * inputs.weight
    for targets in (spikes, (spikes + 1) % V):
        spiked = dataclasses.replace(inputs, hidden=hidden, weight=weight, targets=targets)
        check_forward(run(spiked), spiked)


@pytest.mark.parametrize(
    ("size", "shift"), [(1e4, 0.0), (1.0, -1e4), (1.0, 1e4)], ids=["spread", "all-negative", "positive"]
)
def test_extreme_logits(device, size, shift):
    """Logits of +-1e4, and rows whose logits are all far below or above zero: finite everywhere, no overflow."""
    inputs = make(device, n=17)
    inputs = dataclasses.replace(inputs, weight=inputs.weight * size, bias=torch.full((V,), shift, device=device))
    outputs = run(inputs)
    truth, _ = formula(inputs, torch.float64)
    scale = truth.lse.abs().max()
    assert (outputs.lse - truth.lse).abs().max() <= FLOAT32_LIMIT * scale
    assert (outputs.logprobs - truth.logprobs).abs().max() <= FLOAT32_LIMIT * scale
    assert outputs.entropy.min() >= 0
    assert outputs.logprobs.max() <= 0
    gradients = run_backward(inputs, outputs.lse, logit_gradient(inputs, outputs.entropy))
    assert all(x.isfinite().all() for x in (*outputs[:5], *gradients))


def test_softcap_keeps_small_and_large_logits(device):
    """c tanh(x / c) near zero and in saturation: no cancellation in the value or in its slope."""
    inputs = make(device, features=("softcap",), n=17, d=32)
    for size in (1e-3, 1.0, 30.0):
        check(dataclasses.replace(inputs, weight=inputs.weight * size), SMALL)


def test_layouts(device):
    """Strided hidden states, a transposed weight, strided vectors, an expanded coefficient."""
    inputs = make(device, torch.bfloat16, FEATURES, n=37)
    wide = torch.full((37, 2 * D), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, :D] = inputs.hidden
    spread = {name: getattr(inputs, name).repeat_interleave(2)[::2] for name in ("bias", "targets")}
    other = dataclasses.replace(inputs, hidden=wide[:, :D], weight=inputs.weight.T.contiguous().T, **spread)
    outputs = run(other)
    same(outputs, run(inputs))
    check(other)
    onehot = torch.full((1,), 0.3, device=device).expand(37)  # what the backward of a sum hands down
    gradient = dataclasses.replace(logit_gradient(other, outputs.entropy), onehot=onehot)
    contiguous = dataclasses.replace(gradient, onehot=onehot.clone(memory_format=torch.contiguous_format))
    spread_lse = outputs.lse.repeat_interleave(2)[::2]
    same(run_backward(other, spread_lse, gradient), run_backward(other, outputs.lse, contiguous))


def test_unaligned(device):
    """Rows that start on odd addresses take the small tiles."""
    inputs = make(device, torch.bfloat16, FEATURES, n=70, d=45)
    assert not tile_table.fits(inputs.hidden, SMALL)
    check(inputs)


@pytest.mark.parametrize(("dtype", "d"), [(dtype, d) for dtype in ("bfloat16", "float32") for d in (D, 97)])
def test_a_token_does_not_depend_on_its_batch(device, dtype, d, monkeypatch):
    """Bitwise: alone, among others, elsewhere (for an odd D off 16 bytes), in another run of rows, on another grid."""
    inputs = make(device, DTYPES[dtype], ("temperature",), n=133, d=d)
    whole = run(inputs)

    def part(rows) -> Inputs:
        transform = dataclasses.replace(inputs.transform, temperature=inputs.transform.temperature[rows])
        hidden, targets = inputs.hidden[rows], inputs.targets[rows]
        return dataclasses.replace(inputs, hidden=hidden, targets=targets, transform=transform)

    places = [0, 127, 128, 132]
    for rows in (*(slice(i, i + 1) for i in places), slice(3, 132), torch.tensor(places[::-1], device=device)):
        same(run(part(rows)), HeadForward(*(x[..., rows] for x in whole[:5])))

    monkeypatch.setattr(forward, "_RUN", 128)
    monkeypatch.setattr(forward, "_PARTIAL_BYTES", 1)
    same(run(inputs), whole)
    same(run(inputs, want_block_lse=False), whole._replace(block_lse=None))
    likeliest = run(inputs, want_correct=True)
    same(likeliest._replace(correct=None), whole)
    assert torch.equal(likeliest.correct, formula(inputs, torch.float64)[0].correct)
    probed = tile_table.probe(inputs.hidden.device)
    monkeypatch.setattr(tile_table, "probe", lambda device: dataclasses.replace(probed, processors=2))
    same(run(inputs, want_entropy=False), whole._replace(entropy=None))


def test_target_outside_the_vocabulary(device):
    """A shard of the vocabulary meets targets that are not its own: probability 0, gradient of the softmax only."""
    inputs = make(device, n=17)
    targets, absent = inputs.targets.clone(), [3, 5, 11]
    targets[absent] = torch.tensor([-100, V, V + 5], device=device)
    expected = run(inputs)
    expected.logprobs[absent] = -float("inf")
    same(run(dataclasses.replace(inputs, targets=targets)), expected)


def test_nan_stays_with_its_token(device):
    inputs = make(device, n=17)
    hidden = inputs.hidden.clone()
    hidden[3, 0] = float("nan")
    broken = dataclasses.replace(inputs, hidden=hidden)
    outputs, expected = run(broken), run(inputs)
    rows = run_backward(broken, outputs.lse, logit_gradient(inputs, expected.entropy)).hidden.isnan().all(1)
    for nan in (rows, *(x.reshape(-1, 17).isnan().all(0) for x in outputs[:4])):
        assert nan.nonzero().tolist() == [[3]]
    assert outputs.lse_rest[3] == 0  # which multiplies coefficients: 0 stays 0


def test_backward_twice_bitwise_and_nothing_written_to_inputs(device):
    inputs = make(device, torch.float16, FEATURES, n=37)
    outputs = run(inputs)
    gradient = logit_gradient(inputs, outputs.entropy)
    saved = [*vars(inputs).values(), *vars(gradient).values(), inputs.transform.temperature, outputs.lse]
    saved = [(x, x.clone()) for x in saved if isinstance(x, Tensor)]
    same(run_backward(inputs, outputs.lse, gradient), run_backward(inputs, outputs.lse, gradient))
    assert all(torch.equal(x, copy) for x, copy in saved)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_slabs_and_row_runs(device, dtype):
    """A workspace too small for all columns, then for all rows: two slabs, then two runs of rows."""
    inputs = make(device, DTYPES[dtype], ("bias", "temperature"), n=300, d=16, v=1100)
    assert dense.split(300, 16, 1100, 2, 1) == (256, 1024)
    size = inputs.hidden.element_size()
    staged = dtype != "bfloat16"  # whose dW leaves its product rounded
    columns = 1024 * (300 * size + 4 * 16 * staged)
    assert dense.split(300, 16, 1100, size, columns, staged=staged) == (300, 640)
    for workspace in (columns, 1):
        check(inputs, Tiles(256, 512, 16, 8, 8, 2) if device == "cpu" else None, workspace_bytes=workspace)


def test_offsets_beyond_32_bits(device):
    """Rows 8,000,000 elements apart, so that the last ones lie beyond element 2^31 of their storage."""
    step, size = 8_000_000, 300
    if device == "cpu":  # numpy maps zeros without touching memory; torch would fill 5 GB
        storage = torch.from_numpy(np.zeros(step * size, dtype=np.int16)).view(torch.bfloat16)
    else:
        storage = torch.zeros(step * size, dtype=torch.bfloat16, device=device)
    inputs = make(device, torch.bfloat16, n=size, d=16, v=size)
    far = [storage.as_strided((size, 16), (step, 1), start) for start in (0, 64)]
    for view, x in zip(far, (inputs.hidden, inputs.weight), strict=True):
        view.copy_(x)
    other = dataclasses.replace(inputs, hidden=far[0], weight=far[1])
    assert tile_table.by_rows(far[0]) is far[0]
    assert (size - 1) * step > 2**31
    same(run(other), run(inputs))
    check(other)


@pytest.mark.parametrize("workspace", [1, 64 << 20, 512 << 20])
@pytest.mark.parametrize("shape", [(1, 1, 2), (4096, 2048, 151936), (65536, 4096, 50257), (10**6, 8192, 256000)])
def test_split_fits_the_workspace(shape, workspace):
    n, d, v = shape
    rows, columns = dense.split(n, d, v, 2, workspace)
    assert 1 <= rows <= n
    assert columns in range(BLOCK, v + BLOCK, BLOCK)
    smallest = rows <= 256 and columns <= 1024
    assert smallest or columns * (2 * rows + 4 * d) <= workspace


def test_only_what_is_needed_is_computed(device, monkeypatch):
    """A frozen head costs no dW product, a frozen body no dH product, and what is computed has the same bits."""
    inputs = make(device, torch.bfloat16, FEATURES, n=37)
    outputs = run(inputs)
    gradient = logit_gradient(inputs, outputs.entropy)
    full = run_backward(inputs, outputs.lse, gradient)
    shapes = []
    for name in ("accumulate", "rounded_product"):
        product = getattr(dense, name)
        record = lambda out, *x, p=product, **y: (shapes.append(tuple(out.shape)), p(out, *x, **y))  # noqa: E731
        monkeypatch.setattr(dense, name, record)
    products = {"hidden": [(37, D)], "weight": [(V, D)], "bias": []}
    for index, name in enumerate(full._fields):
        shapes.clear()
        gradients = run_backward(inputs, outputs.lse, gradient, tuple(i == index for i in range(3)))
        assert shapes == products[name]
        same(gradients, HeadGradients(*(x if i == index else None for i, x in enumerate(full))))
    assert run_backward(inputs, outputs.lse, gradient, (False, False, False)) == HeadGradients(None, None, None)


def test_zero_coefficients_give_exactly_zero(device):
    inputs = make(device, torch.bfloat16, FEATURES, n=37)
    outputs = run(inputs)
    keep = (torch.arange(37, device=device) % 3 > 0).float()
    gradient = LogitGradient(*(x * keep for x in vars(logit_gradient(inputs, outputs.entropy)).values()))
    assert torch.equal(run_backward(inputs, outputs.lse, gradient).hidden.any(dim=1), keep.bool())
    nothing = LogitGradient(torch.zeros_like(keep), torch.zeros_like(keep))
    assert not any(x.any() for x in run_backward(inputs, outputs.lse, nothing))


def test_no_entropy_gradient_is_a_zero_entropy_gradient(device):
    inputs = make(device, torch.float32, n=37)
    outputs = run(inputs)
    gradient = logit_gradient(inputs, outputs.entropy)
    absent, zero = (dataclasses.replace(gradient, entropy=x) for x in (None, torch.zeros(37, device=device)))
    same(run_backward(inputs, outputs.lse, absent), run_backward(inputs, outputs.lse, zero))


def test_float16_keeps_small_logit_gradients(device):
    """p c of about 1e-8 is nothing in float16, yet the products it enters are not: dW of rows that are no targets."""
    inputs = make(device, torch.float16, n=128, d=64, v=1100)
    inputs = dataclasses.replace(
        inputs, hidden=inputs.hidden * 256, weight=inputs.weight / 256, upstream=inputs.upstream * 1e-5
    )
    check(inputs)
