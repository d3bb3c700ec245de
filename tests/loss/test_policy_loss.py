"""linear_policy_loss: LAD and GRPO written in PyTorch, objectives with entropy and parameters, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_paths import B, D, T, V, batch, run
from torch import Tensor, nn

from lad_kernels import GRPOConfig, LADConfig, checks, linear_grpo_loss, linear_lad_loss, linear_policy_loss, reference
from lad_kernels.head import cost, dispatch, memory
from lad_kernels.reference_objective import GENERATORS
from lad_kernels.testing import FP32_TOLERANCE, relative_error

M = B * T - 3  # one sequence of `batch` has three masked tokens
HEAD = ("hidden_states", "lm_head_weight", "target_ids", "loss_mask", "bias", "temperature", "logit_scale", "softcap")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: 30)


def head_of(inputs: dict) -> dict:
    """The head's keywords among those of `linear_lad_loss`."""
    return {k: v for k, v in inputs.items() if k in HEAD}


def lad(inputs: dict, divergence: str, eta: float):
    """E_{y ~ pi_old} [e^u f(r / e^u)], u = A / eta, as a mean over tokens."""

    def objective(logprobs, entropy, tokens):
        u = tokens.expand(inputs["advantages"]) / eta  # [m]
        log_x = logprobs - tokens.take(inputs["old_logprobs"]) - u  # [m] of r / e^u
        return (u.exp() * GENERATORS[divergence](log_x.exp(), log_x)).sum() / M

    return objective


def ppo(inputs: dict, epsilon: float = 0.1):
    def objective(logprobs, entropy, tokens):
        a = tokens.expand(inputs["advantages"])  # [m]
        ratio = (logprobs - tokens.take(inputs["old_logprobs"])).exp()  # [m]
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        return -torch.minimum(ratio * a, clipped * a).sum() / M, {"clipped": ((ratio - 1).abs() > epsilon).sum() / M}

    return objective


def gspo(inputs: dict):
    """PPO's term with one ratio a sequence, the mean of its tokens' log-ratios; sequences weigh alike."""

    def objective(logprobs, entropy, tokens):
        one = torch.ones_like(logprobs)
        length = one.new_zeros(B).index_add(0, tokens.sequences, one)  # [B]
        log_ratio = one.new_zeros(B).index_add(0, tokens.sequences, logprobs - tokens.take(inputs["old_logprobs"]))
        ratio, a = (log_ratio / length).exp(), inputs["advantages"]  # [B], [B]
        return -torch.minimum(ratio * a, ratio.clamp(0.97, 1.03) * a).mean()

    return objective


