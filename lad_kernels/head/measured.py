"""The speeds of this CPU, measured as `cost.Speeds` has them. Nothing but `lad-kernels doctor` asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lad_kernels.head import cost, pytorch
from lad_kernels.head.records import BLOCK, LogitGradient, LogitTransform, Needs, Routing

TOKENS, HIDDEN_SIZE, BLOCKS = 256, 768, 32  # products long enough to run at their rate, a tenth of a second a round
FEW, MANY = 8, 192  # tokens of a block
FIFTH = 1.2  # measured over assumed, or its inverse, from which a speed is worth setting


@torch.no_grad()
def measure(seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter) -> cost.Speeds:
    """Speeds in float32 with the threads in force, each from its fastest of as many rounds as fit; one at least."""
    generator = torch.Generator().manual_seed(0)
    n, d, v = TOKENS, HIDDEN_SIZE, BLOCKS * BLOCK
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d**0.5
    z = torch.zeros(pytorch.TILE_BYTES // (4 * v), v)  # [C, V], a tile as large as the head's
    targets = torch.randint(v, (len(z),), generator=generator)  # [C]
    lse = torch.full((len(z),), 9.0)  # [C]
    gradient = LogitGradient(torch.ones(len(z)), -torch.ones(len(z)))
    source, copy = torch.ones(1 << 22), torch.empty(1 << 22)

    def routed(tokens: int, *, weight_gradient: bool) -> Callable[[], object]:
        """The routed backward with so many tokens in each block."""
        rows = torch.cat([torch.randperm(n, generator=generator)[:tokens].sort().values for _ in range(BLOCKS)])
        routing = Routing(rows, torch.ones(len(rows)), list(range(0, len(rows) + 1, tokens)), rows.new_empty(0))
        part = gradient.select(slice(0, n))
        arguments = (hidden, weight, targets[:n], None, LogitTransform(), lse[:n], part, routing)
        return lambda: pytorch.backward(*arguments, needs=Needs(True, weight_gradient, False))

    def elements() -> None:
        """What forward and backward do with a tile of logits besides products."""
        for _, part in pytorch._by_rows(z):  # [c, V]
            part.sub_(part.amax(1)[:, None])
            pytorch._block_sums(pytorch._exp(part, keep=False)).sum(1)
        pytorch._logit_gradient(z, slice(0, len(z)), 0, targets, lse, gradient)

    work: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(hidden, weight.T, out=z[:n]),
        "elements": elements,
        "copy": lambda: copy.copy_(source),
        "few": routed(FEW, weight_gradient=True),
        "many": routed(MANY, weight_gradient=True),
        "hidden": routed(FEW, weight_gradient=False),
    }
    best, end = dict.fromkeys(work, float("inf")), clock() + seconds
    for warm in (True, False):
        while True:
            for name, run in work.items():
                start = clock()
                run()
                best[name] = best[name] if warm else min(best[name], clock() - start)
            if warm or clock() >= end:
                break
    flops = 2 * n * d * v / best["product"]
    tokens, span = MANY - FEW, best["many"] - best["few"]
    if span <= 0:  # other processes took the time of the few
        tokens, span = MANY, best["many"]
    rate = 6 * d * BLOCK * BLOCKS * tokens / span  # of the routed products
    bytes = 2 * source.nbytes / best["copy"]
    block = best["hidden"] / BLOCKS - 4 * d * BLOCK * FEW / rate  # dW, which is counted apart, comes from new memory
    return cost.Speeds(flops, bytes, best["elements"] / (2 * z.numel()), rate / flops, max(block, 1e-9))


def compare(measured: cost.Speeds, assumed: cost.Speeds) -> tuple[list[tuple[str, str, str]], str | None]:
    """((speed, measured, assumed) each, what to set or None if no speed is off by more than a fifth).

    Only ratios decide between paths, so assumed speeds are scaled to the measured rate of products.
    """
    faster = measured.flops / assumed.flops
    rows = [("products, Gflop/s", f"{measured.flops / 1e9:.3g}", f"{assumed.flops / 1e9:.3g}, the unit of the others")]
    off = []
    for name, unit, title, power in (  # power: of `faster`, with which the assumed speed grows
        ("bytes", 1e-9, "copies, GB/s", 1),
        ("element", 1e9, "outside products, ns a logit", -1),
        ("routed_efficiency", 1.0, "routed products over large ones", 0),
        ("block", 1e3, "routed, ms a block", -1),
    ):
        measured_speed, expected = getattr(measured, name), getattr(assumed, name) * faster**power
        rows.append((title, f"{measured_speed * unit:.3g}", f"{expected * unit:.3g}"))
        if max(measured_speed / expected, expected / measured_speed) > FIFTH:
            off.append(name)
    if not off:
        return rows, None
    line = ",".join(f"{name}={getattr(measured, name):.3g}" for name in cost.CPU_FIELDS)
    advice = f"off by more than a fifth: {', '.join(off)}; if that is so on an idle machine, set"
    return rows, f"{advice} {cost.CPU_SPEEDS}={line}"
