"""The objective's Triton kernel against the float64 specification; its metrics against policy.py in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from divergence_facts import summands_above_start
from test_divergences import grid, specification

from lad_kernels import GRPOConfig, LADConfig, reference
from lad_kernels.objective import policy
from lad_kernels.objective.config import ADVANTAGE_SCALES, AGGREGATIONS, DIVERGENCES, LEVELS
from lad_kernels.objective.divergences import lad_terms
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels import advantages as group_kernel
from lad_kernels.objective.kernels import divergences as term_kernels
from lad_kernels.objective.kernels import policy as kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: overflow, inf - inf
ULP = 2.0**-24
LENGTHS = (0, 2 * 256 + 37, 1, 30, 0, 256)  # two blocks and a remainder, one token, empty, exactly one block
SHORT, GROUPS = (0, 70, 1, 30, 0, 5), (4, 9, 4, 4, 9, 1)  # one block each; ragged, interleaved, a group of one


def inputs(device, lengths=LENGTHS, seed=0, spread=0.5):
    """Packed float32 log-probs with everything a configuration can ask for."""
    gen = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=gen) - 0.1
    noise = lambda scale: scale * torch.randn(n, generator=gen)  # noqa: E731
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    given = dict(
        logprobs=logp,
        old_logprobs=logp - noise(spread),
        ref_logprobs=logp + noise(spread),
        entropy=noise(1.0).abs(),
        cu_seqlens=cu_seqlens,
    )
    return {k: v.to(device) for k, v in given.items()}


def ours(given, config, implementation=kernel.policy_terms, **more):
    """policy_terms with the fields of PackedInputs named; [M] is told from [B] by `by_token`."""
    packed = {**given, **more}
    logprobs, entropy = packed.pop("logprobs"), packed.pop("entropy")
    return implementation(logprobs, entropy, PackedInputs(normalizer=logprobs.new_tensor(7.0), **packed), config)


def double(arguments):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}


def spec(given, config, *, rewards=None, advantages=None, rollout_is_weights=None, group_ids=None, **_):
    """(loss, d loss / d logp, d loss / d entropy, advantages) of the reference in float64."""
    given = double(given)
    if advantages is None:
        advantages = reference.group_advantages(rewards.double(), group_ids=group_ids, scale=config.advantage_scale)
    logp, entropy = (given.pop(k).requires_grad_() for k in ("logprobs", "entropy"))
    loss = reference.lad_loss if isinstance(config, LADConfig) else reference.grpo_loss
    weights = None if rollout_is_weights is None else rollout_is_weights.double()
    out = loss(logp, given.pop("old_logprobs"), advantages.double(), config=config, normalizer=7.0, entropy=entropy,
               rollout_is_weights=weights, group_ids=group_ids, **given)  # fmt: skip
    grads = torch.autograd.grad(out.loss, (logp, entropy), allow_unused=True)
    return out.loss.detach(), *grads, advantages


def compare(given, config, rtol=2e-6, **more):
    """Everything policy_terms returns; the gradient per token, relative to its own size and the batch's mean size."""
    terms = ours(given, config, **more)
    loss, dlogprobs, dentropy, advantages = spec(given, config, **more)
    size = dlogprobs.abs()
    error = (terms.dlogprobs.double() - dlogprobs).abs()
    assert (error <= rtol * (size + size.mean())).all(), (error / (size + size.mean())).max()
    torch.testing.assert_close(terms.advantages.double(), advantages.double(), rtol=2e-6, atol=2e-6)
    torch_terms = ours(double(given), config, policy.policy_terms, **double(more))
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-6 * float(size.sum() + 1))
    assert terms.metrics.keys() == torch_terms.metrics.keys()
    for name, value in torch_terms.metrics.items():
        assert terms.metrics[name].shape == ()
        got, want = terms.metrics[name].double(), value.double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, k=name: f"{k}: {m}")
    if config.entropy_coef:
        torch.testing.assert_close(terms.dentropy.double(), dentropy, rtol=1e-6, atol=0)
    else:
        assert terms.dentropy is None
    return terms


