"""Which path a call takes: it depends on its own tokens and nothing else."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from test_paths import LIVE, B, D, M, T, V, batch, fresh, run  # noqa: F401  (fresh is a fixture)
from torch import Tensor

from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss
from lad_kernels.head import cost, dispatch, flops, memory, plan
from lad_kernels.head.head import Head
from lad_kernels.head.records import LogitTransform, Needs
from lad_kernels.testing import make_inputs


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_call_looks_at_its_own_tokens(impl, device, monkeypatch):
    """A high-entropy policy takes one pass, a low-entropy one is routed, independently of earlier calls."""
    two_pass = lambda work: cost.score(work) + cost.dense(work, M)  # noqa: E731
    monkeypatch.setattr(cost, "one_pass", lambda work, active=None: 0.9 * two_pass(work))
    most = lambda work, pairs, dense: pairs + dense * work.blocks > 0.5 * M * work.blocks  # noqa: E731
    dear = lambda work, pairs, dense=0, active=None: 9.0 * most(work, pairs, dense)  # noqa: E731
    monkeypatch.setattr(cost, "routed", dear)
    monkeypatch.setattr(dispatch, "SAMPLE_COST", 1.0)
    monkeypatch.setattr(dispatch, "WHOLE", 1.0)
    config, look = LADConfig(tail_mass=1e-3), 2 * 8 / (M - 3)
    for entropy in (None, 0.1, 0.1, None, None, 0.1):
        inputs = batch(entropy) | {"advantages": torch.ones(B, dtype=torch.float64)}
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        out = run(linear_lad_loss, inputs, torch.float32, config=config, impl=impl)[0]
        spent = out.metrics["head_flops"].item() / ((M - 3) * D * V) - look
        assert spent == pytest.approx(6) if entropy is None else spent < 5


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("tail", ["drop", "unbiased"])
def test_looking_tells_what_routing_keeps(impl, tail, device, monkeypatch):
    """The share from a sample against that of a routed call; the sample holds all tokens here."""
    inputs, told = batch(0.5), []
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    config = GRPOConfig(policy_loss="reinforce", tail_mass=3e-2, tail=tail)
    monkeypatch.setattr(memory.Work, "sample", property(lambda work: work.tokens))
    monkeypatch.setattr(cost, "dense_share", lambda work: 0.9)
    monkeypatch.setattr(dispatch, "needs_sample", lambda *arguments, **options: True)
    monkeypatch.setattr(dispatch, "sample_step", lambda work: 1)
    monkeypatch.setattr(dispatch, "takes_one_pass", lambda work, sparsity, shares: told.append(shares))
    run(linear_grpo_loss, inputs, torch.float32, config=config, impl=impl)
    (shares,) = told
    with dispatch.force("routed"):
        routed = run(linear_grpo_loss, inputs, torch.float32, config=config, impl=impl)[0].metrics["kept_share"]
    live = (M - 3 - 2 * T) / (M - 3)
    assert shares.active == pytest.approx(live)
    assert 0.05 < routed / live < 0.9
    assert shares.density * live == pytest.approx(routed.item(), rel=0.1)


@pytest.mark.parametrize(("entropy", "tail"), [(0.3, "drop"), (0.3, "unbiased"), (1.0, "drop"), (3.0, "unbiased")])
def test_half_of_the_words_tell_nearly_the_same(entropy, tail, monkeypatch):
    """All tokens, those with even targets by the even words: 1.00 to 1.07 times the density that all words tell."""
    given = 1024, 16_384, entropy, tail
    whole, half = (told_by_all_tokens(*given, step, "torch", "cpu", monkeypatch) for step in (1, 2))
    print(whole, half)
    assert half.active == whole.active
    assert half.density == pytest.approx(whole.density, rel=0.12)
    assert half.dense == pytest.approx(whole.dense, abs=0.12 * whole.density)


@pytest.mark.parametrize("step", [1, 2])
def test_kernels_tell_what_pytorch_tells(step, device, monkeypatch):
    told = [told_by_all_tokens(256, 4096, 1.0, "drop", step, impl, device, monkeypatch) for impl in ("torch", "triton")]
    assert told[1] == pytest.approx(told[0], rel=1e-2)


def told_by_all_tokens(tokens, vocab, entropy, tail, step, impl, device, monkeypatch) -> dispatch.Shares:
    """What a sample of all tokens, scored with every step-th word, says; their targets are the policy's own."""
    x, told = make_inputs(tokens, 16, vocab, entropy=entropy, masked=0.0, device=device), []
    hidden, weight = (leaf.detach().requires_grad_() for leaf in (x.hidden, x.weight))  # [N, D], [V, D]
    advantages = (torch.arange(tokens, device=device) % 4 > 0).float()  # [N]
    monkeypatch.setattr(memory.Work, "sample", property(lambda work: work.tokens))
    monkeypatch.setattr(cost, "dense_share", lambda work: 0.4)
    monkeypatch.setattr(dispatch, "needs_sample", lambda *arguments, **options: True)
    monkeypatch.setattr(dispatch, "sample_step", lambda work: step)
    monkeypatch.setattr(dispatch, "takes_one_pass", lambda work, sparsity, shares: told.append(shares))
    config, old = GRPOConfig(policy_loss="reinforce", tail_mass=3e-4, tail=tail), torch.zeros(tokens, device=device)
    linear_grpo_loss(hidden, weight, x.targets, old, advantages=advantages, config=config, impl=impl)
    return told[0]


