"""What the tests of every adapter share: modules put in place of a framework's, and three checks.

What masked tokens hold has no effect. A loss token whose old or reference log-prob or rollout weight is not finite is
dropped and counted. A NaN of the policy itself is not hidden. TRL's parts are in test_trl_placeholders.py and
test_trl_loss.py.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor


class Stub(ModuleType):
    pass


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of this name with these members, and the packages that hold it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if not isinstance(sys.modules.get(parent), Stub):
            monkeypatch.setitem(sys.modules, parent, Stub(parent))
    module = Stub(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    setattr(sys.modules[parent], parts[-1], module)


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The adapter, imported beside the stubs; forgotten again after the test."""
    monkeypatch.setitem(sys.modules, name, None)  # so that what was there comes back, or nothing
    del sys.modules[name]
    return importlib.import_module(name)


def absent(monkeypatch: pytest.MonkeyPatch, framework: str) -> None:
    """As if this framework was not installed: neither loaded nor found."""

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == framework:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == framework]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])


def close(x: Tensor, expected: Tensor) -> bool:
    return ((x.double() - expected).norm() / expected.norm()).item() < 1e-6


Fill = Callable[[Tensor], Tensor]  # log-probs [...] to placeholders [...]
Found = dict[str, Tensor]  # loss, gradients and metrics by name
# What stands at masked tokens, given the policy's own log-prob there; 95 nats is beyond float32's exp.
PLACEHOLDERS: dict[str, Fill] = {
    "nan": lambda logp: torch.full_like(logp, math.nan),
    "inf": lambda logp: torch.full_like(logp, math.inf),
    "-inf": lambda logp: torch.full_like(logp, -math.inf),
    "1e4": lambda logp: torch.full_like(logp, 1e4),
    "-1e4": lambda logp: torch.full_like(logp, -1e4),
    "95 nats below": lambda logp: logp - 95,
    "95 nats above": lambda logp: logp + 95,
}
MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()  # [B, T]


def batch(mask: Tensor) -> dict[str, Tensor]:
    """logp, old, ref, weights and advantages, each [B, T] like `mask`."""
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(mask.shape, generator=g)
    data = {name: logp + 0.3 * torch.randn(mask.shape, generator=g) for name in ("old", "ref")}
    data["weights"] = 0.5 + torch.rand(mask.shape, generator=g)
    data["advantages"] = torch.randn(len(mask), 1, generator=g).expand(mask.shape).clone()
    return {"logp": logp, **data}


def filled(fill: Fill, *names: str) -> dict[str, Tensor]:
    """The batch of MASK; those of `names` hold placeholders where masked."""
    data = batch(MASK)
    return {n: torch.where(MASK | (n not in names), x, fill(data["logp"])) for n, x in data.items()}


def check_masked_tokens(run: Callable[[Fill], Found]) -> None:
    """Bit by bit, loss, gradients and metrics are those of a batch with harmless values at masked tokens."""
    expected = run(lambda logp: logp - 0.1)
    assert all(x.isfinite().all() for x in expected.values())
    assert any(x.count_nonzero() for n, x in expected.items() if "gradient" in n)
    for name, fill in PLACEHOLDERS.items():
        found = run(fill)
        assert found.keys() == expected.keys()
        assert [n for n in found if not torch.equal(found[n], expected[n])] == [], name


BAD = (math.nan, -math.inf, math.inf)
LOSS_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()  # [B, T]
PLACE = (0, 2)  # one of its eight loss tokens
Result = tuple[Tensor, Tensor, Tensor | float]  # loss [], gradient [B, T], share of dropped tokens
Run = Callable[[dict[str, Tensor], Tensor], Result]  # of a batch and its mask [B, T]


def check_bad_token(run: Run, name: str, bad: float) -> None:
    """Loss and gradient are those of the batch in which the token is masked; the share counts it."""
    data = batch(LOSS_MASK)
    data[name][PLACE] = bad
    loss, gradient, share = run(data, LOSS_MASK)
    without = LOSS_MASK.clone()
    without[PLACE] = False
    expected_loss, expected_gradient, none = run(data, without)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
    assert gradient[PLACE] == 0 and gradient.count_nonzero() >= 2
    assert float(share) == pytest.approx(1 / 8) and none == 0


def check_nan_of_the_policy(run: Run) -> None:
    """It propagates to the loss and to its own gradient, and counts as no dropped token."""
    data = batch(LOSS_MASK)
    data["logp"][PLACE] = math.nan
    loss, gradient, share = run(data, LOSS_MASK)
    assert loss.isnan() and gradient[PLACE].isnan() and share == 0
