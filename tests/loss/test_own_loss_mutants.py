"""Planted bugs of linear_policy_loss and linear_cross_entropy: each edits one line of source and must be caught."""

from __future__ import annotations

import pytest
import test_compiled_checks
import test_cross_entropy
import test_operators
import test_policy_loss
import torch
from test_mutants import mutate

import lad_kernels
from lad_kernels import compiled_policy_loss, policy_loss

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
        "self._evaluate(some, self._tokens.select(rows))[2]",
        "self._evaluate(some, self._tokens.select(slice(0, len(out.logprobs[rows]))))[2]",
    ),
    "a sample of the first tokens": (
        "sample",
        "self._evaluate(out, self._tokens.select(chosen))",
        "self._evaluate(out, self._tokens.select(slice(0, len(chosen))))",
    ),
    "an objective of no token": ("none", "if not len(logprobs):", "if False:"),
    "a false claim in chunks": ("claim", "self._chunks.append((rows, gradient.onehot))", "pass"),
    "a false claim of two halves": ("mean", "checks.reads_all_values() and self._grad and len(joint)", "False"),
    "a detached loss": ("detached", "if all(g is None for g in gradients):", "if False:"),
    "NaN of the log-probs' gradient": (
        "NaN",
        "refuse_nan(loss, tokens.positions, c, c_entropy)",
        "refuse_nan(loss, tokens.positions, c_entropy)",
    ),
    "always joint": ("one pass", 'self.spans = "token" if separable else "all"', 'self.spans = "all"'),
}
OWN_OBJECTIVE = {
    "values of the first positions": ("lad", "x.reshape(-1)[self.positions]", "x.reshape(-1)[: len(self.positions)]"),
    "sequences of the first tokens": (
        "one pass",
        "None if self.sequences is None else self.sequences[chosen]",
        "None if self.sequences is None else self.sequences[: len(self.positions[chosen])]",
    ),
    "NaN": ("NaN", "if bad is not None and bool(bad.any()):", "if False:"),
    "NaN loss": ("compiled NaN", "if loss is not None and bool(loss.isnan()) else None", "if False else None"),
    "joint": ("mean", "if bool(off.any()):", "if False:"),
}
COMPILED = {
    "beyond the last bound": (
        "compiled bounds",
        "if cu_seqlens is not None:\n        counts",
        "if False:\n        counts",
    ),
    "masked tokens": ("compiled mask", 'checks.mask(loss_mask, target_ids, "target_ids")', "pass"),
    "a gradient's NaN": ("compiled gradient", "refuse_nan(None, positions, gradient)", "pass"),
    "NaN of the head": ("compiled head", "may_read(x) and not x.isnan().any()", "may_read(x)"),
    "detached by the compiler": ("compiled detached", "if _INPUT in node.name():", "if True:"),
    "a break of the graph": (
        "compiled break",
        "if logprobs.grad_fn is None or _INPUT not in logprobs.grad_fn.name():",
        "if not logprobs.requires_grad:",
    ),
    "a claim under the compiler": ("compiled claim", "if separable and checks.reads_all_values():", "if False:"),
    "halves are one": ("compiled claim", "(slice(0, None, 2), slice(1, None, 2))", "(slice(0, None), slice(0, None))"),
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
    "z-loss known before": ("everything", "self.known_before = self.z_loss == 0", "self.known_before = True"),
    "weights of a chunk": (
        "one pass of all",
        "_gradient(self.weights[rows], out.lse[rows]",
        "_gradient(self.weights[: len(out.lse[rows])], out.lse[rows]",
    ),
    "weights forgotten": (
        "plain",
        "packing.select(options.token_weights.detach()).to(wide)",
        "packing.select(options.token_weights.detach()).to(wide) * 0 + 1",
    ),
    "weights by token": (
        "by token",
        "weights = torch.where(counts, token_weights.to(weights.dtype), 0.0)",
        "pass",
    ),
    "compiled weights by token": (
        "compiled weights",
        "checks.token_weights(token_weights, target_ids, counts)",
        "pass",
    ),
    "mean logit by token": ("by token", "return_mean_logit=smoothing > 0", "return_mean_logit=False"),
    "accuracy over all": ("everything", "/ max(len(correct), 1)", "/ max(packing.shape.numel(), 1)"),
}
SOURCES = {
    "policy_loss": POLICY,
    "own_objective": OWN_OBJECTIVE,
    "compiled_policy_loss": COMPILED,
    "cross_entropy": CROSS_ENTROPY,
}
CHECKS["one pass of all"] = lambda _: test_cross_entropy.test_float64(SMOOTHED, "sum", "one_pass")


def refused(name: str):
    return lambda _: test_compiled_checks.test_refused(name, "aot_eager")


def claimed(patch) -> None:
    patch.setattr(test_compiled_checks.checks, "_always_read_values", True)
    test_compiled_checks.test_a_claim_of_separability_is_checked_where_values_are(None, "aot_eager", False)


CHECKS |= {
    "compiled NaN": refused("NaN loss"),
    "compiled bounds": lambda _: test_operators.test_an_objective_gets_no_token_beyond_the_last_bound(True),
    "compiled mask": refused("fractional mask"),
    "compiled gradient": refused("NaN gradient of the entropy"),
    "compiled head": lambda _: test_compiled_checks.test_nan_of_the_head_is_passed_on("aot_eager"),
    "compiled detached": refused("detached, with a parameter"),
    "compiled break": lambda _: test_compiled_checks.test_values_are_those_of_eager_mode(
        False, test_compiled_checks.broken, "aot_eager"
    ),
    "compiled claim": claimed,
    "compiled weights": refused("negative weights"),
}


def check(name: str, monkeypatch) -> None:
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(test_policy_loss.memory.Work, "chunk_rows", lambda self: 11)
        CHECKS[name](patch)


def plant(source: str, mutant, monkeypatch) -> None:
    """Put what a mutant of a source defines where it is used."""
    if source in ("policy_loss", "cross_entropy"):
        function = f"linear_{source}"
        for tests in (globals()[f"test_{source}"], lad_kernels):
            monkeypatch.setattr(tests, function, getattr(mutant, function))
        return
    users = (policy_loss, compiled_policy_loss) if source == "own_objective" else (policy_loss,)
    for user in users:
        for name in set(vars(mutant)) & set(vars(user)):
            if getattr(vars(mutant)[name], "__module__", None) == mutant.__name__:
                monkeypatch.setattr(user, name, vars(mutant)[name])


@pytest.mark.parametrize(("source", "bug"), [(source, bug) for source, bugs in SOURCES.items() for bug in bugs])
def test_bug_is_caught(source, bug, monkeypatch, tmp_path):
    name, old, new = SOURCES[source][bug]
    plant(source, mutate(f"{source}.py", old, new, tmp_path), monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError, pytest.fail.Exception, IndexError)):
        check(name, monkeypatch)


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_bug_it_passes(name, monkeypatch):
    check(name, monkeypatch)
