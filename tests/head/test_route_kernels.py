"""The kernels that choose a routing's pairs against PyTorch's `choose`: the same lists, the same error bound.

Exponentials of the two round differently, so that a pair whose norm is within a few roundings of its bar, or a token as
close to being dense, may be decided differently; every other pair must be the same, and such cases are very rare.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lad_kernels.head import routing
from lad_kernels.head.kernels.routed import route as kernels
from lad_kernels.head.records import BLOCK, Dropped, LogitGradient, LogitTransform, Routing

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Arguments of `choose`; masses that add up to lse unless a test spoils them."""

    targets: Tensor  # [A]
    lse: Tensor  # [A]
    logprobs: Tensor  # [A]
    block_lse: Tensor  # [blocks, A]
    gradient: LogitGradient
    theta: float
    longest: Tensor  # [blocks]
    reach: Tensor  # [A]

    def choose(self, path=kernels, *, dense_share=1.0, unbiased=True, most_pairs=None) -> tuple[Routing, Dropped]:
        *given, longest, reach = vars(self).values()
        found, active, lost = path.choose(
            *given,
            lambda: (longest, reach),
            lambda lost: lost,
            dense_share=dense_share,
            unbiased=unbiased,
            most_pairs=most_pairs,
        )
        assert max(active, 1) == lost.active
        return found, lost._replace(active=active)


