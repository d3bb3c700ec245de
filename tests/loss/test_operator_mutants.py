"""Planted bugs of the operators: each edits one line of source and must be caught."""

from __future__ import annotations

import pytest
import test_operators
import test_saved_tensors
import torch
from test_mutants import mutate
from test_operators import Batch

from lad_kernels import loss, operators, reference, step, step_operator
from lad_kernels.head import logprobs


def gradients() -> None:
    """Of log-probs, entropy and lse against stored logits; what comes for masked tokens is NaN."""
    b = Batch(dtype=torch.float64)
    gen = torch.Generator().manual_seed(2)
    upstream = torch.randn(3, *b.mask.shape, dtype=torch.float64, generator=gen)
    found = []
    for function, masked in ((logprobs.linear_logprobs, torch.nan), (reference.linear_logprobs, 0.0)):
        for x in b.parameters():
            x.grad = None
        out = function(b.hidden, b.weight, b.targets, bias=b.bias, loss_mask=b.mask, return_entropy=True)
        outputs = (out.logprobs, out.entropy, out.lse)
        torch.autograd.backward(outputs, tuple(g.masked_fill(~b.mask, masked) for g in upstream))
        found.append([x.grad for x in b.parameters()])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def mean_logit() -> None:
    """A token whose only gradient is that of its mean logit."""
    b = Batch(dtype=torch.float64)
    out = logprobs.token_outputs(b.head(), b.mask, return_mean_logit=True)
    weights = torch.linspace(1, 2, b.mask.numel(), dtype=torch.float64).view(b.mask.shape)
    (out.mean_logit * weights).sum().backward()
    rows = (weights[..., None] * b.hidden.detach())[b.mask]  # [M, D]
    torch.testing.assert_close(b.weight.grad, (rows.sum(0) / len(b.weight)).expand_as(b.weight))


