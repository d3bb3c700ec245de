"""Planted bugs of linear_policy_loss and linear_cross_entropy: each edits one line of source and must be caught."""

from __future__ import annotations

import pytest
import test_cross_entropy
import test_policy_loss
from test_mutants import mutate

SMOOTHED = "smoothing 0.1, z 0.01, weights"
CHECKS = {
    "lad": lambda _: test_policy_loss.test_lad_in_ten_lines("js", "two_pass"),
    "one pass": lambda _: test_policy_loss.test_grpo_in_ten_lines("one_pass", True, "torch"),
    "entropy": lambda _: test_policy_loss.test_parameters_and_entropy("two_pass", True),
    "frozen": lambda _: test_policy_loss.test_a_frozen_model_trains_the_objective(),
    "none": lambda patch: test_policy_loss.test_no_token_counts(False, patch),
    "claim": lambda patch: test_policy_loss.test_a_false_claim_of_separability(test_policy_loss.mean_subtracted, patch),
    "mean": lambda patch: test_policy_loss.test_a_false_claim_of_separability(test_policy_loss.mean_of_given, patch),
    "sample": test_policy_loss.test_the_sample_is_of_the_tokens_given,
    "detached": lambda _: test_policy_loss.test_wrong_objectives(
        "objective: expected a loss that depends on the log-probs"
    ),
    "NaN": lambda _: test_policy_loss.test_wrong_objectives(
        "objective: expected a loss and a gradient that are numbers, got NaN at position"
    ),
    "everything": lambda _: test_cross_entropy.test_float64(SMOOTHED, "mean", "two_pass"),
    "plain": lambda _: test_cross_entropy.test_float64("smoothing 0.0, z 0.0, weights", "sum", "one_pass"),
    "by token": lambda _: test_cross_entropy.test_float64(SMOOTHED, "none", "two_pass"),
    "no count": lambda _: test_cross_entropy.test_no_token_counts("torch", "cpu"),
    "flops": lambda _: test_cross_entropy.test_flops("two_pass", 8),
}
POLICY = {  # bug: check that shows it, source, mutant
    "entropy's part of prob forgotten": ("entropy", "-c if c_entropy is None else -c - c_entropy * entropy", "-c"),
    "entropy's gradient forgotten": ("entropy", "LogitGradient(c, prob, c_entropy)", "LogitGradient(c, prob)"),
    "parameters forgotten": ("entropy", "return loss if keep else loss.detach()", "return loss.detach()"),
    "graph of the objective freed": ("entropy", "retain_graph=keep", "retain_graph=False"),
    "a frozen model's objective": ("frozen", "self._grad = torch.is_grad_enabled()", "self._grad = False"),
    "all tokens for a chunk's": (
        "one pass",
        "self._evaluate(_rows(out, rows), self._tokens.select(rows))[2]",
        "self._evaluate(_rows(out, rows), self._tokens.select(slice(0, len(out.logprobs[rows]))))[2]",
    ),
    "a sample of the first tokens": (
        "sample",
        "self._evaluate(out, self._tokens.select(chosen))",
        "self._evaluate(out, self._tokens.select(slice(0, len(chosen))))",
    ),
    "values of the first positions": ("lad", "x.reshape(-1)[self.positions]", "x.reshape(-1)[: len(self.positions)]"),
    "sequences of the first tokens": (
        "one pass",
        "None if self.sequences is None else self.sequences[chosen]",
        "None if self.sequences is None else self.sequences[: len(self.positions[chosen])]",
    ),
    "an objective of no token": ("none", "if not len(logprobs):", "if False:"),
    "a false claim in chunks": ("claim", "self._chunks.append((rows, gradient.onehot))", "pass"),
    "a false claim of two halves": ("mean", "checks.reads_all_values() and self._grad and len(joint)", "False"),
    "a detached loss": ("detached", "if all(g is None for g in found):", "if False:"),
    "NaN": ("NaN", "if bad.any() or loss.isnan():", "if loss.isnan() and not bad.any():"),
    "always joint": ("one pass", 'self.spans = "token" if separable else "all"', 'self.spans = "all"'),
}
CROSS_ENTROPY = {
    "divisor counts tokens of weight 0": (
        "everything",
        "total = weights.sum()",
        "total = weights.new_tensor(float(len(weights)))",
    ),
    "no divisor": ("everything", 'if options.reduction == "mean":', "if False:"),
    "0 / 0": ("no count", "torch.where(total == 0, 1.0, total)", "total"),
    "smoothed value": (
        "everything",
        "smoothing * (lse - mean_logit)",
        "smoothing * lse",
    ),
    "smoothed target": (
        "everything",
        "LogitGradient(-(1 - smoothing) * weights, prob)",
        "LogitGradient(-weights, prob)",
    ),
    "mean logit's gradient": (
        "everything",
        "mean_logit=-smoothing * weights if smoothing",
        "mean_logit=None if smoothing",
    ),
    "z-loss's value": ("everything", "loss = loss + z_loss * lse.square()", "pass"),
    "z-loss's slope": ("everything", "(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)"),
    "z-loss's report": (
        "everything",
        "(self.weights * self.z_loss * lse.square()).sum()",
        "lse.square().sum()",
    ),
    "z-loss known before": ("everything", "return self.z_loss == 0", "return True"),
    "weights of a chunk": (
        "one pass of all",
        "_gradient(self.weights[rows], out.lse[rows]",
        "_gradient(self.weights[: len(out.lse[rows])], out.lse[rows]",
    ),
    "weights forgotten": (
        "plain",
        "packing.take(options.token_weights.detach()).to(wide)",
        "packing.take(options.token_weights.detach()).to(wide) * 0 + 1",
    ),
    "weights by token": (
        "by token",
        "torch.where(counts, options.token_weights.detach().to(weights.dtype), 0.0)",
        "weights",
    ),
    "mean logit by token": ("by token", "return_mean_logit=smoothing > 0", "return_mean_logit=False"),
    "accuracy over all": ("everything", "/ max(len(correct), 1)", "/ max(packing.shape.numel(), 1)"),
}
CHECKS["one pass of all"] = lambda _: test_cross_entropy.test_float64(SMOOTHED, "sum", "one_pass")


def check(name: str, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(test_policy_loss.memory.Work, "chunk_rows", lambda self: 11)
        CHECKS[name](patch)


@pytest.mark.parametrize("bug", [*POLICY, *CROSS_ENTROPY])
def test_bug_is_caught(bug, monkeypatch, tmp_path):
    name, old, new = (POLICY | CROSS_ENTROPY)[bug]
    source = "policy_loss" if bug in POLICY else "cross_entropy"
    mutant = mutate(f"{source}.py", old, new, tmp_path)
    function = f"linear_{source}"
    monkeypatch.setattr(globals()[f"test_{source}"], function, getattr(mutant, function))
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError, pytest.fail.Exception, IndexError)):
        check(name, monkeypatch)


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_bug_it_passes(name, monkeypatch):
    check(name, monkeypatch)
