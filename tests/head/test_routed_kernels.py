"""The routed backward's kernels against the formula in float64 with dZ of dropped pairs set to zero.

Allowances are those of head_formula.py, per region: in float32 2e-6 (measured: 1e-7 to 8e-7, with a single feature
1.4e-6) or, as in 16 bits, twice the error of the same formula in float32 cast once (measured: up to 1.9 times). Shapes
cross a full item of pairs, two blocks of the vocabulary and, but for D, a tile of features, each with a remainder.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from head_formula import (
    CONTRACT_FACTOR,
    DTYPES,
    FEATURE_CASES,
    FEATURES,
    FLOAT32_LIMIT,
    Inputs,
    error,
    make,
    regions,
    same,
)
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import dense
from lad_kernels.head.kernels.routed import launch as routed
from lad_kernels.head.kernels.routed.work import RoutedTiles, Schedule, Work, tiles_for
from lad_kernels.head.records import BLOCK, MANY, GradientSums, HeadGradients, LogitGradient, Needs, Routing

N, D, V = 70, 48, 521
UNALIGNED, ALIGNED = 67, 144  # other hidden sizes: 16-bit rows read element by element, and 16 bytes at a time
# By hidden size: full default tiles in front of a remainder, at least. See test_tile_edges.py.
CROSSES = {D: dict(N=1, V=2), UNALIGNED: dict(N=1, D=1, V=2), ALIGNED: dict(N=1, D=1, V=2)}
SMALL = RoutedTiles(16, Schedule(64, 4, 1), Schedule(64, 4, 1), Schedule(64, 4, 1))
NEEDS = Needs(True, True, True)


def inputs_of(device, dtype="float32", features=(), *, n=N, d=D, v=V) -> Inputs:
    return make(device, DTYPES[dtype], features, n=n, d=d, v=v)


def logits_of(inputs: Inputs, leaves: list[Tensor | None]) -> Tensor:
    """z [N, V] in the dtype of the leaves: hidden, weight, bias."""
    hidden, weight, bias = leaves
    transform, t = inputs.transform, inputs.transform.temperature
    z = transform.scale * (hidden @ weight.T + (0 if bias is None else bias))  # [N, V]
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / (t.to(z.dtype)[:, None] if isinstance(t, Tensor) else t)


def coefficients(inputs: Inputs) -> tuple[Tensor, LogitGradient]:
    """lse [N] and the gradient's three numbers per token, computed in float64, as float32."""
    leaves = [None if x is None else x.double() for x in (inputs.hidden, inputs.weight, inputs.bias)]
    z = logits_of(inputs, leaves)
    log_p = z.log_softmax(1)  # [N, V]
    g_logp, g_lse, g_entropy = inputs.upstream
    prob = g_lse - g_logp + g_entropy * (log_p.exp() * log_p).sum(1)  # [N]
    return z.logsumexp(1).float(), LogitGradient(g_logp, prob.float(), g_entropy)


def factors(routing: Routing, n: int, v: int) -> Tensor:
    """What each element of dZ is multiplied by, [N, V] float64: a pair's scale, 1 for dense tokens, else 0."""
    blocks = torch.repeat_interleave(torch.tensor(routing.offsets).diff()).to(routing.rows.device)  # [P]
    out = torch.zeros(n, routing.blocks, dtype=torch.float64, device=routing.rows.device)  # [N, blocks]
    out[routing.rows, blocks] = 1.0 if routing.scale is None else routing.scale.double()
    out[routing.dense] = 1.0
    return out.repeat_interleave(BLOCK, 1)[:, :v]


