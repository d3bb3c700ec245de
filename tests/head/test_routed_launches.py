"""How many kernels and torch operations a routed backward launches: a few, and a few for each run, slice and slab."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import pytest
from test_routed_kernels import NEEDS, coefficients, inputs_of, route
from torch.utils._python_dispatch import TorchDispatchMode

from lad_kernels.head.kernels import dense, forward, target_columns
from lad_kernels.head.kernels.routed import launch as routed
from lad_kernels.head.kernels.routed import runs, work


class Operations(TorchDispatchMode):
    """How often the routed backward asks for work on the device; its kernels and the library's products do none."""

    FREE = ("alias", "as_strided", "detach", "empty", "lift_fresh", "new_empty", "select", "slice", "t", "unbind",
            "unsqueeze", "view")  # fmt: skip
    KERNELS = (
        *((runs, name) for name in ("pairs", "weight", "bias", "hidden", "token")),
        (work, "items"),
        *((dense, "_logit_gradient"), (forward, "_target"), (target_columns, "_target_columns")),
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.torch, self.kernels = Counter(), Counter()
        for module, name in self.KERNELS:
            monkeypatch.setattr(module, f"{name}_kernel", self.counted(name))
        monkeypatch.setattr(dense, "accumulate", lambda *_, **__: self.kernels.update(["library"]))

    def counted(self, name):
        return defaultdict(lambda: lambda *_, **__: self.kernels.update([name]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.torch[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    def operations(self) -> int:
        return sum(count for name, count in self.torch.items() if name not in self.FREE)


WHOLE = dict(_logit_gradient=1, _target=1, _target_columns=1)
LAUNCHES = {  # workspace, share of dense tokens, JOINT: launches by kernel, torch operations, six of them on the host
    "one run": (1 << 30, 0.0, 0, {}, 16),
    "one run, two slices of D": (101_000, 0.0, 0, dict(hidden=2, token=2), 16),
    "three runs": (60_000, 0.0, 0, dict(pairs=3, weight=3, hidden=6, token=6), 18),
    "dense tokens": (1 << 30, 0.2, 99, WHOLE | dict(library=1), 23),
    "dense tokens in two slabs": (
        60_000,
        0.9,
        99,
        WHOLE | dict(weight=2, _logit_gradient=2, _target_columns=2, library=2),
        23,
    ),
    "many dense tokens": (1 << 30, 0.2, 0, WHOLE | dict(library=2), 23),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches(device, case, monkeypatch):
    workspace, dense_share, joint, kernels, operations = LAUNCHES[case]
    monkeypatch.setattr(routed, "JOINT", joint)
    inputs = dataclasses.replace(inputs_of(device, "bfloat16", n=48, d=512, v=1100), bias=None)
    routing, (lse, gradient) = route(inputs, 0.4, dense_share, scaled=True), coefficients(inputs)
    gradient = dataclasses.replace(gradient, entropy=None)
    with Operations(monkeypatch) as met:
        routed.backward(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            None,
            inputs.transform,
            lse,
            gradient,
            routing,
            needs=NEEDS,
            workspace_bytes=workspace,
        )
    print(case, len(routing.rows), len(routing.dense), met.operations(), met.kernels, met.torch)
    assert met.kernels == dict.fromkeys(("items", "pairs", "weight", "hidden", "token"), 1) | kernels
    assert met.operations() <= operations + 2 * (device == "cuda")  # copies to the device