def test_the_sample_is_spread_over_the_tokens(monkeypatch):
    """The second half of the tokens has a gradient, and so has half of a sample."""
    inputs, told = batch(0.5), []
    inputs |= {"advantages": (torch.arange(B) >= B // 2).double(), "loss_mask": None}
    monkeypatch.setattr(dispatch, "needs_sample", lambda *arguments, **options: True)
    monkeypatch.setattr(dispatch, "sample_step", lambda work: 1)
    monkeypatch.setattr(dispatch, "takes_one_pass", lambda work, sparsity, shares: told.append(shares))
    run(linear_grpo_loss, inputs, torch.float32, config=GRPOConfig(tail_mass=0.0, epsilon_low=9, epsilon_high=9))
    assert [shares.active for shares in told] == [0.5]


def test_chunks_of_whole_sequences():
    """As few as may be of at most 30 tokens (`fresh`); no chunks where a sequence alone is longer."""
    x = make_inputs(100, D, V)
    whole = Head(x.hidden, x.weight, x.targets, None, LogitTransform(), triton=False)
    needs = Needs(True, True, False)
    for bounds, expected in (
        ([0, 20, 30, 40, 69, 70, 100], [0, 30, 40, 70, 100]),
        ([0, 30, 60, 90, 100], [0, 30, 60, 90, 100]),
        ([0, 20, 51, 80, 100], None),
        ([0, 20, 45], [0, 20, 45, 75, 100]),  # padding behind the last bound
        ([0, 20], [0, 20, 50, 80, 100]),
        ([0, 0], [0, 30, 60, 90, 100]),
        (None, [0, 30, 60, 90, 100]),
    ):
        chunks = plan.one_pass_chunks(whole, needs, None if bounds is None else torch.tensor(bounds))
        assert chunks == (expected and [slice(*pair) for pair in itertools.pairwise(expected)])


@pytest.mark.parametrize("frozen", ["hidden_states", "lm_head_weight"])
def test_products_of_what_is_frozen_are_not_counted(frozen):
    inputs = batch() | {"bias": None}
    inputs = {
        k: v.requires_grad_() if k in {"hidden_states", "lm_head_weight"} - {frozen} else v for k, v in inputs.items()
    }
    with dispatch.force("two_pass"), flops.counting() as tally:
        out = linear_grpo_loss(**inputs, config=GRPOConfig(epsilon_low=9, epsilon_high=9))
        out.loss.backward()
    assert out.metrics["head_flops"] == tally[0] == (2 * (M - 3) + 4 * LIVE) * D * V


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("path", [None, *dispatch.PATHS])
def test_the_same_call_gives_the_same_bits(path, impl, device):
    """Five times (three in the interpreter), after calls of other data: outputs, gradients and metrics."""

    def call(entropy, seed: int = 0) -> list[Tensor]:
        inputs = batch(entropy, seed=seed)
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with nullcontext() if path is None else dispatch.force(path):
            out, gradients = run(linear_lad_loss, inputs, torch.float32, config=LADConfig(tail_mass=1e-3), impl=impl)
        return [out.loss, out.logprobs, *gradients.values(), *(out.metrics[name] for name in sorted(out.metrics))]

    first = call(0.5)
    for i, other in enumerate((None, 0.1, 0.5, None) if impl == "torch" else (None, 0.1)):
        call(other, seed=i + 1)
        for x, y in zip(call(0.5), first):
            assert torch.equal(x, y)


@pytest.mark.parametrize("active", [1, 2, 4, 6])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_model_counts_the_products_that_are_launched(active, on_policy, monkeypatch):
    """PyTorch, exact: where nothing but products takes time, the path with fewer flops, counted here, is preferred."""
    products_alone = cost.Speeds(1.0, float("inf"), 0.0, routed_efficiency=1.0, block=0.0)
    monkeypatch.setattr(cost, "speeds", lambda work: products_alone)
    inputs = batch(drift=None if on_policy else 0.1)
    inputs["advantages"] = (torch.arange(B) < active).double()  # so many of the B sequences have a gradient
    config = GRPOConfig(epsilon_low=9, epsilon_high=9)
    counted = {}
    for path in ("one_pass", "two_pass"):
        with dispatch.force(path), flops.counting() as tally:
            run(linear_grpo_loss, inputs, torch.float32, config=config)
        counted[path] = tally[0]
    exact = dispatch.Sparsity(0.0, unbiased=True, backward="auto")
    for work in (memory.Work(n, 896, 151_936, 4, "cpu") for n in (512, 2048, 16_384)):
        one_pass = dispatch.takes_one_pass(work, exact, dispatch.Shares(active / B))
        assert counted["one_pass" if one_pass else "two_pass"] == min(counted.values()), counted