def agree(found: tuple, truth: tuple) -> None:
    (out, gradients), (expected, of_truth) = found, truth
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-9, atol=1e-9)
    for leaf, gradient in of_truth.items():
        torch.testing.assert_close(gradients[leaf], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("divergence", ["js", "hd", "kl", "pearson"])
def test_lad_in_ten_lines(divergence, path):
    inputs, config = batch(bias=True, softcap=9.0), LADConfig(divergence, eta=1.0)
    own = head_of(inputs) | {"objective": lad(inputs, divergence, 1.0)}
    with dispatch.force(path):
        ours = run(linear_policy_loss, own, separable=True)
        agree(ours, run(linear_lad_loss, inputs, config=config))
    agree(ours, run(reference.linear_lad_loss, inputs, config=config))


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_grpo_in_ten_lines(path, separable, impl):
    inputs, config = batch(), GRPOConfig(epsilon_low=0.1, epsilon_high=0.1)
    own = head_of(inputs) | {"objective": ppo(inputs)}
    with dispatch.force(path):
        ours = run(linear_policy_loss, own, separable=separable, impl=impl)
        theirs = run(linear_grpo_loss, inputs, config=config)
    agree(ours, theirs)
    assert ours[0].advantages is None
    assert ours[0].metrics["clipped"] >= theirs[0].metrics["clip_share"] > 0  # PPO clips on one side of 1 only
    if impl == "torch":
        assert ours[0].metrics["head_flops"] == (theirs[0].metrics["head_flops"] if separable else own_flops(ours, own))


def own_flops(found: tuple, inputs: dict) -> int:
    """Of two passes: tokens without a gradient are left out of the second."""
    active = (found[1]["hidden_states"].flatten(0, 1) != 0).any(1).sum()
    return 2 * D * V * (M + 3 * int(active))


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_sequence_ratios(path):
    inputs = batch()
    config = GRPOConfig(
        epsilon_low=0.03, epsilon_high=0.03, importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-mean"
    )
    with dispatch.force(path):
        agree(
            run(linear_policy_loss, head_of(inputs) | {"objective": gspo(inputs)}),
            run(linear_grpo_loss, inputs, config=config),
        )


@pytest.mark.parametrize(("rows", "passes"), [(M, 1), (M - 1, 2)])
@pytest.mark.parametrize("path", [None, "one_pass"])
def test_tokens_of_one_chunk_take_one_pass_whatever_the_objective(path, rows, passes, monkeypatch):
    """Also where it depends on sequences; it is called once, with all tokens."""
    monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: rows)
    monkeypatch.setattr(cost, "one_pass", lambda work, active=None: 0.0)
    inputs, calls = batch(), []
    objective = gspo(inputs)

    def counted(logprobs, entropy, tokens):
        calls.append(len(logprobs))
        return objective(logprobs, entropy, tokens)

    own = head_of(inputs) | {"objective": counted}
    with dispatch.force(path) if path else contextlib.nullcontext():
        ours = run(linear_policy_loss, own)
    assert calls == [M]
    agree(ours, run(linear_policy_loss, head_of(inputs) | {"objective": objective}, impl="reference"))
    active = (ours[1]["hidden_states"].flatten(0, 1) != 0).any(1).sum()
    assert ours[0].metrics["head_flops"] == 2 * D * V * (M + (1 + passes) * int(active))


@pytest.mark.parametrize("path", dispatch.PATHS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("separable", [True, False])
def test_kernels(path, impl, separable, device, monkeypatch):
    """float32, separable in several chunks or not in one: 4.2e-7 at most was measured."""
    if not separable:
        monkeypatch.setattr(memory.Work, "chunk_rows", lambda self: M)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch(None).items()}
    truth, expected = run(reference.linear_grpo_loss, batch(None))
    single = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    own = head_of(inputs) | {"objective": ppo(single, 0.2)}
    with dispatch.force(path):
        out, found = run(linear_policy_loss, own, torch.float32, separable=separable, impl=impl, tail_mass=1e-9)
    passes = out.metrics["head_flops"] / (2 * D * V * M)
    assert passes <= 3 if path == "one_pass" else passes > 2
    assert relative_error(out.loss.cpu(), truth.loss) < FP32_TOLERANCE
    for leaf, gradient in found.items():
        assert relative_error(gradient.cpu(), expected[leaf]) < FP32_TOLERANCE, leaf


class Calibrated(nn.Module):
    """REINFORCE with a learnt temperature on the advantages, a learnt baseline and an entropy bonus."""

    def __init__(self, inputs: dict):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.baseline = nn.Parameter(torch.linspace(-1, 1, B, dtype=torch.float64))
        self.inputs = inputs

    def forward(self, logprobs, entropy, tokens):
        a = tokens.expand(self.inputs["advantages"] - self.baseline) / self.temperature  # [m]
        bonus = 0.0 if entropy is None else 0.05 * entropy
        return -(a.tanh() * logprobs + bonus).sum() / M


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("path", dispatch.PATHS)
def test_parameters_and_entropy(path, with_entropy):
    """Of the objective too, once a backward; a second backward gives the same."""
    inputs, found = batch(bias=True, temperature=0.8), {}
    for impl in ("torch", "reference"):
        objective, own = Calibrated(inputs), head_of(inputs)
        own |= {k: own[k].clone().requires_grad_() for k in ("hidden_states", "lm_head_weight", "bias")}
        with dispatch.force(path):
            out = linear_policy_loss(**own, objective=objective, separable=True, return_entropy=with_entropy, impl=impl)
        leaves = [own["hidden_states"], own["lm_head_weight"], own["bias"], *objective.parameters()]
        first = [x.clone() for x in torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)]
        for again, before in zip(torch.autograd.grad(3 * out.loss, leaves), first):
            torch.testing.assert_close(again, before, rtol=1e-10, atol=1e-14)
        found[impl] = [out.loss.detach(), *first, *([out.entropy] if with_entropy else [])]
    for ours, truth in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-11)
        assert truth.count_nonzero()