def same(case: str, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
    b, function = Batch(dtype=dtype), test_operators.CASES[case]
    test_operators.assert_same(
        test_operators.results(test_operators.compiled(function), b, factor),
        test_operators.results(function, b, factor),
    )


CHECKS = {
    "gradients": gradients,
    "mean logit": mean_logit,
    "LAD": lambda: same("LAD"),
    "LAD times 4": lambda: same("LAD", factor=4.0),
    "everything": lambda: same("LAD with everything"),
    "scaler": test_operators.test_a_loss_scaler_meets_gradients_in_float32,
    "cross-entropy": lambda: same("cross-entropy with everything"),
    "given": lambda: same("GRPO of log-probs"),
    "given times 4": lambda: same("GRPO of log-probs", factor=4.0),
    "routed": lambda: test_operators.test_every_path_is_taken_inside("routed"),
    "saved": lambda: test_saved_tensors.test_autograd_saves_all_that_a_backward_needs("routed"),
    "twice": lambda: test_saved_tensors.test_a_graph_that_is_kept_gives_its_gradients_twice("one_pass"),
}
# Source: bug: check that shows it, line, mutant
BUGS = {
    "head/logprobs.py": {
        "masked upstream gradients": ("gradients", "torch.where(loss_mask != 0, g, 0.0)", "g"),
        "lse's gradient": ("gradients", "-onehot if g_lse is None else g_lse - onehot", "-onehot"),
        "entropy's part of prob": ("gradients", "prob = prob - g_entropy * entropy.reshape(-1)", "pass"),
        "mean logit alone": ("mean logit", "gradient.active(g_mean)", "gradient.active()"),
        "mean logit forgotten": ("mean logit", "part.add_mean_logit(gradients, select(g_mean, active))", "pass"),
    },
    "step_operator.py": {
        "float16": ("scaler", "wide, empty = _wide(*inputs), []", "wide, empty = False, []"),
    },
    "operators.py": {
        "upstream gradient": ("LAD times 4", "x.to(torch.promote_types(x.dtype, torch.float32)) * grad", "x"),
        "one gradient for another": (
            "everything",
            "ctx.save_for_backward(*others[-len(at) :])",
            "ctx.save_for_backward(*(x * 2 for x in others[-len(at) :]))",
        ),
        "upstream gradient of log-probs": (
            "given times 4",
            "x.to(torch.promote_types(x.dtype, torch.float32)) * grad",
            "x",
        ),
    },
    "compiled_loss.py": {
        "wanted outputs": ("LAD", "Wanted(logprobs, entropy)", "Wanted(entropy, logprobs)"),
        "another config": (
            "everything",
            "*flat_inputs(inputs, config), ",
            "*flat_inputs(inputs, LADConfig('kl', entropy_coef=0.01, kl_coef=0.1, target_norm='group')), ",
        ),
        "metrics in another order": (
            "LAD",
            "_metric_names(config, wanted, needs), loss.dtype",
            "_metric_names(config, wanted, needs)[::-1], loss.dtype",
        ),
    },
    "cross_entropy.py": {
        "statistics in another order": (
            "cross-entropy",
            "_numbers(needs), loss.dtype",
            "_numbers(needs)[::-1], loss.dtype",
        ),
        "options": (
            "cross-entropy",
            "result, count, loss = _run(operands, options, needs)",
            "result, count, loss = _run(operands, options._replace(z_loss=0.0), needs)",
        ),
    },
    "objective/losses.py": {
        "entropy's gradient": ("given", "with_gradients(loss, (0, _ENTROPY))", "with_gradients(loss, (0,))"),
    },
    "head/plan.py": {
        "scales of pairs": (
            "routed",
            "Routing(rows, scale, self.routing.offsets, dense)",
            "Routing(rows, None, self.routing.offsets, dense)",
        ),
        "gradients that autograd watches": (
            "twice",
            "None if x is None else x.data for x in gradients",
            "x for x in gradients",
        ),
    },
    "step.py": {
        "a plan that keeps its tensors": (
            "saved",
            "ctx.plan = layout.holding(None, None), plan.holding([None] * len(tensors))",
            "ctx.plan = layout.holding(None, None), plan",
        ),
        "gradients given away twice": ("twice", "replace(ctx.plan, ready=None)", "ctx.plan"),
    },
}


def plant(source: str, old: str, new: str, tmp_path, monkeypatch) -> None:
    """The tests' functions from a package with one line of `source` replaced."""
    mutant = mutate(source, old, new, tmp_path)
    if source == "head/logprobs.py":
        for module in (test_operators, logprobs):
            monkeypatch.setattr(module, "linear_logprobs", mutant.linear_logprobs)
        monkeypatch.setattr(logprobs, "token_outputs", mutant.token_outputs)
    elif source == "step_operator.py":
        for name in ("gradients_of", "empty_gradients"):
            monkeypatch.setattr(step_operator, name, getattr(mutant, name))
        copy = mutate("compiled_loss.py", "import annotations", "import annotations  #", tmp_path)
        monkeypatch.setattr(loss, "compiled_loss", copy.compiled_loss)
    elif source == "operators.py":
        monkeypatch.setattr(operators, "with_gradients", mutant.with_gradients)
        copy = mutate("compiled_loss.py", "import annotations", "import annotations  #", tmp_path)
        monkeypatch.setattr(loss, "compiled_loss", copy.compiled_loss)
        copy = mutate("objective/losses.py", "import annotations", "import annotations  #", tmp_path)
        monkeypatch.setattr(test_operators, "grpo_loss", copy.grpo_loss)
    elif source == "compiled_loss.py":
        monkeypatch.setattr(loss, "compiled_loss", mutant.compiled_loss)
    elif source == "cross_entropy.py":
        monkeypatch.setattr(test_operators, "linear_cross_entropy", mutant.linear_cross_entropy)
    elif source == "objective/losses.py":
        monkeypatch.setattr(test_operators, "grpo_loss", mutant.grpo_loss)
    elif source == "head/plan.py":
        monkeypatch.setattr(step, "plan_backward", mutant.plan_backward)
    else:
        monkeypatch.setattr(loss, "attach", mutant.attach)


CASES = {f"{source}: {bug}": (source, *lines) for source, bugs in BUGS.items() for bug, lines in bugs.items()}


@pytest.mark.parametrize("bug", CASES)
def test_bug_is_caught(bug, monkeypatch, tmp_path):
    source, name, old, new = CASES[bug]
    plant(source, old, new, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError, KeyError)):
        CHECKS[name]()


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_bug_it_passes(name):
    CHECKS[name]()