def formula(inputs: Inputs, gradient: LogitGradient, routing: Routing, dtype: torch.dtype) -> HeadGradients:
    """dZ by the formula, the rest by autograd, in `dtype`."""
    leaves = [
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
        for x in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    z = logits_of(inputs, leaves)
    log_p = z.detach().log_softmax(1)  # [N, V]
    onehot = torch.arange(z.shape[1], device=z.device) == inputs.targets[:, None]  # [N, V]
    entropy = 0 if gradient.entropy is None else gradient.entropy[:, None].to(dtype)
    dz = gradient.onehot[:, None] * onehot + log_p.exp() * (gradient.prob[:, None] - entropy * log_p)  # [N, V]
    z.backward((dz * factors(routing, *z.shape)).to(dtype))
    return HeadGradients(*(None if x is None else x.grad for x in leaves))


def route(inputs: Inputs, keep=1.0, dense=0.0, scaled=False, seed=1) -> Routing:
    """About `keep` of all pairs and `dense` of all tokens; keep = 1 keeps them all."""
    generator = torch.Generator().manual_seed(seed)
    n, blocks = len(inputs.hidden), -(-len(inputs.weight) // BLOCK)
    whole = torch.rand(n, generator=generator) < dense  # [N]
    kept = (torch.rand(n, blocks, generator=generator) < keep) & ~whole[:, None]  # [N, blocks]
    rows = kept.T.nonzero()[:, 1]  # [P]
    scale = (torch.rand(len(rows), generator=generator) + 0.5).to(inputs.hidden.device) if scaled else None
    device = inputs.hidden.device
    return Routing(rows.to(device), scale, [0, *kept.sum(0).cumsum(0).tolist()], whole.nonzero()[:, 0].to(device))


def run(inputs: Inputs, routing: Routing, needs=(True, True, True), gradient=None, **options) -> HeadGradients:
    lse, computed = coefficients(inputs)
    return routed.backward(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.bias,
        inputs.transform,
        lse,
        gradient or computed,
        routing,
        needs=Needs(*needs),
        **options,
    )


def check(inputs: Inputs, routing: Routing, gradient=None, limit=FLOAT32_LIMIT, **options) -> HeadGradients:
    """Every region within its allowance; tokens without pairs get exactly nothing."""
    gradients = run(inputs, routing, gradient=gradient, **options)
    gradient, targets = gradient or coefficients(inputs)[1], inputs.targets
    truth = regions(formula(inputs, gradient, routing, torch.float64), targets)
    contract = regions(formula(inputs, gradient, routing, torch.float32), targets)
    dtype = inputs.hidden.dtype
    for name, actual in regions(gradients, targets).items():
        assert actual.dtype == dtype
        allowed = CONTRACT_FACTOR * error(contract[name].to(dtype), truth[name])
        if dtype == torch.float32:
            allowed = max(allowed, limit)
        found = error(actual, truth[name])
        print(f"{name}: {found:.1e} of {allowed:.1e}")
        assert found <= allowed, name
    used = factors(routing, len(targets), len(inputs.weight)).any(1)  # [N]
    assert not gradients.hidden[~used].any()
    return gradients


@pytest.mark.parametrize(("dtype", "features"), FEATURE_CASES)
def test_all_pairs_give_the_whole_gradient(device, dtype, features):
    inputs = inputs_of(device, dtype, features)
    check(inputs, route(inputs))


def test_several_steps_of_features(device):
    """Rows that are read 16 bytes at a time, longer than a tile of any product."""
    inputs = inputs_of(device, "bfloat16", d=ALIGNED)
    check(inputs, route(inputs, 0.6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [0.0, 0.3])
def test_some_pairs_and_some_whole_tokens(device, dtype, dense):
    """Pairs with a scale of their own; some tokens take all blocks, some none."""
    inputs = inputs_of(device, dtype, FEATURES, d=UNALIGNED)
    routing = route(inputs, 0.4, dense, scaled=True)
    assert (factors(routing, N, V) == 0).all(1).any(), "every token has a pair"
    assert bool(len(routing.dense)) == bool(dense)
    check(inputs, routing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_multiplies_many_whole_tokens(device, dtype, monkeypatch):
    """Their float32 dW is what the pairs' is added to, before it is rounded once."""
    monkeypatch.setattr(routed, "JOINT", 0)
    inputs = inputs_of(device, dtype, FEATURES, d=UNALIGNED)
    check(inputs, route(inputs, 0.4, 0.3, scaled=True))


def test_no_entropy_gradient_and_one_temperature(device):
    inputs = inputs_of(device, n=37)
    inputs = dataclasses.replace(inputs, transform=dataclasses.replace(inputs.transform, temperature=0.8))
    routing = route(inputs, 0.5, 0.2)
    gradient = dataclasses.replace(coefficients(inputs)[1], entropy=None)
    check(inputs, routing, gradient)
    zero = dataclasses.replace(gradient, entropy=torch.zeros(37, device=device))
    same(run(inputs, routing, gradient=gradient), run(inputs, routing, gradient=zero))


@pytest.mark.parametrize("v", [2, 128, 129])
@pytest.mark.parametrize("d", [1, 33])
def test_small_vocabularies(device, d, v):
    inputs = inputs_of(device, features=("bias",), n=37, d=d, v=v)
    check(inputs, route(inputs), tiles=SMALL)


SHARED = [("float32", 0.0, 0), ("bfloat16", 0.0, 0), ("float16", 0.2, 99), ("float16", 0.2, 0), ("bfloat16", 0.2, 0)]


@pytest.mark.parametrize(("dtype", "dense", "joint"), SHARED)
def test_small_workspaces(device, dtype, dense, joint, monkeypatch):
    """Runs of some blocks, then pieces of a block, then single items; dH has the same bits in all of them."""
    monkeypatch.setattr(routed, "JOINT", joint)
    inputs = inputs_of(device, dtype, ("bias", "temperature"), n=37, d=130, v=300)
    routing = route(inputs, 0.9, dense)
    # Logits up to 16, sums of 130: their error is relative in p. 3.3e-6 in PTX for sm_90, 1.8e-6 in PyTorch on a CPU.
    options = dict(tiles=SMALL, limit=5e-6)
    expected = check(inputs, routing, **options)
    for pairs in (64, 16):
        found = check(inputs, routing, **options, workspace_bytes=1 + pairs * BLOCK * 8 * (2 if dense else 1))
        assert dense or torch.equal(found.hidden, expected.hidden)


@pytest.mark.parametrize("joint", [99, 0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pairs_join_every_slab_of_the_whole_tokens(device, dtype, joint, monkeypatch):
    """1,100 words in two slabs of the dense backward, and the pairs of each slab in several runs."""
    monkeypatch.setattr(routed, "JOINT", joint)
    inputs = inputs_of(device, dtype, ("bias", "temperature"), n=20, d=16, v=1100)
    routing = route(inputs, 0.5, 0.3)
    assert dense.split(len(routing.dense), 16, 1100, inputs.hidden.element_size(), 1)[1] == 1024
    check(inputs, routing, tiles=SMALL, workspace_bytes=1)


def test_a_run_goes_on_in_the_next_slab(device, monkeypatch):
    """One run of pairs, and the whole tokens in slabs of 256 words; also added to the sums of other tokens."""
    monkeypatch.setattr(dense, "split", lambda n, *shape, **options: (n, 256))
    inputs = inputs_of(device, "float16", ("bias", "temperature"), n=20, d=16, v=1100)
    routing = route(inputs, 0.5, 0.3)
    expected = check(inputs, routing, tiles=SMALL)
    others = [torch.full(x.shape, 0.5, device=device) for x in (inputs.weight, inputs.bias)]
    for joint in (99, 0):
        monkeypatch.setattr(routed, "JOINT", joint)
        check(inputs, routing, tiles=SMALL)
        sums = GradientSums(*(x.clone() for x in others))
        found = run(inputs, routing, tiles=SMALL, sums=sums)
        for total, x, whole in zip(sums, others, expected[1:], strict=True):
            assert error(total - x, whole.double()) < 2e-3
        assert torch.equal(found.hidden.half(), expected.hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_pairs_a_block(device, dtype):
    """Items of 128 pairs, full ones and rests of blocks, in one run and in several; dH has the bits of items of 64."""
    inputs = inputs_of(device, dtype, ("bias", "scale", "temperature"), n=150, d=64, v=300)
    routing = route(inputs, 0.95, scaled=True)
    assert len(routing.rows) >= MANY * routing.blocks
    dh = run(inputs, routing, tiles=tiles_for(inputs.hidden, inputs.weight, 0, inputs.transform)).hidden
    for workspace in (512 << 20, 1 + 256 * BLOCK * 8, 1):
        assert torch.equal(check(inputs, routing, workspace_bytes=workspace).hidden, dh)


def test_more_pairs_than_tables_count(device):
    with pytest.raises(ValueError, match=r"fewer than 2\^31 pairs, got 2147483648; pass fewer tokens"):
        Work.plan(Routing(torch.empty(0, device=device), None, [0, 2**31 - 1, 2**31], torch.empty(0)), 64)


@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [0, 5], [0, 0, 40, 40, 43, 143, 159, 159], [0, 32, 64, 65]])
def test_runs_cover_every_pair_once(offsets, device):
    (*_, pairs), blocks = offsets, len(offsets) - 1
    work = Work.plan(Routing(torch.empty(pairs, device=device), None, offsets, torch.empty(0)), 16)
    assert work.items[:, 2].sum() == pairs
    for capacity, start in itertools.product((16, 32, 48, 160), range(blocks)):
        runs = list(work.runs(slice(start, blocks), capacity))
        bounds = [(r.blocks.start, r.blocks.stop) for r in runs if r.first]
        assert [*(a for a, _ in bounds), blocks] == [start, *(b for _, b in bounds)]
        for r, following in itertools.zip_longest(runs, runs[1:]):
            items = work.items[r.items].tolist()
            assert sum(item[2] for item in items) == r.pairs.stop - r.pairs.start <= capacity
            assert [item[1] for item in items[:1]] in ([], [r.pairs.start])
            assert all(r.blocks.start <= item[0] < r.blocks.stop and 0 <= item[2] <= 16 for item in items)
            assert following is None or (following.first == r.last and following.pairs.start == r.pairs.stop)
        assert runs[-1].last
        assert runs[-1].pairs.stop == pairs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_pairs(device, dtype):
    inputs = inputs_of(device, dtype, FEATURES)
    gradients = run(inputs, route(inputs, 0.0))
    same(gradients, HeadGradients(*(torch.zeros_like(x) for x in (inputs.hidden, inputs.weight, inputs.bias))))
    none = inputs_of(device, dtype, FEATURES, n=0)
    gradients = run(none, route(none))
    same(gradients, HeadGradients(*(torch.zeros_like(x) for x in (none.hidden, none.weight, none.bias))))


def test_only_whole_tokens_are_the_dense_backward(device):
    inputs = inputs_of(device, "bfloat16", FEATURES)
    lse, gradient = coefficients(inputs)
    expected = dense.backward(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.bias,
        inputs.transform,
        lse,
        gradient,
        needs=NEEDS,
    )
    same(run(inputs, route(inputs, 0.0, 1.0)), expected)


@pytest.mark.parametrize("dense", [0.0, 0.3])
@pytest.mark.parametrize("atomics", [False, True])
def test_only_what_is_needed_is_computed(device, dense, atomics):
    """What is computed has the same bits, and every product is counted once; a bias alone costs one product."""
    inputs = inputs_of(device, "bfloat16", FEATURES, n=20, v=150)
    routing = route(inputs, 0.5, dense)
    full = run(inputs, routing)
    elements = int((factors(routing, 20, 150) > 0)[torch.isin(torch.arange(20, device=device), routing.rows)].sum())
    for needs in itertools.product((False, True), repeat=3):
        with flops.counting() as counted:
            gradients = run(inputs, routing, needs, atomics=atomics)
        if not dense:
            assert counted[0] == 2 * D * elements * (any(needs) + needs[0] + needs[1])
        expected = HeadGradients(*(x if need else None for x, need in zip(full, needs, strict=True)))
        same(*((x._replace(hidden=None) if atomics else x) for x in (gradients, expected)))
        assert (gradients.hidden is not None) == needs[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [0.0, 0.3])
def test_atomics(device, dtype, dense):
    inputs = inputs_of(device, dtype, FEATURES, d=UNALIGNED)
    for workspace in (512 << 20, 1):
        check(inputs, route(inputs, 0.5, dense), atomics=True, workspace_bytes=workspace)


def test_twice_bitwise_and_nothing_written_to_inputs(device):
    inputs = inputs_of(device, "float16", FEATURES)
    routing, (lse, gradient) = route(inputs, 0.5, 0.2, scaled=True), coefficients(inputs)
    saved = [*vars(inputs).values(), *vars(gradient).values(), *routing, inputs.transform.temperature, lse]
    saved = [(x, x.clone()) for x in saved if isinstance(x, Tensor)]
    same(run(inputs, routing), run(inputs, routing))
    assert all(torch.equal(x, copy) for x, copy in saved)


def test_float16_keeps_small_logit_gradients(device):
    """Coefficients of 1e-5, far below float16's range once multiplied by p; dense and routed tokens scale apart."""
    inputs = inputs_of(device, "float16", d=64)
    upstream = inputs.upstream * 1e-5
    routing = route(inputs, 0.6, 0.3)
    upstream[:, routing.dense] *= 1e-2
    hidden, weight = inputs.hidden * 256, inputs.weight / 256
    check(dataclasses.replace(inputs, hidden=hidden, weight=weight, upstream=upstream), routing)


@pytest.mark.parametrize("token", [0, 3])
def test_nan_stays_with_its_token_and_blocks(device, token):
    """Also when the token is the one that masked places would read, and only in blocks that it is routed to."""
    inputs = inputs_of(device, features=("bias",), n=17)
    routing = route(inputs, 0.5)
    (lse, gradient), hidden = coefficients(inputs), inputs.hidden.clone()
    hidden[token] = float("nan")
    gradients = routed.backward(
        hidden,
        inputs.weight,
        inputs.targets,
        inputs.bias,
        inputs.transform,
        lse,
        gradient,
        routing,
        needs=NEEDS,
    )
    assert gradients.hidden.isnan().any(1).nonzero().tolist() == [[token]]
    reached = factors(routing, 17, V)[token] > 0  # [V]
    assert 0 < reached.sum() < V
    assert torch.equal(gradients.weight.isnan().any(1), reached)
    assert torch.equal(gradients.bias.isnan(), reached)


def test_target_outside_the_vocabulary(device):
    inputs = inputs_of(device, n=17)
    targets = inputs.targets.clone()
    targets[[3, 5, 11]] = torch.tensor([-100, V, V + 5], device=device)
    gradient, routing = coefficients(inputs)[1], route(inputs, 0.8)
    gradients = []
    for y, onehot in ((targets, gradient.onehot), (inputs.targets, gradient.onehot * (targets == inputs.targets))):
        changed = dataclasses.replace(gradient, onehot=onehot)
        gradients.append(run(dataclasses.replace(inputs, targets=y), routing, gradient=changed))
    same(*gradients)


def test_layouts(device):
    """Strided hidden states, a transposed weight, strided vectors, an expanded coefficient."""
    inputs = inputs_of(device, "bfloat16", FEATURES)
    wide = torch.full((N, 2 * D), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, :D] = inputs.hidden
    spread = {name: getattr(inputs, name).repeat_interleave(2)[::2] for name in ("bias", "targets")}
    other = dataclasses.replace(inputs, hidden=wide[:, :D], weight=inputs.weight.T.contiguous().T, **spread)
    gradient = dataclasses.replace(coefficients(inputs)[1], onehot=torch.full((1,), 0.3, device=device).expand(N))
    routing = route(inputs, 0.5, 0.2, scaled=True)
    same(run(other, routing, gradient=gradient), run(inputs, routing, gradient=gradient))


def test_offsets_beyond_32_bits(device):
    """Rows 8,000,000 elements apart, so that the last ones lie beyond element 2^31 of their storage."""
    step, size = 8_000_000, 300
    if device == "cpu":  # numpy maps zeros without touching memory; torch would fill 5 GB
        storage = torch.from_numpy(np.zeros(step * size, dtype=np.int16)).view(torch.bfloat16)
    else:
        storage = torch.zeros(step * size, dtype=torch.bfloat16, device=device)
    inputs = inputs_of(device, "bfloat16", n=size, d=16, v=size)
    far = [storage.as_strided((size, 16), (step, 1), start) for start in (0, 64)]
    for view, x in zip(far, (inputs.hidden, inputs.weight), strict=True):
        view.copy_(x)
    routing = route(inputs, 0.1)
    same(run(dataclasses.replace(inputs, hidden=far[0], weight=far[1]), routing), run(inputs, routing))