def case(
    tokens: int, blocks: int, device: str, *, theta=0.02, spread=3.0, entropy=False, stride=0, seed=0, v=None
) -> Case:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    masses = spread * draw(blocks, tokens)  # [blocks, A]
    lse = masses.logsumexp(0)  # [A]
    targets = torch.randint(0, v or blocks * BLOCK - 5, (tokens,), generator=gen)  # [A]
    inside = masses[targets // BLOCK, torch.arange(tokens)] - lse  # [A]
    logprobs = (inside - 4 * torch.rand(tokens, generator=gen)).clamp(max=0.0)  # [A]
    c = draw(tokens)  # [A]
    c = torch.where(torch.arange(tokens) % 7 == 3, 1e-3 * c, c)
    g = 0.3 * draw(tokens) if entropy else None  # [A]
    gradient = LogitGradient(c, -c if g is None else -c - 2.0 * g, g)
    apart = torch.full((blocks, max(stride, tokens)), torch.nan)  # [blocks, stride]
    apart[:, :tokens] = masses
    parts = [None if x is None else x.to(device) for x in (gradient.onehot, gradient.prob, gradient.entropy)]
    x = (targets, lse, logprobs, apart, 1 + draw(blocks).abs(), 2 + draw(tokens).abs())
    targets, lse, logprobs, apart, longest, reach = (y.to(device) for y in x)
    return Case(targets, lse, logprobs, apart[:, :tokens], LogitGradient(*parts), theta, longest, reach)


def lists(found: Routing, tokens: int) -> tuple[Tensor, Tensor]:
    """Scale of each active pair, NaN where there is none; whether a token is dense; ([blocks, A], [A]) on the CPU."""
    counts = torch.tensor(found.offsets).diff()  # [blocks]
    rows, dense = found.rows.cpu(), found.dense.cpu()  # [P], [Nd]
    blocks = torch.arange(len(counts)).repeat_interleave(counts)  # [P]
    places = blocks * tokens + rows  # [P]
    assert len(rows) == found.offsets[-1]
    assert rows.dtype == dense.dtype == torch.int64
    assert (places.diff() > 0).all(), "not in the order of blocks, then of tokens"
    assert (dense.diff() > 0).all()
    out = torch.full((len(counts), tokens), torch.nan)
    out[blocks, rows] = torch.inf if found.scale is None else found.scale.cpu().nan_to_num(nan=-1.0)
    whole = torch.zeros(tokens, dtype=torch.bool)
    whole[dense] = True
    assert not (out[:, whole] == out[:, whole]).any(), "pairs of a dense token"
    return out, whole


def check(x: Case, path=kernels, *, flips: int = 2, **options) -> Routing:
    """`path` against PyTorch: at most `flips` pairs or tokens differ, each within its margin; what it found."""
    (blocks, tokens), share = x.block_lse.shape, options.get("dense_share", 1.0)
    unbiased = options.get("unbiased", True)
    (found, lost), (true, truth) = x.choose(path, **options), x.choose(routing, **options)
    (ours, many), (theirs, whole) = lists(found, tokens), lists(true, tokens)
    norms = routing._BlockNorms(x.block_lse, x.lse, x.logprobs, x.targets, x.gradient)
    norm = torch.cat([n for _, n in norms])  # [blocks, A]
    threshold = x.theta * norms.size.sum() / (norms.size != 0).sum().clamp(min=1)  # []
    bar = threshold * routing._draws(x.lse, slice(0, blocks)) if unbiased else threshold  # [blocks, A]
    unsure = 16 * EPS * (norm + norms.size)  # [blocks, A]
    near = (norm - bar).abs() <= unsure  # [blocks, A]
    expected = ((norm / threshold).clamp(max=1.0) if unbiased else ~(norm <= threshold)).sum(0)  # [A]
    slack = 4 * EPS * blocks + (unsure / threshold).sum(0) if unbiased else near.sum(0)  # [A]
    close = ((expected - share * blocks).abs() <= slack).cpu()  # [A]
    norm, unsure, near, threshold = norm.cpu(), unsure.cpu(), near.cpu(), threshold.cpu()
    odd_tokens = many != whole  # [A]
    odd_pairs = (ours.isnan() != theirs.isnan()) & ~odd_tokens  # [blocks, A]
    assert not (odd_tokens & ~close).any()
    assert not (odd_pairs & ~near).any()
    differ = int(odd_tokens.sum() + odd_pairs.sum())
    assert differ <= flips
    both = ~(ours.isnan() | theirs.isnan())  # [blocks, A]
    if unbiased:
        rough = 1e-6 + unsure / norm.clamp(min=1e-38)  # [blocks, A]
        assert ((ours == theirs) | ((ours - theirs).abs() <= rough * theirs.abs()))[both].all()
    else:
        assert found.scale is None
    assert lost.active == truth.active == int((norms.size != 0).sum())
    if differ == 0:
        for name, ours_, theirs_ in zip(Dropped._fields[1:], lost[1:], truth[1:]):
            finite = theirs_[theirs_.isfinite()].abs()
            floor = 1e-6 * finite.max().item() if len(finite) else 0.0
            torch.testing.assert_close(ours_, theirs_, rtol=2e-4, atol=floor, equal_nan=True, msg=name)
    return found


SIZES = {  # tokens, blocks; the lists have a row more than blocks
    "one pair": (1, 1),
    "one token": (1, 70),
    "one block": (150, 1),
    "a tile": (64, 64),
    "one less": (63, 62),
    "one row more": (64, 63),
    "one more": (65, 65),
    "tiles": (300, 200),
    "sums of more than one tile": (3, 33 * 64 + 1),
}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_same_lists_and_certificate(size, unbiased, entropy, device):
    x = case(*SIZES[size], device, entropy=entropy)
    found = check(x, unbiased=unbiased)
    if size == "tiles":
        kept = len(found.rows) / x.block_lse.numel()
        assert 0.01 < kept < 0.5


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.9])
def test_dense_tokens(share, unbiased, device):
    x = case(300, 130, device, spread=3.0, theta=0.01)
    x.block_lse[:, ::3] *= 0.1  # flat rows, that keep many blocks
    x = dataclasses.replace(x, lse=x.block_lse.logsumexp(0))
    found = check(x, dense_share=share, unbiased=unbiased)
    assert 0 < len(found.dense) < 300 or share in (0.0, 0.9)
    if share == 0.0:
        assert len(found.dense) > 200  # the others have no pair at all