def test_a_frozen_model_trains_the_objective():
    inputs = batch()
    objective = Calibrated(inputs)
    linear_policy_loss(**head_of(inputs), objective=objective).loss.backward()
    assert objective.baseline.grad.count_nonzero() and objective.temperature.grad
    with torch.no_grad():
        out = linear_policy_loss(**head_of(inputs), objective=objective)
    assert not out.loss.requires_grad


def test_packed_tokens_know_their_sequences():
    """As padded; tokens beyond the last bound are not among those that the objective is given."""
    inputs = batch()
    flat = {
        k: v.flatten(0, 1) if isinstance(v, Tensor) and v.ndim > 1 and k != "lm_head_weight" else v
        for k, v in head_of(inputs).items()
    }
    junk = torch.full((2, D), torch.nan, dtype=torch.float64)
    flat["hidden_states"] = torch.cat([flat["hidden_states"], junk])
    flat["target_ids"] = torch.cat([flat["target_ids"], torch.tensor([-100, 10**9])])
    flat["loss_mask"] = torch.cat([flat["loss_mask"], torch.ones(2)])
    old = torch.cat([inputs["old_logprobs"].flatten(), torch.full((2,), torch.nan, dtype=torch.float64)])
    cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    objective = lad(inputs | {"old_logprobs": old}, "js", 1.0)
    out, found = run(linear_policy_loss, flat | {"objective": objective, "cu_seqlens": cu_seqlens}, separable=True)
    truth, expected = run(linear_policy_loss, head_of(inputs) | {"objective": lad(inputs, "js", 1.0)})
    torch.testing.assert_close(out.loss, truth.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["hidden_states"][:-2].view(B, T, D), expected["hidden_states"])
    assert not found["hidden_states"][-2:].count_nonzero()


@pytest.mark.parametrize("validate", [False, True])
def test_no_token_counts(validate, monkeypatch):
    monkeypatch.setattr(checks, "_always_read_values", validate)
    inputs = head_of(batch()) | {"objective": lambda logprobs, *_: logprobs.mean(), "separable": True}
    inputs["loss_mask"] = torch.zeros_like(inputs["loss_mask"])
    out, found = run(linear_policy_loss, inputs)
    assert out.loss == 0 and not found["lm_head_weight"].count_nonzero()


def mean_of_given(inputs):
    return lambda logprobs, entropy, tokens: (logprobs * tokens.expand(inputs["advantages"])).mean()


def mean_subtracted(inputs):
    return lambda logprobs, entropy, tokens: ((logprobs - logprobs.mean()) ** 2).sum() / M


@pytest.mark.parametrize("false", [mean_of_given, mean_subtracted])
def test_a_false_claim_of_separability(false, monkeypatch):
    """Is an error where gradients were made chunk by chunk, and everywhere when checks are asked for."""
    inputs = batch()
    own = head_of(inputs) | {"objective": false(inputs), "separable": True}
    with dispatch.force("one_pass"), pytest.raises(ValueError, match="separable: expected a loss that is a sum"):
        run(linear_policy_loss, own)
    with dispatch.force("two_pass"):
        run(linear_policy_loss, own)  # nothing went wrong
        monkeypatch.setattr(checks, "_always_read_values", True)
        with pytest.raises(ValueError, match=r"separable: .* among all tokens and .* among some; divide by a constant"):
            run(linear_policy_loss, own)
        run(linear_policy_loss, own | {"separable": False})
        run(linear_policy_loss, own | {"objective": ppo(inputs)})


