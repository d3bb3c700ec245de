"""What torch.compile must not let through: values that only the running program knows, and lost gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lad_kernels
from lad_kernels import checks, linear_policy_loss
from lad_kernels.testing import FP32_TOLERANCE, relative_error

N, D, V = 12, 8, 50
MASK = torch.arange(N) % 3 != 0  # [N]
OWN = torch.tensor(0.7, requires_grad=True)
BACKENDS = ("eager", "aot_eager")  # the operators themselves, and what AOTAutograd makes of them


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=gen), torch.randn(V, D, generator=gen)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=gen)


def own(objective, **head):
    """A compiled step of `objective`, with its backward."""

    def run(backend: str):
        hidden, weight, targets = batch()

        @torch.compile(backend=backend, fullgraph=True, dynamic=True)
        def step(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_policy_loss(hidden, weight, targets, objective, **head).loss

        OWN.grad = None
        loss = step(hidden, weight)
        loss.backward()
        return loss, hidden.grad, weight.grad, OWN.grad

    return run


def other(function: str, *arguments, **options):
    """A compiled call of another public function; its temperature or weights are made inside the graph."""

    def run(backend: str):
        hidden, weight, targets = batch()
        call = getattr(lad_kernels, function)
        constants = {name: x for name, x in options.items() if not callable(x)}
        made = {name: x for name, x in options.items() if callable(x)}

        @torch.compile(backend=backend, fullgraph=True, dynamic=True)
        def step(hidden: Tensor, weight: Tensor):
            given = constants | {name: x(OWN) for name, x in made.items()}
            out = call(hidden, weight, targets, *arguments, **given)
            return out if isinstance(out, Tensor) else out.logprobs

        step(hidden, weight).sum().backward()

    return run


def root(x: Tensor) -> Tensor:  # [N]
    """0, with a gradient of NaN at position 4."""
    return (x - x.detach())[4].abs().sqrt()


OLD = torch.full((N,), -3.0)
SIGNAL = {"advantages": torch.ones(N), "loss_mask": MASK}
NAN_GRADIENT = r"objective: expected a loss and a gradient that are numbers, got NaN at position 4 of target_ids"
REFUSED = {
    "NaN loss": (own(lambda x, _, t: x.sum() + torch.tensor(torch.nan)), r"objective: .* got NaN in the loss"),
    "NaN loss of no token": (own(lambda x, _, t: x.mean(), loss_mask=torch.zeros(N)), r"objective: .* NaN in the loss"),
    "NaN gradient": (own(lambda x, _, t: x.sum() + root(x)), NAN_GRADIENT),
    "NaN gradient of the entropy": (
        own(lambda x, e, t: x.sum() + root(e), return_entropy=True),
        NAN_GRADIENT,
    ),
    "no scalar": (own(lambda x, _, t: x), r"objective: expected a scalar floating loss on cpu"),
    "no tensor": (own(lambda x, _, t: (x.sum(), 3)), r"objective: expected it to return a scalar loss"),
    "detached": (own(lambda x, _, t: x.detach().sum()), r"objective: expected a loss that depends on the log-probs"),
    "detached, with a parameter": (
        own(lambda x, _, t: (OWN * x.detach()).sum()),
        r"objective: expected a loss that depends on the log-probs",
    ),
    "no function": (own(3), r"objective: expected a function"),
    "a backward that there is not": (
        own(lambda x, _, t: x.sum(), backward="both"),
        r"backward: expected one of 'auto'",
    ),
    "a tail that there is not": (own(lambda x, _, t: x.sum(), tail="cut"), r"tail: expected one of 'unbiased'"),
    "a negative tail mass": (own(lambda x, _, t: x.sum(), tail_mass=-1.0), r"tail_mass: expected a finite number >= 0"),
    "fractional mask": (own(lambda x, _, t: x.sum(), loss_mask=MASK * 0.5), r"loss_mask: expected zeros and ones"),
    "falling bounds": (
        own(lambda x, _, t: x.sum(), cu_seqlens=torch.tensor([0, 9, 5])),
        r"cu_seqlens: expected to rise from 0",
    ),
    "negative weights": (
        other("linear_cross_entropy", reduction="none", token_weights=-torch.ones(N)),
        r"token_weights: expected finite factors >= 0",
    ),
    "weights with a gradient, by token": (
        other("linear_cross_entropy", reduction="none", token_weights=lambda own: own.expand(N)),
        r"token_weights: expected a constant",
    ),
    "weights with a gradient": (
        other("linear_cross_entropy", token_weights=lambda own: own.expand(N)),
        r"token_weights: expected a constant",
    ),
} | {
    f"{function}: temperature with a gradient": (
        other(function, *more, temperature=lambda own: own.exp(), **options),
        r"temperature: expected a constant",
    )
    for function, more, options in (
        ("linear_logprobs", (), {}),
        ("linear_lad_loss", (OLD,), SIGNAL),
        ("linear_grpo_loss", (OLD,), SIGNAL),
        ("linear_cross_entropy", (), {}),
        ("linear_policy_loss", (lambda x, _, t: x.sum(),), {}),
    )
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_refused(name, backend):
    run, message = REFUSED[name]
    with pytest.raises(Exception, match=message):
        run(backend)


def mean(x: Tensor, _, tokens) -> Tensor:  # [m]
    return -(OWN * x * (1 + tokens.positions)).mean()


def total(x: Tensor, _, tokens) -> Tensor:  # [m]
    return -(OWN * x * (1 + tokens.positions)).sum() / N


@pytest.fixture
def validated(monkeypatch):
    monkeypatch.setattr(checks, "_always_read_values", True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", (False, True))
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_claim_of_separability_is_checked_where_values_are(validated, backend, masked):
    head = {"separable": True} | ({"loss_mask": MASK} if masked else {})
    with pytest.raises(Exception, match=r"separable: expected a loss that is a sum of one term per token"):
        own(mean, **head)(backend)
    for ours, unchecked in zip(own(total, **head)(backend), own(total, **head | {"separable": False})(backend)):
        assert torch.equal(ours, unchecked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_the_head_is_passed_on(backend):
    """A NaN in a hidden state is in the loss and the gradient, and no fault of the objective."""
    hidden, weight, targets = batch()

    @torch.compile(backend=backend, fullgraph=True)
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, targets, lambda x, _, t: x.exp().sum()).loss

    poisoned = hidden.detach().clone()
    poisoned[3] = torch.nan
    loss = step(poisoned.requires_grad_(), weight)
    loss.backward()
    assert loss.isnan() and poisoned.grad[3].isnan().all() and poisoned.grad[4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_model_trains_the_objective(backend):
    hidden, weight, targets = batch()

    @torch.compile(backend=backend, fullgraph=True)
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, targets, total).loss

    OWN.grad = None
    loss = step(hidden.detach(), weight.detach())
    loss.backward()
    torch.testing.assert_close(OWN.grad, loss.detach() / OWN.detach())


def broken(x: Tensor, _, tokens) -> Tensor:  # [m]
    half = OWN * x.exp()
    torch._dynamo.graph_break()
    return (half * (1 + tokens.positions)).sum()


@pytest.mark.parametrize("backend", (*BACKENDS, "inductor"))
@pytest.mark.parametrize("objective", (total, broken))
@pytest.mark.parametrize("masked", (False, True))
def test_values_are_those_of_eager_mode(masked, objective, backend):
    """Also where the graph breaks: in the objective, or at a mask, of which Dynamo by default does not know the sum."""
    hidden, weight, targets = batch()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, targets, objective, loss_mask=MASK if masked else None).loss

    found = []
    for call in (torch.compile(step, backend=backend), step):
        loss = call(hidden, weight)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight, OWN))))
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs.double()) <= (FP32_TOLERANCE if backend == "inductor" else 0)


def operators() -> dict[str, tuple]:
    """Arguments of each operator; the loss has no graph, of which its operator would want to know what it reaches."""
    gen = torch.Generator().manual_seed(1)
    x, positions = torch.randn(N, generator=gen), torch.arange(N)  # [N], [N]
    return {
        "tokens_that_count": (positions, MASK, torch.tensor([0, 5, N - 1], dtype=torch.int32)),
        "objective_input": (x.clone().requires_grad_(), positions),
        "objective_gradient": (x, x, positions),
        "objective_loss": (x.sum(), x, positions, x, x[::2], x[1::2]),
        "token_weights": (x.abs(), positions, MASK),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    found = torch.library.opcheck(getattr(torch.ops.lad_kernels, name).default, operators()[name])
    assert set(found.values()) == {"SUCCESS"}