@pytest.mark.parametrize("unbiased", [False, True])
def test_all_kept_none_kept(unbiased, device):
    x = case(140, 70, device)
    every = check(dataclasses.replace(x, theta=1e-30), unbiased=unbiased, dense_share=2.0)
    assert len(every.rows) == 140 * 70
    none = check(dataclasses.replace(x, theta=1e6), unbiased=False)
    assert len(none.rows) == len(none.dense) == 0
    zero = LogitGradient(*(torch.zeros_like(x.lse) for _ in range(2)))
    check(dataclasses.replace(x, gradient=zero), unbiased=unbiased)
    check(dataclasses.replace(x, theta=0.0), unbiased=unbiased)


@pytest.mark.parametrize("path", (kernels, routing), ids=("kernels", "pytorch"))
@pytest.mark.parametrize("entropy", [False, True])
def test_tokens_without_a_gradient_are_as_good_as_left_out(entropy, path, device):
    """They have no pairs, even where no pair may be missing, and no part in the threshold or the sums; NaN or not."""
    x = case(140, 70, device, entropy=entropy)
    alive = torch.arange(140, device=device) % 3 > 0  # [A]
    some = alive.nonzero()[:, 0]  # [S]
    gradient = LogitGradient(*(None if c is None else torch.where(alive, c, 0.0) for c in vars(x.gradient).values()))
    bad = lambda y: torch.where(alive, y, torch.nan)  # noqa: E731
    spoilt = [x.targets, bad(x.lse), bad(x.logprobs), bad(x.block_lse), gradient, x.theta, x.longest, bad(x.reach)]
    found, lost = Case(*spoilt).choose(path, unbiased=False)
    given = [y[some] for y in (x.targets, x.lse, x.logprobs)] + [x.block_lse[:, some], x.gradient.select(some)]
    true, truth = Case(*given, x.theta, x.longest, x.reach[some]).choose(path, unbiased=False)
    assert found.offsets == true.offsets
    assert torch.equal(found.rows, some[true.rows])
    assert lost.active == truth.active == len(some)
    assert not lost.mass[~alive].any()
    for ours, theirs in ((lost.mass[some], truth.mass), (lost.by_token[some], truth.by_token)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lost.by_block, truth.by_block, rtol=1e-5, atol=1e-6)
    drawn, lost = Case(*spoilt).choose(path)
    assert alive[drawn.rows].all()
    assert all(y.isfinite().all() for y in lost[1:])
    whole, _ = dataclasses.replace(Case(*spoilt), theta=1e-30).choose(path, dense_share=0.0)
    assert torch.equal(whole.dense, some)
    assert not len(whole.rows)