@triton.jit
def _elementary(x_ptr, out, N, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + t, mask=t < N, other=0.0)
    e, em1, k3 = term_kernels._exps(x)
    tl.store(out + t, e, mask=t < N)
    tl.store(out + N + t, em1, mask=t < N)
    tl.store(out + 2 * N + t, k3, mask=t < N)
    tl.store(out + 3 * N + t, term_kernels._log1p(x), mask=t < N)


def test_elementary_functions(device):
    """exp, expm1, e^x - 1 - x and log1p within a few ulp of float64 over the range in which float32 holds them."""
    tiny = torch.logspace(-12, 0, 400)
    x = torch.cat([torch.linspace(-87, 88.7, 4001), torch.linspace(-1.5, 1.5, 4001), tiny, -tiny * 0.999999]).to(device)
    out = torch.empty(4, len(x), device=device)
    _elementary[(triton.cdiv(len(x), 8192),)](x, out, len(x), BLOCK=8192)
    y = x.double()
    k3 = torch.where(y.abs() < 1e-2, y**2 / 2 + y**3 / 6 + y**4 / 24 + y**5 / 120 + y**6 / 720, y.expm1() - y)
    for got, truth, ulps in zip(out, (y.exp(), y.expm1(), k3, y.log1p()), (3, 5, 6, 4)):
        holds = truth.isfinite() & (truth.abs() < 3.4e38) & (truth.abs() > 1e-37)
        error = ((got.double() - truth).abs() / truth.abs() / (2 * ULP))[holds]
        assert error.max() <= ulps, (error.max(), x[holds][error.argmax()])
    edges = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0], device=device)
    out = torch.empty(4, 4, device=device)
    _elementary[(1,)](edges, out, 4, BLOCK=1024)
    torch.testing.assert_close(out[:2], torch.stack([edges.exp(), edges.expm1()]), equal_nan=True)
    assert out[2, :2].isinf().all() and out[2, 2].isnan() and out[2:, 3].eq(0).all()


