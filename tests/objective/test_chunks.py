"""The objective in chunks: the same gradient as in one piece, and what does not depend on log-probs computed once."""

from __future__ import annotations

import pytest
import torch

from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss
from lad_kernels.head import dispatch
from lad_kernels.objective import Objective, PolicyInputs, policy
from lad_kernels.objective.config import LEVELS
from lad_kernels.objective.kernels import policy as kernel
from lad_kernels.packing import pack

IMPLS = ("torch", "triton")
CU = torch.tensor(
    [0, 5, 5, 12, 30, 34], dtype=torch.int32
)  # one sequence is empty, one is longer than a chunk of tokens
BY_SEQUENCE = [slice(0, 12), slice(12, 34)]  # chunks of whole sequences
BY_TOKEN = [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 34)]  # sequences are cut
GROUPS = torch.tensor([4, 9, 4, 4, 9])
CONFIGS = {
    "lad": LADConfig(),
    "lad, bounds": LADConfig(epsilon_low=0.3, epsilon_high=0.3),
    "target norm, mean of each sequence": LADConfig(
        target_norm="group", loss_agg_mode="seq-mean-token-mean", advantage_scale="loo"
    ),
    "grpo, kl, clamp, mean of each sequence": GRPOConfig(
        loss_agg_mode="seq-mean-token-mean", kl_coef=0.1, log_ratio_clamp=0.3, advantage_scale="batch"
    ),
    "cispo": GRPOConfig(policy_loss="cispo"),
}


def given(signal: str, device: str) -> tuple[torch.Tensor, PolicyInputs]:
    """Log-probs [34] and everything an objective can ask for; a token and a weight are dropped."""
    gen = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(34, generator=gen) - 0.1
    noise = lambda: 0.3 * torch.randn(34, generator=gen)  # noqa: E731
    old, ref, weights = (logp - noise()).clamp(max=0), (logp + noise()).clamp(max=0), noise().abs()
    old[9], weights[20] = torch.nan, torch.inf
    signals = {
        "rewards": {"rewards": torch.tensor([1.0, 0.0, torch.nan, 0.25, 2.0])},
        "advantages": {"advantages": torch.tensor([1.0, -0.5, 0.7, 0.3, -1.2])},
        "token advantages": {"advantages": noise()},
    }
    inputs = dict(old_logprobs=old, ref_logprobs=ref, rollout_is_weights=weights, cu_seqlens=CU, group_ids=GROUPS)
    return logp.to(device), PolicyInputs(**{k: v.to(device) for k, v in (inputs | signals[signal]).items()})


def both(config, signal: str, impl: str, device: str, chunks: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d logprob of the whole and of the chunks [34]; a chunk sees no log-prob but its own."""
    logp, inputs = given(signal, device)
    packing = pack(logp, None, inputs.cu_seqlens)
    whole = Objective(inputs, packing, config, impl, logp).terms(logp).dlogprobs
    objective = Objective(inputs, packing, config, impl, logp)
    parts = torch.cat([objective.coefficients(rows, logp[rows].clone()) for rows in chunks])
    assert torch.equal(objective.terms(logp).dlogprobs, whole)
    assert whole.count_nonzero() > 20
    return whole, parts


def same(impl: str, whole: torch.Tensor, parts: torch.Tensor) -> bool:
    """The same bits in Triton. PyTorch's vectors round a tail differently: 1.3e-7 was measured on a CPU."""
    if impl == "triton":
        return torch.equal(whole, parts)
    return bool(((whole - parts).abs() <= 5e-7 * (whole.abs() + whole.abs().mean())).all())


@pytest.mark.parametrize("signal", ("rewards", "advantages", "token advantages"))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_of_tokens(impl, name, signal, device):
    if signal == "token advantages" and CONFIGS[name].norms_target:
        pytest.skip("refused: target_norm needs one advantage per sequence; nothing is lost")
    assert same(impl, *both(CONFIGS[name], signal, impl, device, BY_TOKEN))


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_of_sequences(impl, level, device):
    config = LADConfig(importance_sampling_level=level, loss_agg_mode="seq-mean-token-mean", target_norm="group")
    assert same(impl, *both(config, "rewards", impl, device, BY_SEQUENCE))


def test_cut_sequences_at_a_sequence_level_are_another_gradient(device):
    """Why chunks are of whole sequences there; and that the comparison above can fail."""
    config = LADConfig(importance_sampling_level="sequence")
    assert not same("torch", *both(config, "rewards", "torch", device, BY_TOKEN))


def count(monkeypatch, calls: list, module, name: str) -> None:
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), function(*a, **k))[1])


class Launches:
    """Keyword arguments of every launch of a kernel."""

    def __init__(self, kernel):
        self.kernel, self.options = kernel, []

    def __getitem__(self, grid):
        return lambda *a, **k: (self.options.append(k), self.kernel[grid](*a, **k))[1]


def one_pass_in_8_chunks(monkeypatch, config, impl: str, device: str, **kw) -> None:
    gen = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 4, 16, generator=gen).to(device).requires_grad_()
    weight, ids = torch.randn(40, 16, generator=gen).to(device), torch.randint(0, 40, (8, 4), generator=gen).to(device)
    rewards = torch.rand(8, generator=gen).to(device)
    monkeypatch.setattr(dispatch.Work, "chunk_rows", lambda self: 4)
    loss = linear_lad_loss if isinstance(config, LADConfig) else linear_grpo_loss
    old = torch.full((8, 4), -3.0, device=device)
    with dispatch.force("one_pass"):
        loss(hidden, weight, ids, old, rewards=rewards, group_size=4, config=config, impl=impl, **kw).loss.backward()


@pytest.mark.parametrize("level", LEVELS[:2])
def test_group_advantages_are_computed_once_with_8_chunks(level, device, monkeypatch):
    calls: list[str] = []
    for name in ("advantages_of", "group_log_mean_exp", "policy_terms", "coefficients"):
        count(monkeypatch, calls, policy, name)
    config = LADConfig(target_norm="group", importance_sampling_level=level)
    one_pass_in_8_chunks(monkeypatch, config, "torch", device)
    assert [calls.count(name) for name in ("advantages_of", "group_log_mean_exp", "policy_terms")] == [1, 1, 1]
    assert calls.count("coefficients") == 8 and calls[-1] == "policy_terms"


def test_group_advantages_take_one_launch_with_8_chunks(device, monkeypatch):
    calls: list[str] = []
    count(monkeypatch, calls, kernel, "group_statistics")
    launches = Launches(kernel._policy_kernel)
    monkeypatch.setattr(kernel, "_policy_kernel", launches)
    one_pass_in_8_chunks(monkeypatch, LADConfig(target_norm="group"), "triton", device)
    assert calls == ["group_statistics"]
    assert [options["ADVANTAGE"] for options in launches.options] == ["shifted"] * 9  # 8 chunks and the whole


def test_known_coefficients_take_the_objective_once(device, monkeypatch):
    """Ratio 1, no KL, no entropy: coefficients first, then loss and metrics from the log-probs."""
    calls: list[str] = []
    for name in ("advantages_of", "policy_terms"):
        count(monkeypatch, calls, policy, name)
    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(4, 3, 8, generator=gen).to(device).requires_grad_(), torch.randn(20, 8).to(device)
    ids, rewards = torch.zeros(4, 3, dtype=torch.long, device=device), torch.rand(4, generator=gen).to(device)
    linear_grpo_loss(hidden, weight, ids, rewards=rewards, group_size=2, impl="torch").loss.backward()
    assert sorted(calls) == ["advantages_of", "policy_terms"]
