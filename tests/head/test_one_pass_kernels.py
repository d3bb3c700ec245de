"""The head in one pass against `reference` in float64.

Coefficients are an advantage times the ratio to an old policy, so they depend on the log-probabilities that the pass
itself finds; the truth takes them from the float64 log-probabilities.

Rule, per region of lad_kernels/testing.py: float32 as there, log-probs included (peaked policy, PTX for sm_90: 2.1e-6
of 3.9e-6); 16-bit gradients at most PROMISE_MARGIN times the error of `rounded`, the formula in float64 with the
roundings that the pass promises. That is 1.75 times the contract's error on most data, and up to 2.4 (5.5 for the bias)
where coefficients of both signs cancel in a sum over tokens whose probabilities are alike, as in a flat policy.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from lad_kernels import reference, testing
from lad_kernels.head import flops
from lad_kernels.head.kernels import one_pass
from lad_kernels.head.kernels.tile_table import Tiles
from lad_kernels.head.records import LogitGradient, LogitTransform, Needs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMISE_MARGIN = 1.05
N, D, V = 150, 48, 521
CHUNKS = (slice(0, 133), slice(133, 150))
SMALL_CHUNKS = (slice(0, 6), slice(6, 11), slice(11, 17))
# Full default tiles in front of a remainder, at least; N in the longest chunk. See test_tile_edges.py.
CROSSES = dict(N=1, V=2)
FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "logit_scale": 0.7, "softcap": 9.0, "temperature": torch.linspace(0.5, 1.5, N)},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    inputs: testing.HeadInputs  # whose upstream holds the true coefficients
    old: Tensor  # [N] the true log-probabilities and a drift of 0.1
    advantages: Tensor  # [N]
    lse: Tensor  # [N] float64

    def coefficients(self, rows: slice, logprobs: Tensor) -> Tensor:  # [M] -> [C]
        return self.advantages[rows] * torch.exp(logprobs[rows] - self.old[rows])


@functools.cache
def make(device, dtype="bfloat16", features="plain", *, n=N, d=D, v=V, entropy=None, seed=0) -> Case:
    options = {k: x[:n].to(device) if isinstance(x, Tensor) else x for k, x in FEATURES[features].items()}
    inputs = testing.make_inputs(
        n, d, v, dtype=DTYPES[dtype], device=device, entropy=entropy, masked=0.0, seed=seed, **options
    )
    exact = inputs.cast(torch.float64)
    out = reference.linear_logprobs(exact.hidden, exact.weight, exact.targets, bias=exact.bias, **exact.options)
    generator = torch.Generator().manual_seed(seed)
    drift, advantages = torch.randn(2, n, generator=generator).to(device)  # [N], [N]
    old = (out.logprobs + 0.1 * drift).float()  # [N]
    upstream = advantages.double() * torch.exp(out.logprobs - old)  # [N]
    return Case(dataclasses.replace(inputs, upstream=upstream), old, advantages, out.lse)


def run(case: Case, *, prior=True, chunks=CHUNKS, needs=(True, True, True), coefficients=None, **options):
    """`one_pass` on the case; `prior` True stands for the old log-probabilities, None for none."""
    x = case.inputs
    transform = LogitTransform(
        x.options.get("logit_scale", 1.0), x.options.get("softcap"), x.options.get("temperature", 1.0)
    )
    coefficients = coefficients or case.coefficients
    return one_pass.one_pass(
        x.hidden,
        x.weight,
        x.targets,
        x.bias,
        transform,
        case.old if prior is True else prior,
        lambda rows, out: LogitGradient.of_logprobs(coefficients(rows, out.logprobs)),
        chunks=chunks,
        want_entropy=options.pop("want_entropy", True),
        needs=Needs(*needs),
        **options,
    )


def replaced(case: Case, **changes) -> Case:
    return dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, **changes))


def flat(result) -> dict[str, Tensor | None]:
    outputs, gradients = result
    return {**outputs._asdict(), **{f"d{name}": x for name, x in gradients._asdict().items()}}


def same(a, b) -> None:
    for (name, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x, y), name


def rounded(case: Case, prior: Tensor | None):
    """HeadOutputs in float64, except that F, r H and the results are rounded to the dtype of the inputs."""
    dtype, x, options = case.inputs.weight.dtype, case.inputs.cast(torch.float64), case.inputs.options
    cast = lambda y: y.to(dtype).double()  # noqa: E731
    raw = (x.hidden @ x.weight.T + (0 if x.bias is None else x.bias)).requires_grad_()  # [N, V]
    z, cap, temperature = raw * options.get("logit_scale", 1.0), options.get("softcap"), options.get("temperature", 1.0)
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z / (temperature[:, None].double() if isinstance(temperature, Tensor) else temperature)
    (slope,) = torch.autograd.grad(z.sum(), raw)  # [N, V]
    target = x.targets[:, None]  # [N, 1]
    s = z.detach().gather(1, target) - (0 if prior is None else prior.double()[:, None])  # [N, 1]
    f = torch.exp(z.detach() - s)  # [N, V]
    total = f.sum(1, keepdim=True)  # [N, 1]
    in_f, by_row = (1.0, slope[:, :1]) if cap is None else (slope, 1.0)
    f = cast(f.scatter_add(1, target, -total) * in_f)  # [N, V]
    r = -x.upstream[:, None] / total * by_row  # [N, 1]
    dbias = None if x.bias is None else cast((f.T @ r)[:, 0])  # [V]
    return testing.HeadOutputs(None, None, cast(r * (f @ x.weight)), cast(f.T @ cast(r * x.hidden)), dbias)


def check(case: Case, *, prior=True, **options) -> None:
    def formula(dtype) -> dict[str, Tensor]:
        inputs = case.inputs.cast(dtype)
        zeros = torch.zeros_like(inputs.upstream)
        return testing.regions(testing.run_head(reference.linear_logprobs, inputs, entropy_upstream=zeros), inputs)

    prior = case.old if prior is True else prior
    outputs, gradients = run(case, prior=prior, **options)
    assert outputs.block_lse is None and outputs.logprobs.max() <= 0 and outputs.entropy.min() >= 0
    assert testing.relative_error(outputs.lse, case.lse) <= testing.FP32_TOLERANCE
    actual = testing.HeadOutputs(outputs.logprobs, outputs.entropy, *gradients)
    truth, contract = formula(torch.float64), formula(torch.float32)
    promised = rounded(case, prior)
    promised = testing.regions(dataclasses.replace(promised, logprobs=outputs.logprobs), case.inputs)
    report = {}
    for name, x in testing.regions(actual, case.inputs).items():
        assert x.dtype == (case.inputs.weight.dtype if name[0] == "d" else torch.float32)
        if x.dtype == torch.float32:
            contract_error = testing.relative_error(contract[name], truth[name])
            allowed = max(testing.CONTRACT_MARGIN * contract_error, testing.FP32_TOLERANCE)
            if name == "logprobs":  # all tokens: none is masked
                allowed = max(allowed, testing.cancellation(case.lse, truth[name]))
            elif name[0] == "d":
                allowed = max(allowed, testing.of_probabilities(case.lse))
        else:
            allowed = PROMISE_MARGIN * testing.relative_error(promised[name], truth[name])
        report[name] = (testing.relative_error(x, truth[name]), allowed)
    print("\n" + testing.format_report(report))
    assert all(error <= allowed for error, allowed in report.values()), "\n" + testing.format_report(report)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [True, None], ids=["prior", "no prior"])
def test_flat_policy(device, dtype, features, prior):
    check(make(device, dtype, features), prior=prior)


@pytest.mark.parametrize("features", ["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [True, None], ids=["prior", "no prior"])
def test_peaked_policy(device, dtype, features, prior):
    check(make(device, dtype, features, d=80, v=600, entropy=0.4), prior=prior)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles(device, dtype):
    """Descriptors; tiles wider than the vocabulary; rows at odd addresses."""
    for stores in (False, True):
        check(make(device, dtype, "all"), tiles=Tiles(64, 128, 32, 8, 8, 2, tma=True, stores=stores))
    one = [slice(0, 17)]
    for v in (2, 128, 129):
        check(make(device, dtype, "bias", n=17, d=33, v=v), tiles=Tiles(16, 256, 32, 2, 4, 2), chunks=one)
    check(make(device, dtype, "bias", n=17, d=45), chunks=one)


def test_more_tiles_than_are_added_at_once(device, monkeypatch):
    """521 words are five tiles of 128, whose sums are added up two at a time; the tokens are three chunks."""
    monkeypatch.setattr(one_pass, "_FINAL_TILES", 2)
    check(make(device, "float32", n=17), tiles=Tiles(16, 128, 32, 2, 4, 2), chunks=SMALL_CHUNKS)


def test_some_tokens_of_the_hidden_states(device):
    """As a head on these tokens alone, bit for bit; the others get a gradient of zero."""
    case, tokens = make(device, "bfloat16", "all", n=17), torch.arange(17, device=device).flip(0) * 2  # [M]
    hidden = torch.full((40, D), float("nan"), dtype=torch.bfloat16, device=device)  # [N, D]
    hidden[tokens] = case.inputs.hidden
    chunks = [slice(0, 9), slice(9, 17)]
    outputs, gradients = run(case, chunks=chunks)
    everywhere = torch.zeros_like(hidden)
    everywhere[tokens] = gradients.hidden
    found = run(replaced(case, hidden=hidden), chunks=chunks, tokens=tokens)
    same(found, (outputs, gradients._replace(hidden=everywhere)))


@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_softcap_far_from_and_in_saturation(device, size):
    case, ones = make(device, "float32", "softcap", n=70), torch.ones(70, device=device)
    case = replaced(case, weight=case.inputs.weight * size, upstream=ones)
    case = dataclasses.replace(case, lse=truth_lse(case))
    check(case, chunks=[slice(0, 70)], prior=None, coefficients=lambda rows, logprobs: ones[rows])


def test_a_common_part_of_all_logits_cancels(device):
    """Logits about 3,000 that float32 holds exactly: results as about 0, since only differences are rounded."""
    case = make(device, "float32", "bias", n=17)
    grid = {name: (16 * getattr(case.inputs, name)).round() / 16 for name in ("hidden", "weight", "bias")}
    options = dict(prior=None, chunks=[slice(0, 17)], coefficients=lambda rows, logprobs: case.advantages[rows])
    near = run(replaced(case, **grid), **options)
    far = run(replaced(case, **grid | {"bias": grid["bias"] + 3000}), **options)
    for name in ("logprobs", "entropy", "dhidden", "dweight", "dbias"):
        assert testing.relative_error(flat(far)[name], flat(near)[name]) <= testing.FP32_TOLERANCE, name


def truth_lse(case: Case) -> Tensor:
    x = case.inputs.cast(torch.float64)
    return reference.linear_logprobs(x.hidden, x.weight, x.targets, bias=x.bias, **x.options).lse  # [N]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_chunk(device, dtype):
    """Log-probability, lse and entropy bit for bit; coefficients see the chunks in order, filled up to their end."""
    case, seen = make(device, dtype, "all"), []

    def coefficients(rows, logprobs):
        seen.append(rows)
        assert logprobs.shape == (N,) and logprobs[: rows.stop].isfinite().all()
        return case.coefficients(rows, logprobs)

    several, whole = run(case, coefficients=coefficients), run(case, chunks=[slice(0, N)])
    assert seen == list(CHUNKS)
    nothing = whole[1]._make([None] * 3)
    same((several[0], nothing), (whole[0], nothing))


def test_twice_bitwise_and_inputs_untouched(device):
    case = make(device, "bfloat16", "all")
    saved = [x for x in (*vars(case).values(), *vars(case.inputs).values()) if isinstance(x, Tensor)]
    saved = [(x, x.clone()) for x in saved]
    same(run(case), run(case))
    assert all(torch.equal(x, copy) for x, copy in saved)


def test_zero_coefficients_give_exactly_zero(device):
    case = make(device, "bfloat16", "bias")
    keep = (torch.arange(N, device=device) % 3 > 0).float()
    _, gradients = run(case, coefficients=lambda rows, logprobs: keep[rows])
    assert torch.equal(gradients.hidden.any(dim=1), keep.bool())
    _, gradients = run(case, coefficients=lambda rows, logprobs: 0 * keep[rows])
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("needs", [(i > 3, i // 2 % 2 == 1, i % 2 == 1) for i in range(7)])
def test_only_what_is_needed(device, needs):
    case = make(device, "bfloat16", "all")
    outputs, full = run(case)
    expected = [x if need else None for x, need in zip(full, needs)]
    same(run(case, needs=needs, want_entropy=False), (outputs._replace(entropy=None), full._make(expected)))


def test_products_are_counted(device):
    """6 N D V, less what is not needed; the sum over rows for the bias is 2 N V."""
    for needs, expected in (((True, True, False), 6), ((True, False, False), 4), ((False, True, False), 4)):
        with flops.counting() as tally:
            run(make(device), needs=needs)
        assert tally == [expected * N * D * V]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy sees the overflow
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_range(device, dtype):
    """A target 200 nats below the maximum, or a prior 200 nats off either way, is refused; a fair prior is not."""
    case = make(device, dtype)
    hidden, weight, targets = (getattr(case.inputs, name).clone() for name in ("hidden", "weight", "targets"))
    hidden[:, 1], weight[:, 1] = 0.0, 0.0
    hidden[140, 1], weight[7, 1], targets[140] = 200.0, 1.0, 3
    case = replaced(case, hidden=hidden, weight=weight, targets=targets)
    ones = torch.ones(N, device=device)
    options = {"coefficients": lambda rows, logprobs: ones[rows]}
    assert run(case, prior=None, **options) is None
    fair = torch.zeros(N, device=device)
    fair[140] = -200.0
    case = dataclasses.replace(replaced(case, upstream=ones), lse=truth_lse(case))
    check(case, prior=fair, **options)
    for wrong in (-400.0, 0.0):
        fair[140] = wrong
        assert run(case, prior=fair, **options) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy sees the overflow
@pytest.mark.parametrize("features", ["plain", "softcap"])
def test_absent_target(device, features):
    case = make(device, "bfloat16", features)
    for absent in (-100, V):
        targets = case.inputs.targets.clone()
        targets[140] = absent
        assert run(replaced(case, targets=targets)) is None


def test_a_nan_is_left_to_two_passes(device):
    """Here it would reach dW even with the coefficient 0."""
    case = make(device)
    hidden = case.inputs.hidden.clone()
    hidden[40, 0] = float("nan")
    assert run(replaced(case, hidden=hidden)) is None


def test_layouts(device):
    """Strided hidden states, a transposed weight, strided vectors."""
    case, x = make(device, "bfloat16", "all"), make(device, "bfloat16", "all").inputs
    wide = torch.full((N, 2 * D), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, :D] = x.hidden
    spread = {name: getattr(x, name).repeat_interleave(2)[::2] for name in ("bias", "targets")}
    other = replaced(case, hidden=wide[:, :D], weight=x.weight.T.contiguous().T, **spread)
    same(run(other, prior=case.old.repeat_interleave(2)[::2]), run(case))


def test_no_tokens(device):
    outputs, gradients = run(make(device, n=0), chunks=[])
    assert [tuple(x.shape) for x in outputs[:3]] == [(0,)] * 3
    assert gradients.hidden.shape == (0, D) and not gradients.weight.any() and gradients.weight.shape == (V, D)


def test_float16_is_refused(device):
    case = make(device)
    with pytest.raises(ValueError, match="float16"):
        run(replaced(case, hidden=case.inputs.hidden.half(), weight=case.inputs.weight.half()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_whose_part_of_p_is_its_own(device, dtype):
    """Smoothed labels, a z-loss, no part of p at all, none of either: dZ = onehot 1[y] + prob p."""
    x = make(device, dtype, n=17, d=40, v=300).inputs
    onehot = torch.linspace(-1, 1, 17, device=device)  # [17], 0 in the middle
    prob = torch.where(torch.arange(17, device=device) % 5 == 3, 0.0, 0.3 - 0.9 * onehot)  # [17]
    gradient = LogitGradient(onehot, prob)
    _, found = one_pass.one_pass(
        x.hidden,
        x.weight,
        x.targets,
        None,
        LogitTransform(),
        None,
        lambda rows, out: gradient.select(rows),
        chunks=[slice(0, 9), slice(9, 17)],
        want_entropy=False,
        needs=Needs(True, True, False),
    )
    h, w = x.hidden.double(), x.weight.double()
    dz = prob[:, None] * (h @ w.T).softmax(-1)  # [17, 300]
    dz[torch.arange(17), x.targets] += onehot
    least = testing.FP32_TOLERANCE if dtype == "float32" else 4e-3  # 2.9e-3 was measured: F and r H in bfloat16
    for mine, truth in ((found.hidden, dz @ w), (found.weight, dz.T @ h)):
        assert testing.relative_error(mine, truth) < least


@pytest.mark.parametrize("v", [521, 384, 65 * 128 + 9])
def test_the_likeliest_word(device, v):
    """In the first and in the last tile, missed by a thousandth; columns beyond V, with logits 0, do not count.

    The second V is whole blocks, the last tile half beyond them; the third has more tiles than are added at once.
    """
    hidden, weight = torch.eye(4, 16, device=device), torch.full((v, 16), -3.0, device=device)
    weight[5, 0], weight[v - 1, 1], weight[[0, 300], 3] = -1.0, -1.0, -2.0
    weight[3, 2], weight[v - 2, 2] = -0.999, -1.0  # the target is the second, in the last tile
    targets = torch.tensor([5, v - 1, v - 2, 0], device=device)
    out, _ = one_pass.one_pass(
        hidden,
        weight,
        targets,
        None,
        LogitTransform(),
        None,
        lambda rows, out: LogitGradient.of_logprobs(out.logprobs[rows]),
        chunks=[slice(0, 3), slice(3, 4)],
        want_entropy=False,
        want_correct=True,
        needs=Needs(True, True, False),
        tiles=Tiles(16, 256 if v == 384 else 128, 16, 2, 4, 2),
    )
    assert out.correct.tolist() == [True, True, False, True]
