"""Host syncs, kernel launches, copies and live memory of one call on the stand-in device, by path.

docs/numerics.md and docs/when_it_helps.md quote these numbers.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from cuda_device import LOG

from lad_kernels import LADConfig, linear_grpo_loss, linear_lad_loss, linear_logprobs
from lad_kernels.head import BackwardPlan, Head, dispatch, memory
from lad_kernels.testing import make_inputs

N, D, V = 150, 64, 600
TAIL = LADConfig(tail_mass=1e-3)
LOGPROBS = Counter(_partials_kernel=1, _target_kernel=1, _finalize_kernel=1)  # two passes and routed: the forward
CHOICE = Counter(_token_kernel=1, _mark_kernel=1, _count_kernel=1, _drop_kernel=1, _list_kernel=1)
PAIRS = Counter(items_kernel=1, pairs_kernel=1, weight_kernel=1, hidden_kernel=1, token_kernel=1, _scale_kernel=2)
ONE_PASS = Counter(
    _target_kernel=1, _exponentials_kernel=1, _finalize_kernel=1, _target_columns_kernel=1, _scale_kernel=2
)
DENSE = Counter(_logit_gradient_kernel=1, _target_kernel=1, _target_columns_kernel=1)  # routed: of whole tokens
POLICY, FINISH = Counter(_policy_kernel=1), Counter(_finish_kernel=1)


@pytest.fixture(autouse=True)
def no_garbage():
    gc.collect()  # the interpreter's frames refer to each other, and to tensors


def inputs(dtype: torch.dtype = torch.bfloat16, tokens: int = N):
    x = make_inputs(tokens, D, V, dtype=dtype, entropy=0.5, masked=0.0)
    h, w = (leaf.detach().cuda().requires_grad_() for leaf in (x.hidden, x.weight))  # [N, D], [V, D]
    return h, w, x.targets.cuda()  # [N]


def step(path: str, *, on_policy: bool, mask: bool = True) -> Counter:
    """Launches of a loss and its backward; LOG holds the rest."""
    hidden, weight, targets = inputs()
    old = None if on_policy else torch.full((N,), -1.0, device="cuda")  # [N]
    advantages = torch.arange(N, device="cuda") % 3 - 1.0  # [N]
    given = torch.arange(N, device="cuda") % 5 != 0 if mask else None  # [N]
    LOG.clear()
    with dispatch.force(path):
        out = linear_lad_loss(hidden, weight, targets, old, advantages=advantages, loss_mask=given, config=TAIL)
    out.loss.backward()
    return LOG.launches


def syncs() -> list[tuple[str, str]]:
    """(operation, function) in the order of the first of each kind."""
    return [(operation, line.split()[-1]) for (operation, line), n in LOG.syncs.items() for _ in range(n)]


# Of PyTorch, most of them one kernel each; metrics of the objective and of the head included.
OPERATIONS = {
    ("one_pass", False): 47,
    ("one_pass", True): 59,
    ("two_pass", False): 40,
    ("two_pass", True): 50,
    ("routed", False): 68,
    ("routed", True): 86,
}
MASK, ACTIVE = ("nonzero", "pack"), ("nonzero", "active")
LATER = ("copy to the host", "__init__")


@pytest.mark.parametrize(
    ("path", "on_policy", "launches", "waits"),
    [
        ("one_pass", False, ONE_PASS + POLICY + FINISH, [MASK, LATER]),
        ("one_pass", True, ONE_PASS + POLICY + POLICY + FINISH + LOGPROBS, [MASK, ACTIVE, LATER]),
        ("two_pass", False, LOGPROBS + POLICY + FINISH + DENSE, [MASK, ACTIVE]),
        ("two_pass", True, LOGPROBS + LOGPROBS + POLICY + POLICY + FINISH + DENSE, [MASK, ACTIVE]),
        ("routed", False, LOGPROBS + POLICY + FINISH + CHOICE + PAIRS + DENSE, [MASK, LATER]),
        (
            "routed",
            True,
            LOGPROBS + LOGPROBS + POLICY + POLICY + FINISH + CHOICE + PAIRS + DENSE,
            [MASK, ACTIVE, LATER],
        ),
    ],
)
def test_launches_and_syncs_of_a_step(path, on_policy, launches, waits):
    """On-policy, tokens with c = 0 get log-probs from a forward of their own; nothing is copied to the device."""
    assert step(path, on_policy=on_policy) == launches
    assert sum(LOG.operations.values()) <= OPERATIONS[path, on_policy]
    assert syncs() == waits
    assert not LOG.copies


def test_block_masses_are_gone_when_gradients_are_made(monkeypatch):
    """The budget counts them once: masses have the room of gradients that do not exist yet."""
    masses, alive, make, score = [], [], BackwardPlan.made, Head.forward

    def forward(self, **wanted):
        out = score(self, **wanted)
        masses.extend(weakref.ref(x.inner) for x in [out.block_lse] if x is not None)
        return out

    def made(self, head):
        alive.extend(ref() is not None for ref in masses)
        return make(self, head)

    monkeypatch.setattr(Head, "forward", forward)
    monkeypatch.setattr(BackwardPlan, "made", made)
    step("routed", on_policy=False)
    assert alive == [False]


def test_without_a_mask_nothing_is_read_for_it():
    step("two_pass", on_policy=False, mask=False)
    assert syncs() == [ACTIVE]


def test_log_probs_read_which_gradients_are_zero():
    hidden, weight, targets = inputs()
    LOG.clear()
    linear_logprobs(hidden, weight, targets).logprobs.sum().backward()
    assert syncs() == [ACTIVE]
    assert LOG.launches == LOGPROBS + DENSE


@pytest.mark.parametrize("on_policy", (False, True))
@pytest.mark.parametrize("loss", (linear_lad_loss, linear_grpo_loss, linear_logprobs), ids=lambda f: f.__name__)
def test_a_call_that_can_be_captured_waits_for_nothing(loss, on_policy):
    """Neither does its backward, and nothing is copied between host and device; float32 would be one pass otherwise."""
    hidden, weight, targets = inputs(torch.float32)
    old, advantages = torch.full((N,), -1.0, device="cuda"), torch.arange(N, device="cuda") % 3 - 1.0  # [N], [N]
    given = {}
    if loss is not linear_logprobs:
        bounds = torch.tensor([0, 70, N - 10], dtype=torch.int32, device="cuda")  # [B + 1], padding behind
        given = dict(old_logprobs=None if on_policy else old, advantages=advantages, cu_seqlens=bounds)
    LOG.clear()
    out = loss(hidden, weight, targets, **given, capturable=True)
    out[0].sum().backward()
    assert syncs() == []
    assert sorted(LOG.copies) == []
    assert LOG.launches["_logit_gradient_kernel"] == 1


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_a_call_leaves_its_gradients_and_nothing_else(path):
    hidden, weight, targets = inputs()
    advantages = torch.ones(N, device="cuda")
    before = LOG.allocated
    with dispatch.force(path):
        loss = linear_lad_loss(hidden, weight, targets, advantages=advantages, config=TAIL).loss
    loss.backward()
    del loss
    gc.collect()
    gradients = sum(-(-x.grad.nbytes // 512) * 512 for x in (hidden, weight))
    assert LOG.allocated - before == gradients
    assert LOG.peak - before <= gradients + memory.BUDGET


def test_a_sample_may_hold_targets_outside_the_vocabulary(monkeypatch):
    """Their blocks do not exist, and an index beyond a tensor would end the process on a GPU."""
    monkeypatch.setattr(dispatch, "needs_sample", lambda *_, **__: True)
    hidden, weight, targets = inputs()
    targets[torch.tensor([1, 5], device="cuda")] = torch.tensor([-1000, V + 300], device="cuda")
    old, advantages = torch.full((N,), -1.0, device="cuda"), torch.ones(N, device="cuda")
    logprobs = linear_lad_loss(hidden, weight, targets, old, advantages=advantages, config=TAIL).logprobs.cpu()
    assert (logprobs.isinf().nonzero()[:, 0] == torch.tensor([1, 5])).all()