@triton.jit
def _terms(d_ptr, u_ptr, out, N, OBJECTIVE: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d, u = tl.load(d_ptr + t, mask=t < N, other=0.0), tl.load(u_ptr + t, mask=t < N, other=0.0)
    loss, c, above = term_kernels._lad_term(d, u, OBJECTIVE, CENTERED)
    tl.store(out + t, loss, mask=t < N)
    tl.store(out + N + t, c, mask=t < N)
    tl.store(out + 2 * N + t, above, mask=t < N)


def run_terms(d, u, divergence, centered=False):
    out = torch.empty(3, len(d), device=d.device)
    _terms[(triton.cdiv(len(d), 8192),)](d, u, out, len(d), OBJECTIVE=divergence, CENTERED=centered, BLOCK=8192)
    return out


@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_grid(divergence, centered, device):
    """|log r| <= 20, |u| <= 80, x within 1e-6 of 1: a few ulp, plus what rounding w = d - u and its exponents costs."""
    d, u = (x.float().to(device) for x in grid())
    loss, c, above = run_terms(d, u, divergence, centered).double()
    d, u = d.double(), u.double()
    w = d - u
    _true_loss, true_c, _ = specification(d, u, divergence, centered)
    truth = lad_terms(divergence, d, u, centered=centered)  # float64 closed forms: the specification's values cancel
    assert ((truth.coef - true_c).abs() <= 1e-9 * true_c.abs() + 1e-13 * (d.exp() + u.exp())).all()
    rounding = ULP * (8 + 2 * d.abs() + 4 * u.abs())
    r, eu, gap = d.exp(), u.exp(), (d.exp() - u.exp()).abs()
    cancels = {"kl": r * (1 + w.abs()) + gap, "rkl": eu * d.abs() + gap} if centered else {"kl": r * (1 + w.abs())}
    slack = 2 * ULP * cancels.get(divergence, torch.zeros_like(d)) + 1e-37
    for got, want in ((loss, truth.loss), (c, truth.coef)):
        held = want.abs() < 1e38
        bad = held & ~((got - want).abs() <= rounding * want.abs() + slack)
        assert not bad.any(), (d[bad][:4], u[bad][:4], got[bad][:4], want[bad][:4])
    held = (truth.loss.abs() < 1e37) & (truth.above_start.abs() < 1e37) & ((-2 * u.abs()).exp() > 1e-37)
    allowed = 2 * rounding * (truth.above_start.abs() + summands_above_start(divergence, d, u))
    bad = held & ~((above - truth.above_start).abs() <= allowed + 1e-37)
    assert not bad.any(), (d[bad][:4], u[bad][:4], above[bad][:4], truth.above_start[bad][:4])
    if divergence == "js":
        assert loss.isfinite().all() and c.isfinite().all() and above.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_and_nan(divergence, device):
    """r = 0 gives the limits, never NaN; a NaN log-prob is not swallowed."""
    u = torch.tensor([-1.0, 0.0, 2.0], device=device)
    loss, c, above = run_terms(torch.full_like(u, -torch.inf), u, divergence)
    want = lad_terms(divergence, torch.full_like(u, -torch.inf), u)
    torch.testing.assert_close(torch.stack([loss, c]), torch.stack([want.loss, want.coef]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(above, want.above_start, rtol=1e-5, atol=1e-5)
    loss, c, _ = run_terms(torch.full_like(u, torch.nan), u, divergence)
    assert loss.isnan().all() and (c.isnan().all() or divergence == "rkl")  # rkl's coefficient is -e^u whatever d is


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_aggregations(level, aggregation, device):
    given = inputs(device, spread=0.5 if level == "token" else 0.05)
    advantages = torch.tensor([1.0, -0.5, 0.7, 0.3, 0.0, -1.2], device=device)
    compare(given, LADConfig(importance_sampling_level=level, loss_agg_mode=aggregation), advantages=advantages)
    if aggregation in AGGREGATIONS[:2]:  # the others differ in the normalizer alone
        compare(given, GRPOConfig(importance_sampling_level=level, loss_agg_mode=aggregation), advantages=advantages)


CONFIGS = {
    **{d: LADConfig(divergence=d, eta=1.0) for d in DIVERGENCES[1:]},
    "hd of the mean": LADConfig(divergence="hd", eta=1.0, importance_sampling_level="sequence"),
    "ps of the sum": LADConfig(divergence="ps", eta=1.0, importance_sampling_level="sequence_sum", log_ratio_clamp=2.0),
    "kl centered": LADConfig(divergence="kl", centered=True, eta=1.0),
    "rkl centered": LADConfig(divergence="rkl", centered=True, eta=1.0),
    "target norm": LADConfig(target_norm="group"),
    "target norm, clamps": LADConfig(target_norm="group", target_clamp=1.5, log_ratio_clamp=0.4),
    "clamp of a level": LADConfig(log_ratio_clamp=0.01, importance_sampling_level="sequence_sum"),
    "entropy and kl": LADConfig(entropy_coef=0.2, kl_coef=0.1, loss_agg_mode="seq-mean-token-mean"),
    "dapo, dual clip": GRPOConfig(epsilon_high=0.28, dual_clip=1.5),
    "gspo": GRPOConfig(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
    "cispo": GRPOConfig(policy_loss="cispo", log_ratio_clamp=0.7),
    "rloo": GRPOConfig(policy_loss="reinforce", advantage_scale="loo"),
    "sapo": GRPOConfig(policy_loss="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0),
    "sapo of the mean": GRPOConfig(policy_loss="sapo", importance_sampling_level="sequence", kl_coef=0.1),
    "vespo": GRPOConfig(policy_loss="vespo", importance_sampling_level="sequence_sum", log_ratio_clamp=0.7),
    "luspo": GRPOConfig(
        policy_loss="luspo", importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-sum", epsilon_low=0.02
    ),
    "everything": GRPOConfig(kl_coef=0.1, entropy_coef=0.1, log_ratio_clamp=0.7, advantage_scale="batch"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_on_rewards(name, device):
    rewards = torch.tensor([1.0, 0.0, 0.25, torch.nan, 2.0, 0.5], device=device)
    compare(inputs(device, SHORT), CONFIGS[name], rewards=rewards, group_ids=torch.tensor(GROUPS, device=device))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by_token", (False, True))
def test_rollout_weights_and_token_advantages(level, by_token, device):
    given = inputs(device, spread=0.05)
    gen = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(given["logprobs"]), generator=gen).to(device)
    weights = torch.rand(len(given["logprobs"]) if by_token else len(LENGTHS), generator=gen).to(device)
    more = dict(rollout_is_weights=weights, weights_by_token=by_token)
    config = LADConfig(importance_sampling_level=level, eta=1.0, kl_coef=0.1, entropy_coef=0.1)
    compare(given, config, advantages=advantages, advantages_by_token=True, **more)
    compare(given, GRPOConfig(importance_sampling_level=level), advantages=advantages[:6], **more)


REWARDS = {
    "100 +- 0.01": torch.tensor([100.01, 99.99, 100.0, 100.01, 99.99, 100.0]),
    "equal": torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    "unscorable": torch.tensor([1.0, torch.nan, torch.inf, 0.0, -torch.inf, 1.0]),
    "nothing scorable": torch.full((6,), torch.nan),
    "wide": torch.tensor([1e6, -1e6, 1.0, 1e-3, 0.0, 3.0]),
}


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize("name", REWARDS)
def test_advantages(name, scale, device):
    rewards, ids = REWARDS[name].to(device), torch.tensor(GROUPS, device=device, dtype=torch.int32)
    given = inputs(device, lengths=(0, 2, 0, 1, 0, 0))
    got = ours(given, GRPOConfig(advantage_scale=scale), rewards=rewards, group_ids=ids).advantages
    want = reference.group_advantages(rewards.double(), group_ids=ids, scale=scale)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
    if name in ("equal", "nothing scorable"):
        assert not got.count_nonzero()
    assert not got[~rewards.isfinite()].count_nonzero() and got[5] == 0


@triton.jit
def _advantages(rewards, ids, chosen, out, B, eta, SCALE: tl.constexpr):
    i = tl.program_id(0)
    adv, shift = group_kernel._advantage(rewards, ids, tl.load(chosen + i), eta, B, SCALE, True, True)
    tl.store(out + 2 * i, adv)
    tl.store(out + 2 * i + 1, shift)


@pytest.mark.parametrize("scale", ("group", "batch"))
def test_more_rewards_than_a_block(scale, device):
    """Two blocks of 256 rewards and a remainder; groups reach across blocks. Advantage and log mean e^u of a few."""
    gen = torch.Generator().manual_seed(2)
    b = 2 * 256 + 21
    rewards = torch.rand(b, generator=gen).round(decimals=1)
    rewards[7] = torch.nan
    ids = torch.randint(0, 40, (b,), generator=gen) * 1_000_000_000_003  # int64, equal in no 32 bits
    chosen = torch.tensor([0, 7, 255, 256, 511, b - 1])
    out = torch.empty(len(chosen), 2, device=device)
    arguments = (x.to(device) for x in (rewards, ids, chosen))
    _advantages[(len(chosen),)](*arguments, out, b, 0.25, SCALE=scale)
    want = reference.group_advantages(rewards.double(), group_ids=ids, scale=scale)
    shifts = torch.stack([(want[ids == ids[s]] / 0.25).exp().mean().log() for s in chosen])
    torch.testing.assert_close(out.cpu().double(), torch.stack([want[chosen], shifts], 1), rtol=3e-6, atol=3e-6)


def test_without_sequences(device):
    """cu_seqlens=None: pseudo-sequences of 4,096 tokens; two and a remainder, then fewer than one block."""
    for n in (2 * 4096 + 5, 3):
        given = inputs(device, lengths=(n,)) | {"cu_seqlens": None}
        advantages = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device)
        compare(given, LADConfig(), rtol=4e-6, advantages=advantages, advantages_by_token=True)


@pytest.mark.parametrize("lengths", ((), (0, 0, 0)), ids=("no sequences", "empty sequences"))
def test_no_tokens(lengths, device):
    given = inputs(device, lengths=lengths)
    for config in (LADConfig(kl_coef=0.1, entropy_coef=0.1, importance_sampling_level="sequence"), GRPOConfig()):
        rewards = torch.arange(float(len(lengths)), device=device)
        terms = ours(
            given, config, rewards=rewards, group_ids=torch.zeros(len(lengths), dtype=torch.long, device=device)
        )
        assert terms.loss == 0 and terms.dlogprobs.shape == (0,) and terms.advantages.shape == rewards.shape
        assert all(value == 0 for value in terms.metrics.values()), terms.metrics
    assert (
        ours(given | {"cu_seqlens": None}, GRPOConfig(), advantages=given["logprobs"], advantages_by_token=True).loss
        == 0
    )


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_exactly_one(level, device):
    """No old log-probs, equal ones, and -inf in both: the same bits; equal rewards: no gradient at all."""
    config = LADConfig(importance_sampling_level=level)
    given = inputs(device, SHORT)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0], device=device)
    more = dict(rewards=rewards, group_ids=torch.tensor(GROUPS, device=device))
    implicit = ours(given | {"old_logprobs": None}, config, **more)
    given["logprobs"][5] = -torch.inf
    explicit = ours(given | {"old_logprobs": given["logprobs"].clone()}, config, **more)
    assert torch.equal(implicit.dlogprobs, explicit.dlogprobs) and torch.equal(implicit.loss, explicit.loss)
    assert implicit.metrics["ratio_max"] == 1 and implicit.metrics["loss_above_start"] == 0
    even = ours(given | {"old_logprobs": None}, config, **(more | {"rewards": torch.ones_like(rewards)}))
    assert not even.dlogprobs.count_nonzero() and even.metrics["zero_coef_share"] == 1


@pytest.mark.parametrize("level", LEVELS)
def test_clamp_stops_the_gradient_exactly(level, device):
    given = inputs(device, lengths=(4, 3))
    given["old_logprobs"] = given["logprobs"] - torch.tensor([2.0] * 4 + [0.1] * 3, device=device)
    terms = ours(
        given, LADConfig(log_ratio_clamp=1.0, importance_sampling_level=level), advantages=torch.ones(2, device=device)
    )
    assert not terms.dlogprobs[:4].count_nonzero() and terms.dlogprobs[4:].count_nonzero() == 3
    torch.testing.assert_close(terms.metrics["clamp_share"].item(), 4 / 7)


@pytest.mark.parametrize("empty", (False, True))
def test_more_sequences_than_a_tile_of_the_partials(empty, device):
    """Two tiles of 64 programs and a remainder; or no token in any of more than one."""
    sequences = 67 if empty else 131
    lengths = (0 if empty else 1,) * sequences
    given = inputs(device, lengths)
    advantages = torch.randn(sequences, generator=torch.Generator().manual_seed(3)).to(device)
    given["old_logprobs"][100 % max(len(given["logprobs"]), 1) :] -= 30.0  # the largest ratios are in the last tile
    config = LADConfig(log_ratio_clamp=40.0, entropy_coef=0.1)
    found = ours(given, config, advantages=advantages)
    truth = ours(double(given), config, policy.policy_terms, advantages=advantages.double())
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=1e-5, atol=0)
    for name, want in truth.metrics.items():
        torch.testing.assert_close(found.metrics[name].double(), want.double(), rtol=1e-5, atol=0, msg=name)
    assert empty or truth.metrics["ratio_max"] > 1e10


def test_sequences_do_not_disturb_each_other(device):
    """The gradient of a sequence is the same bits alone and in company, and the same on every run."""
    config = LADConfig(importance_sampling_level="sequence", divergence="hd")
    given = inputs(device)
    advantages = torch.tensor([1.0, -0.5, 0.7, 0.3, 0.0, -1.2], device=device)
    together = ours(given, config, advantages=advantages)
    again = ours(given, config, advantages=advantages)
    assert torch.equal(together.dlogprobs, again.dlogprobs) and torch.equal(together.loss, again.loss)
    end = LENGTHS[1]
    alone = {k: v[:end] for k, v in given.items()} | {"cu_seqlens": given["cu_seqlens"][1:3]}
    assert torch.equal(ours(alone, config, advantages=advantages[1:2]).dlogprobs, together.dlogprobs[:end])


def test_two_launches(device, monkeypatch):
    """Rewards, a sequence level, KL and entropy still take one launch, and what all programs found another."""
    grids = []

    class Counting:
        def __init__(self, launch):
            self.launch = launch

        def __getitem__(self, grid):
            grids.append(grid)
            return self.launch[grid]

    for name in ("_policy_kernel", "_finish_kernel"):
        monkeypatch.setattr(kernel, name, Counting(getattr(kernel, name)))
    config = LADConfig(importance_sampling_level="sequence", target_norm="group", kl_coef=0.1, entropy_coef=0.1)
    ours(inputs(device), config, rewards=torch.ones(6, device=device), group_ids=torch.tensor(GROUPS, device=device))
    assert grids == [(6,), (1,)]