def test_the_sample_is_of_the_tokens_given(monkeypatch):
    """What the choice of a path asks of a few tokens: the objective sees those tokens alone."""
    inputs, seen = batch(), []
    monkeypatch.setattr(dispatch, "needs_sample", lambda *_, **__: True)
    monkeypatch.setattr(dispatch, "sample_step", lambda work: 1)
    monkeypatch.setattr(memory.Work, "sample", 7)
    objective = ppo(inputs)

    def spying(logprobs, entropy, tokens):
        seen.append(tokens.positions)
        torch.testing.assert_close(logprobs.detach(), truth.flatten()[tokens.positions], rtol=1e-9, atol=1e-9)
        return objective(logprobs, entropy, tokens)

    truth = reference.linear_logprobs(**{k: v for k, v in head_of(inputs).items()}).logprobs
    run(linear_policy_loss, head_of(inputs) | {"objective": spying}, separable=True, tail_mass=1e-3)
    assert len(seen[0]) == 7 and len(seen[-1]) == M
    seen.clear()
    monkeypatch.setattr(dispatch, "sample_step", lambda work: 2)  # by half of the words: not asked of an objective
    run(linear_policy_loss, head_of(inputs) | {"objective": spying}, separable=True, tail_mass=1e-3)
    assert all(len(positions) == M for positions in seen)


WRONG = {
    "objective: expected a function (logprobs, entropy, tokens) -> loss, got float": 3.0,
    "objective: expected a scalar floating loss on cpu, got torch.float64 [69]": lambda x, *_: -x,
    "objective: expected it to return a scalar loss, or (loss, metrics by name), got NoneType": lambda *_: None,
    "objective: expected it to return a scalar loss, or (loss, metrics by name), got Tensor, Tensor": lambda x, *_: (
        x.sum(),
        x,
    ),
    "objective: expected a loss that depends on the log-probs": lambda x, *_: x.detach().sum(),
    "objective: expected a loss and a gradient that are numbers, got NaN at position": lambda x, *_: x.sqrt().sum(),
    "objective: expected a loss and a gradient that are numbers, got NaN in the loss": lambda x, *_: (
        x.sum() + x.new_tensor(torch.nan)
    ),
    "objective: metric 'kept_share' is one of the head's own": lambda x, *_: (x.sum(), {"kept_share": x[0]}),
    "objective: expected 0-d metrics, got [69] for 'ratio'; reduce it": lambda x, *_: (x.sum(), {"ratio": x}),
    "Tokens.take: expected [6, 12] as target_ids, got [6]": lambda x, _, t: (x * t.take(torch.ones(B))).sum(),
    "Tokens.expand: expected [B], one value per sequence, got [6, 12]": lambda x, _, t: t.expand(
        torch.ones(B, T)
    ).sum(),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_objectives(message):
    with pytest.raises((ValueError, TypeError)) as error:
        run(linear_policy_loss, head_of(batch()) | {"objective": WRONG[message]})
    assert message in str(error.value)


def test_wrong_arguments():
    own = head_of(batch()) | {"objective": lambda x, *_: x.sum()}
    for options, message in (
        ({"backward": "sparse"}, "backward: expected one of 'auto', 'dense', 'routed'"),
        ({"tail_mass": -1}, "tail_mass: expected a finite number >= 0"),
        ({"tail": "keep"}, "tail: expected one of"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: expected None for padded target_ids"),
        ({"loss_mask": torch.ones(B)}, r"loss_mask: expected \[6, 12\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run(linear_policy_loss, own | options)
    with pytest.raises(ValueError, match=r"Tokens.expand: .* got packed input without cu_seqlens"):
        linear_policy_loss(
            torch.ones(3, D), torch.ones(V, D), torch.ones(3, dtype=torch.long), lambda x, _, t: t.expand(x).sum()
        )
