"""Planted bugs of the objective's Triton kernels: each edits one line of real source and must be caught."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from test_mutants import mutate
from torch import Tensor

from lad_kernels import GRPOConfig, LADConfig, reference
from lad_kernels.objective import policy
from lad_kernels.objective.config import ADVANTAGE_SCALES
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels import advantages as group_kernel
from lad_kernels.objective.kernels import policy as kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: NaN of a bug
LENGTHS = (256 + 4, 0, 3)  # a block and a remainder, empty, short
CONFIGS = {
    "sequence": LADConfig(
        eta=1.0,
        importance_sampling_level="sequence",
        loss_agg_mode="seq-mean-token-mean",
        log_ratio_clamp=0.2,
        kl_coef=0.2,
        kl_clamp=0.05,
        entropy_coef=0.1,
    ),
    "sum": LADConfig("hd", eta=1.0, importance_sampling_level="sequence_sum"),
    "token": GRPOConfig(log_ratio_clamp=0.4, kl_coef=0.2, kl_clamp=0.1),
    "many": LADConfig(eta=1.0),
    "chunks": LADConfig(eta=1.0, target_norm="group", loss_agg_mode="seq-mean-token-mean"),
}


def inputs(case: str, device: str) -> tuple[Tensor, Tensor, PackedInputs]:
    """Log-probs and entropies [M], and the rest, float32; the last sequence is beyond the clamp, a token is dropped."""
    gen = torch.Generator().manual_seed(0)
    many = case == "many"
    lengths = (2,) * 70 if many else LENGTHS  # a tile of the partials and a remainder
    n, weights = sum(lengths), torch.tensor([0.5, 1.0, 2.0])
    noise = lambda scale=0.3: scale * torch.randn(n, generator=gen)  # noqa: E731
    logp = -3 * torch.rand(n, generator=gen) - 0.5
    place = torch.arange(n)
    given = dict(
        normalizer=torch.tensor(5.0),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        usable=place != 7,
        old_logprobs=logp - noise(0.001 if case == "sum" else 0.3) - 0.5 * (place < 2 if many else place >= n - 3),
        ref_logprobs=logp + noise(),
        rollout_is_weights=noise().abs() if case == "token" else weights.repeat(24)[: len(lengths)],
        advantages=torch.tensor([0.8, 0.3, -1.1]).repeat(24)[: len(lengths)],
        group_ids=torch.tensor([4, 4, 4]),
    )
    given = {k: v.to(device) for k, v in given.items()}
    return logp.to(device), noise().abs().to(device), PackedInputs(weights_by_token=case == "token", **given)


@functools.cache
def launched_for_many(device: str):
    """What the first kernel finds of many sequences, each a program: most of the time that their mutants would take."""
    return kernel._launch(*inputs("many", device), CONFIGS["many"])


def compare(module, case: str, device: str) -> None:
    """Gradient, loss and metrics against PyTorch in float64; in chunks the gradient alone."""
    config, (logp, entropy, given) = CONFIGS[case], inputs(case, device)
    floats = {k: v.double() for k, v in vars(given).items() if torch.is_tensor(v) and v.is_floating_point()}
    truth = policy.policy_terms(logp.double(), entropy.double(), replace(given, **floats), config)
    if case == "chunks":
        prepared, rows = module.prepare(given, config), (slice(0, 100), slice(100, len(logp)))
        parts = torch.cat([module.coefficients(logp[r], prepared.chunk(r), config) for r in rows])
        torch.testing.assert_close(parts.double(), truth.dlogprobs, rtol=1e-5, atol=1e-9)
        return
    found = module.policy_terms(logp, entropy, given, config)
    torch.testing.assert_close(found.dlogprobs.double(), truth.dlogprobs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    if config.entropy_coef != 0:
        torch.testing.assert_close(found.dentropy.double(), truth.dentropy, rtol=1e-6, atol=0)
    for name, want in truth.metrics.items():
        torch.testing.assert_close(found.metrics[name].double(), want.double(), rtol=1e-5, atol=1e-6, msg=name)


BUGS = {
    "last block's log ratio alone": ("sequence", "level_d += d\n", "level_d = d\n"),
    "sum instead of mean": ("sequence", 'share = 1.0 / length if LEVEL == "sequence" else 1.0', "share = 1.0"),
    "mean instead of sum": ("sum", 'share = 1.0 / length if LEVEL == "sequence" else 1.0', "share = 1.0 / length"),
    "level not transposed": (
        "sequence",
        "level_c = tl.sum(level_c) * share + zero",
        "level_c = tl.sum(level_c) + zero",
    ),
    "length forgotten": ("sequence", '(length if DIVISOR == "length" else 1.0)', "1.0"),
    "clamp of a level passes the gradient": ("sequence", "tl.where(mask & ~stopped, weight", "tl.where(mask, weight"),
    "clamp passes the gradient": ("token", "tl.where(stopped, 0.0, weight * rollout * c)", "(weight * rollout * c)"),
    "rollout weights on the loss alone": ("token", "0.0, weight * rollout * c) if", "0.0, weight * c) if"),
    "kl sign": ("token", "gradient -= kl_coef * weight * slope", "gradient += kl_coef * weight * slope"),
    "kl clamp passes the gradient": ("token", "tl.where(kl > kl_clamp, 0.0, slope)", "slope"),
    "kl not weighed in the loss": ("token", "total += kl_coef * weight * kl\n", "total += weight * kl\n"),
    "entropy sign": ("sequence", "zero - entropy_coef * weight", "zero + entropy_coef * weight"),
    "a dropped token counts": ("token", "mask=mask, other=0) != 0)", "mask=mask, other=0) >= 0)"),
    "ratios not relative to the largest": ("token", "_exp(d - base), 0.0)", "_exp(d), 0.0)"),
    "signs of the advantage swapped": ("token", "up, down = mask & (a > 0.0)", "down, up = mask & (a > 0.0)"),
    "a row in another's place": ("token", "tl.store(row + B * K1, tl.sum(k1))", "tl.store(row + B * K1, tl.sum(k3))"),
    "shift and advantage swapped": ("chunks", "adv, shift = tl.load(source + s)", "shift, adv = tl.load(source + s)"),
    "sums of the last tile alone": ("many", "sums += tile", "sums = tile"),
    "largest of the last tile alone": ("many", "maxima = tl.maximum(maxima, tile)", "maxima = tile"),
    "largest ratio of the last tile alone": ("many", "tops = tl.maximum(tops, tl.where(", "tops = (tl.where("),
    "ratios of the last tile alone": ("many", "ratios += e", "ratios = e"),
    "squares of ratios scaled once": ("many", "* (scale * scale)", "* scale"),
    "a mean of the loss": ("many", "kept = (rows == LOSS)", "kept = (rows == ENTROPY)"),
    "a mean over all coefficients": ("many", "tl.maximum(_pick(total, rows, NEGATIVE), 1.0)", "tokens"),
    "means over sequences": ("many", "tl.maximum(_pick(total, rows, TOKENS), 1.0)", "B * 1.0"),
    "divisor of the first sequence": ("chunks", '(s if DIVISOR == "sequence" else 0)', "0"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_in_the_objective_kernel_is_caught(bug, tmp_path, device):
    case, old, new = BUGS[bug]
    mutant = mutate("objective/kernels/policy.py", old, new, tmp_path)
    if case == "many":  # their bugs are in the second kernel
        mutant._launch = lambda *_: launched_for_many(device)
    with pytest.raises(AssertionError):
        compare(mutant, case, device)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_objective_kernel_without_a_bug_passes(case, device):
    compare(kernel, case, device)


REWARDS = torch.tensor([1.0, 0.0, 0.25, torch.nan, 2.0, 0.5, -torch.inf, 0.75])
IDS = torch.tensor([4, 9, 4, 4, 9, 4, 9, 9])
ADVANTAGE_BUGS = {  # by the scale of rewards in which it shows
    "biased standard deviation": ("group", "squares / tl.maximum(n - 1.0, 1.0)", "squares / tl.maximum(n, 1.0)"),
    "nothing added to the deviation": ("group", "+ STD_EPS)", ")"),
    "leave one out divides by all": ("loo", "factor = n / tl.maximum(n - 1.0, 1.0)", "factor = n / tl.maximum(n, 1.0)"),
    "batch deviation around the group's mean": ("batch", "centre = total / tl.maximum(n, 1.0)", "centre = mean"),
    "every group is the batch": ("none", "if not WHOLE:", "if WHOLE:"),
    "unscorable rewards are counted": (
        "none",
        'chosen = member & (tl.abs(x) < float("inf"))',
        "chosen = member & (x == x)",
    ),
    "unscorable completions get an advantage": ("none", "tl.where(scorable, -mean * factor, 0.0)", "-mean * factor"),
    "target norm forgets the unscorable": ("none", "/ members)", "/ n)"),
    "unscorable targets at the largest": ("none", "(members - n) * _exp(-highest)", "(members - n)"),
    "eta forgotten": ("none", "top, 1.0, factor / eta, B, False)", "top, 1.0, factor, B, False)"),
    "shift in the advantages' row": ("none", "tl.store(statistics + B + s, shift)", "tl.store(statistics + s, shift)"),
}


def compare_advantages(module, scale: str, device: str) -> None:
    """Advantages and log mean e^u against the specification in float64."""
    found = module.group_statistics(
        REWARDS.to(device), None, IDS.to(device), scale=scale, eta=0.5, target_norm=True
    ).cpu()
    want = reference.group_advantages(REWARDS.double(), group_ids=IDS, scale=scale)
    shift = torch.stack([(want[group == IDS] / 0.5).exp().mean().log() for group in IDS])
    torch.testing.assert_close(found.double(), torch.stack([want, shift]), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("bug", ADVANTAGE_BUGS)
def test_bug_in_the_advantages_kernel_is_caught(bug, tmp_path, device):
    scale, old, new = ADVANTAGE_BUGS[bug]
    mutant = mutate("objective/kernels/advantages.py", old, new, tmp_path)
    with pytest.raises(AssertionError):
        compare_advantages(mutant, scale, device)


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_the_advantages_kernel_without_a_bug_passes(scale, device):
    compare_advantages(group_kernel, scale, device)