@pytest.mark.parametrize("unbiased", [False, True])
def test_most_pairs(unbiased, device):
    """With one pair too many every token is dense; the limit itself is allowed."""
    x = case(140, 70, device)
    pairs = len(check(x, unbiased=unbiased).rows)
    assert len(check(x, unbiased=unbiased, most_pairs=pairs).rows) == pairs
    found = check(x, unbiased=unbiased, most_pairs=pairs - 1)
    assert len(found.rows) == found.offsets[-1] == 0
    assert torch.equal(found.dense.cpu(), torch.arange(140))
    assert found.blocks == 70
    longest = x.longest.clone()
    longest[3] = torch.nan
    check(dataclasses.replace(x, longest=longest), unbiased=unbiased, most_pairs=pairs - 1)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("share", [0.3, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_not_a_number_and_infinity(entropy, share, unbiased, device):
    """In masses, lse, log-probs, coefficients and norms of rows; what is NaN is kept, or its token dense."""
    plain = case(70, 66, device, entropy=entropy)

    def spoil(name: str, at: tuple, value: float) -> Case:
        part = getattr(plain, name).clone()
        part[at] = value
        return dataclasses.replace(plain, **{name: part})

    nan, inf = torch.nan, torch.inf
    spoiled = [spoil("block_lse", (5, 67), v) for v in (nan, inf, -inf)]
    spoiled += [spoil("lse", (9,), v) for v in (nan, inf, -inf)] + [spoil("logprobs", (7,), v) for v in (nan, -inf)]
    spoiled += [spoil("longest", (3,), v) for v in (nan, inf)] + [spoil("reach", (66,), nan)]
    for x in spoiled:
        check(x, unbiased=unbiased, dense_share=share)
    kept, whole = lists(check(spoiled[0], unbiased=unbiased, dense_share=share), 70)
    assert whole[67] or not kept[5, 67].isnan()
    for value in (nan, inf):
        c = plain.gradient.onehot.clone()
        c[2] = value
        gradient = LogitGradient(c, -c, plain.gradient.entropy)
        check(dataclasses.replace(plain, gradient=gradient), unbiased=unbiased, dense_share=share)


def test_rows_far_apart_and_columns_far_apart(device):
    """Masses of fewer tokens than were scored; a transposed tensor; and coefficients that are not contiguous."""
    x, wide = case(140, 70, device, seed=5), case(140, 70, device, seed=5, stride=999)
    assert wide.block_lse.stride() == (999, 1)
    turned = dataclasses.replace(x, block_lse=x.block_lse.T.contiguous().T)
    loose = {k: torch.stack([getattr(x, k)] * 2, 1)[:, 0] for k in ("targets", "lse", "logprobs", "reach")}
    c = torch.stack([x.gradient.onehot, x.gradient.prob], 1)  # [A, 2]
    strided = dataclasses.replace(x, gradient=LogitGradient(c[:, 0], c[:, 1]), **loose)
    first = check(x)
    for other in (wide, turned, strided):
        found = check(other)
        assert torch.equal(found.rows, first.rows)
        assert torch.equal(found.scale, first.scale)
        assert found.offsets == first.offsets


def test_targets_outside_the_vocabulary_are_in_no_block(device):
    x = case(140, 70, device)
    targets = torch.where(torch.arange(140, device=device) % 3 == 0, -100, x.targets)
    check(dataclasses.replace(x, targets=targets))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="8 GiB of masses")
def test_more_pairs_than_an_int32_counts(device):
    x = case(128, 70, device)
    wide = torch.empty(70, 2**31 // 69 + 64, device=device)  # the last row begins beyond 2^31
    wide[:, :128] = x.block_lse
    check(dataclasses.replace(x, block_lse=wide[:, :128]))


@pytest.mark.parametrize("unbiased", [False, True])
def test_two_runs_agree_bitwise(unbiased, device):
    x = case(300, 130, device, entropy=True)
    (a, lost), (b, again) = (x.choose(unbiased=unbiased, dense_share=0.2) for _ in range(2))
    assert (a.offsets, lost.active) == (b.offsets, again.active)
    for ours, theirs in zip((a.rows, a.dense, *lost[1:]), (b.rows, b.dense, *again[1:])):
        assert torch.equal(ours, theirs)


class Operations(TorchDispatchMode):
    """Names of what torch dispatches beside our kernels, without what launches nothing."""

    FREE = ("empty", "view", "slice", "select", "unbind", "promote_types", "reshape", "detach", "alias", "t", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names += [] if name in self.FREE else [name]
        return func(*args, **(kwargs or {}))


def test_operations_and_syncs(device, monkeypatch):
    """A whole `route` of any size: five kernels and about two dozen operations; one list goes to the host."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, launched, moved = case(300, 130, device, entropy=True), [], []
    hidden, weight = torch.randn(400, 8, device=device), torch.randn(130 * BLOCK - 5, 8, device=device)
    tokens, temperature = torch.arange(0, 300, device=device), torch.linspace(0.5, 1.5, 300, device=device)

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            def launch(*arguments, **options) -> None:
                launched.append(self.name)
                with _disable_current_modes():  # the interpreter moves its arguments
                    self.kernel[grid](*arguments, **options)

            return launch

    for name in ("_token_kernel", "_mark_kernel", "_count_kernel", "_drop_kernel", "_list_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name))
    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: moved.append(len(self)) or plain(self))
    with Operations() as seen:
        routing.route(
            hidden, weight, x.targets, LogitTransform(temperature=temperature), x.lse, x.logprobs, x.block_lse,
            x.gradient, x.theta, tokens=tokens, unbiased=True, dense_share=0.2, triton=True,
        )  # fmt: skip
    print(f"{len(launched)} kernels, {len(seen.names)} operations: {', '.join(seen.names)}")
    assert launched == ["_token_kernel", "_mark_kernel", "_count_kernel", "_drop_kernel", "_list_kernel"]
    assert len(seen.names) <= 30
    assert moved == [133]
    assert not {"nonzero", "_local_scalar_dense", "item", "masked_select", "equal"} & set(seen.names)


def test_draws_are_those_of_pytorch(device):
    """All pairs have nearly one norm: which of them are kept tells the draws below norm / threshold from the others."""
    tokens, blocks = 300, 200
    masses = torch.full((blocks, tokens), -1.0, device=device)
    lse = torch.linspace(3.0, 3.001, tokens, device=device)
    c = torch.ones(tokens, device=device)
    x = Case(
        torch.full_like(lse, -1, dtype=torch.int64),
        lse,
        torch.full_like(lse, -9.0),
        masses,
        LogitGradient(c, -c),
        0.07,
        torch.ones(blocks, device=device),
        torch.ones(tokens, device=device),
    )
    found = check(x, flips=1)
    kept = len(found.rows) / (tokens * blocks)
    assert abs(kept - math.exp(-4.0) / 0.07) < 0.01


def test_the_hash_is_uniform_and_independent():
    """Chi-square of single draws and of pairs of neighbours, and each bit of the number, over 4 million draws."""
    for lse in (torch.linspace(3.0, 3.5, 4096), torch.full((4096,), 12.5), torch.linspace(1, 40, 4096).double()):
        u = routing._draws(lse, slice(0, 1187)).double()  # [1187, 4096]
        for pairs in (
            u[:, 1:] * 32 // 1 * 32 + u[:, :-1] * 32 // 1,
            u[1:] * 32 // 1 * 32 + u[:-1] * 32 // 1,
            u[1:, 1:] * 32 // 1 * 32 + u[:-1, :-1] * 32 // 1,
            u * 1024 // 1,
        ):
            seen = torch.bincount(pairs.long().flatten(), minlength=1024).double()  # [1024]
            mean = seen.sum() / 1024
            chi = ((seen - mean) ** 2 / mean).sum()
            assert abs(chi - 1023) < 5 * (2 * 1023) ** 0.5
        word = (u * 2**24).long()  # [1187, 4096]
        for bit in range(24):
            share = ((word >> bit) & 1).double().mean()
            assert abs(share - 0.5) < 5 * 0.5 / u.numel() ** 0.5
        for deep in (1e-2, 1e-4):  # small probabilities decide most pairs
            rows, columns = (u < deep).double().sum(0), (u < deep).double().sum(1)  # [4096], [1187]
            assert abs((u < deep).double().mean() / deep - 1) < 5 / (deep * u.numel()) ** 0.5
            assert abs(rows.var() / rows.mean() - 1) < 0.2
            assert abs(columns.var() / columns.mean() - 1) < 0.3


def test_the_next_step_draws_anew():
    """An lse that moves by its last bit, in both widths."""
    for kind in (torch.float32, torch.float64):
        lse = torch.linspace(3.0, 4.0, 2048, dtype=kind)
        a, b = (routing._draws(x, slice(0, 64)).double().flatten() for x in (lse, lse.nextafter(lse + 1)))
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / len(a) ** 0.5
