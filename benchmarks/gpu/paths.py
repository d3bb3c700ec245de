"""The GPU experiments on the paths of a loss: one pass, routed kernels, routed end to end, its parts.

Flops are those that the package counts where it launches a product (`metrics["head_flops"]`). `of_three_products` is
time over the sum of three bare library products of the shape, so 1 is a forward and backward that costs nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.kernels import library_ms, product_ms
from benchmarks.gpu.run import Run
from benchmarks.gpu.tools import device_times
from benchmarks.harness import sparse
from benchmarks.harness.data import REAL, Batch, fit
from benchmarks.harness.measure import describe, peak_bytes_cuda
from benchmarks.harness.provider import Provider
from benchmarks.harness.shapes import REAL_TOKENS, TINY, Shape
from lad_kernels import LADConfig, LossOutput, lad_loss, linear_lad_loss
from lad_kernels.head import cost, dispatch, memory
from lad_kernels.head.records import (
    BLOCK,
    HeadForward,
    HeadGradients,
    LogitGradient,
    LogitTransform,
    Needs,
    Routing,
)
from lad_kernels.testing import relative_error

if TYPE_CHECKING:
    from lad_kernels.head.kernels.routed.work import RoutedTiles

MIB = 2**20
TRUTH_TOKENS = 4096  # above it float64 takes too long
PLAIN = LogitTransform()
BOTH = {"needs": Needs(True, True, False)}
WAYS = {
    "deterministic": BOTH,
    "atomics": {**BOTH, "atomics": True},
    "dW alone": {"needs": Needs(False, True, False)},
    "dH alone": {"needs": Needs(True, False, False)},
}


def large(run: Run) -> tuple[Shape, ...]:
    """4096 tokens, 16384 tokens, and 16384 of small D."""
    return run.shapes[1:2] if run.dry_run else (run.shapes[0], run.shapes[3], run.shapes[1])


def loss(
    batch: Batch,
    path: str | None,
    *,
    case: str = "off-policy",
    rows: int | None = None,
    return_logprobs: bool = True,
    config: LADConfig = sparse.SPARSE,
) -> LossOutput:
    """`linear_lad_loss` on `path` (None: as the package chooses), with chunks of `rows` tokens in one pass."""
    forced = contextlib.nullcontext() if path is None else dispatch.force(path)
    chunked = contextlib.nullcontext()
    if rows is not None:
        chunked = mock.patch.object(memory.Work, "chunk_rows", return_value=rows)
    old = None if case == "zero groups" else batch.old_logprobs
    with forced, chunked:
        return linear_lad_loss(
            batch.hidden.view(*batch.padded, -1),
            batch.weight,
            batch.targets.view(batch.padded),
            old,
            advantages=batch.advantages,
            config=config,
            return_logprobs=return_logprobs,
            impl="triton",
        )


def gradients(out: LossOutput, batch: Batch) -> tuple[Tensor, ...]:  # [N, D], [V, D]
    return torch.autograd.grad(out.loss, (batch.hidden, batch.weight))


def measure(
    run: Run, shape: Shape, batches: list[Batch], library: float, call: Callable[[Batch], LossOutput]
) -> tuple[dict[str, object], tuple[Tensor, ...]]:
    """(time, flops, memory and bounds of forward and backward, the gradients of the first batch)."""
    out = call(batches[0])
    found = gradients(out, batches[0])
    metrics = {name: out.metrics[name].item() for name in ("kept_share", "head_flops")}
    bounds = {name: out.metrics[name].item() for name in ("dhidden_bound", "dweight_bound")}

    def step(i: int) -> None:
        b = batches[i % len(batches)]
        gradients(call(b), b)

    ms = run.time(step)
    row = {
        "ms": ms,
        "tflops": metrics["head_flops"] / ms[1] / 1e9,
        "of_three_products": ms[1] / library,
        "kept_share": metrics["kept_share"],
        "flops_of_ndv": 2 * metrics["head_flops"] / shape.flops,
    }
    if run.device == "cuda":
        peak = peak_bytes_cuda(Provider("", "lad", lambda b: call(b).loss), batches[0])
        row["beyond_gradients_mib"] = max(peak - batches[0].gradient_bytes, 0) / MIB
    return row | bounds, found


def one_pass(run: Run) -> None:
    """One pass against two, and the rows of its chunks."""
    for shape in large(run):
        library, batches = library_ms(run, shape), run.batches(shape)
        for rows in (None, 32) if run.dry_run else (None, 2048, 4096, 8192, 1024):
            if rows is not None and rows // 2 >= shape.tokens:
                continue  # one chunk already
            path = "two_pass" if rows is None else "one_pass"
            if path not in run.paths:
                continue
            row, _ = measure(run, shape, batches, library, partial(loss, path=path, rows=rows))
            run.add("one pass", shape=str(shape), path=path, rows=rows or "", **row)
            if run.time_left() < 8:
                return
        del batches


def zipf_routing(shape: Shape, share: float, device: str) -> Routing:
    """About `share` of all pairs; the load of the k-th block goes with 1 / k, capped at all tokens, in random order."""
    gen = torch.Generator(device).manual_seed(0)
    blocks = -(-shape.vocab_size // BLOCK)
    frequency = 1 / torch.arange(1, blocks + 1, device=device)  # [blocks]
    low, high = 0.0, float(blocks)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (frequency * middle).clamp(max=1).mean() < share else (low, middle)
    load = (frequency * high).clamp(max=1)[torch.randperm(blocks, generator=gen, device=device)]  # [blocks]
    keep = torch.rand(blocks, shape.tokens, generator=gen, device=device) < load[:, None]  # [blocks, N]
    empty = torch.empty(0, dtype=torch.int64, device=device)  # [0]
    return Routing(keep.nonzero()[:, 1], None, [0, *keep.sum(1).cumsum(0).tolist()], empty)


class RoutedBench:
    """The routed backward at one shape."""

    def __init__(self, run: Run, shape: Shape):
        self.run, self.shape, self.batches = run, shape, run.batches(shape)
        self.library = product_ms(run, self.batches)
        self.lse = [forward(b, want_block_lse=False).lse for b in self.batches]  # [N] each

    def backward(self, i: int, routing: Routing, options: dict) -> HeadGradients:
        b, lse = self.batches[i % len(self.batches)], self.lse[i % len(self.batches)]
        return routed_backward(b, lse, LogitGradient(b.upstream, -b.upstream), routing, options)

    def add(self, table: str, routing: Routing, options: dict, **labels: object) -> None:
        """Time and rate; `of_library_rate` is what `routed_efficiency` of cost.SPEEDS stands for."""
        pairs = routing.offsets[-1]
        products = 1 + sum(options["needs"])
        try:
            ms = self.run.time(lambda i: self.backward(i, routing, options))
        except Exception as problem:  # a tile the device refuses is a result
            self.run.add(table, shape=str(self.shape), **labels, pairs=pairs, ms=None, note=describe(problem))
            return
        tflops = products * 2 * BLOCK * self.shape.hidden_size * pairs / ms[1] / 1e9
        library = self.shape.flops / self.library / 1e9
        self.run.add(
            table, shape=str(self.shape), **labels, pairs=pairs, ms=ms, tflops=tflops, of_library_rate=tflops / library
        )


def forward(batch: Batch, *, want_block_lse: bool) -> HeadForward:
    from lad_kernels.head.kernels import forward as kernels

    return kernels.forward(
        batch.hidden, batch.weight, batch.targets, None, PLAIN, want_entropy=False, want_block_lse=want_block_lse
    )


def routed_backward(
    batch: Batch, lse: Tensor, gradient: LogitGradient, routing: Routing, options: dict
) -> HeadGradients:
    from lad_kernels.head.kernels.routed import launch as kernels

    return kernels.backward(batch.hidden, batch.weight, batch.targets, None, PLAIN, lse, gradient, routing, **options)


def routed_kernels(run: Run) -> None:
    """The routed backward alone, at shares and skew that are planted; then its tiles at a share of 2 %."""
    shapes = run.shapes[: 1 if run.dry_run else 2]
    for shape in shapes:
        bench = RoutedBench(run, shape)
        for share in (0.3,) if run.dry_run else (0.02, 0.005, 0.01, 0.05, 0.15):
            routing = zipf_routing(shape, share, run.device)
            for way, options in WAYS.items():
                if share in (0.02, 0.3) or way in ("deterministic", "atomics"):
                    bench.add("routed kernels", routing, options, share=share, way=way)
            if run.time_left() < 6:
                return
    for shape in shapes:
        bench = RoutedBench(run, shape)
        routing = zipf_routing(shape, 0.3 if run.dry_run else 0.02, run.device)
        truth = bench.backward(0, routing, BOTH)
        for tiles in routed_tiles(run.dry_run):
            options = {**BOTH, "tiles": tiles}
            try:
                off = [relative_error(x, y) for x, y in zip(bench.backward(0, routing, options)[:2], truth[:2])]
            except Exception as problem:  # a tile the device refuses is a result
                off = [describe(problem)]
            bench.add("routed tiles", routing, options, tiles=repr(tiles), off_the_table=off)
            if run.time_left() < 6:
                return


def routed_tiles(dry_run: bool) -> list[RoutedTiles]:
    """The table's row, then one thing changed at a time, most promising first."""
    from lad_kernels.head.kernels.routed.work import RoutedTiles, Schedule

    base = RoutedTiles(64, Schedule(64, 4, 3), Schedule(128, 8, 3), Schedule(128, 4, 1))
    if dry_run:
        return [base, RoutedTiles(128, Schedule(64, 8, 2), Schedule(64, 8, 2), Schedule(64, 8, 1))]
    wide = RoutedTiles(128, Schedule(64, 8, 3), Schedule(128, 8, 3), Schedule(128, 8, 1))
    return [
        base,
        wide,
        replace(wide, weight=Schedule(256, 8, 3)),
        replace(base, pairs=Schedule(64, 4, 4)),
        replace(base, weight=Schedule(128, 4, 3)),
        replace(base, weight=Schedule(256, 8, 3)),
        replace(base, hidden=Schedule(128, 8, 1)),
        replace(base, hidden=Schedule(64, 4, 2)),
        replace(base, pairs=Schedule(128, 4, 3)),
        replace(base, weight=Schedule(128, 8, 2)),
        replace(wide, pairs=Schedule(64, 4, 3)),
    ]


def routed_cases(run: Run) -> list[tuple[Shape, str, str]]:
    """(shape, data, case), most telling first."""
    first, *others = large(run)
    zero, off = "zero groups", "off-policy"
    if run.dry_run:
        return [(first, "peaked", zero), (first, "real, T=0.6", off)]
    return [
        (first, "peaked", off),
        *((sparse.SHAPES["gpu"], data, off) for data in REAL if REAL[data][0] == "smollm2"),
        (REAL_TOKENS["gpu"], "real, T=0.6", off),
        (sparse.SHAPES["gpu"], "peaked", zero),
        (first, "flat", off),
        *((shape, "peaked", off) for shape in others),
        (sparse.SHAPES["gpu"], "flat", zero),
        *((shape, "flat", off) for shape in others),
    ]


def routed_entries(case: str, paths: list[str], *, exact: bool) -> dict[str, dict]:
    """{name: options of `loss`}; the two tails are compared where the error is known."""
    found: dict[str, dict] = {"as chosen": {"path": None}}
    found |= {path: {"path": path} for path in paths[::-1]}
    if exact and "routed" in paths:
        found["routed, tail dropped"] = {"path": "routed", "config": replace(sparse.SPARSE, tail="drop")}
    if case == "zero groups":
        found["as chosen, no log-probs"] = {"path": None, "return_logprobs": False}
    return found


def routed(run: Run) -> None:
    """Every path of `linear_lad_loss`, and what routing leaves out: error beside bound, where float64 can tell.

    The bounds are those of what is dropped; rounding to 16 bits, the error of the two passes, comes on top.
    """
    for shape, data, case in routed_cases(run):
        if run.time_left() < 12:
            return
        if not run.has(data):
            continue
        shape = fit(shape, data)
        library, batches = library_ms(run, shape), run.batches(shape, data)
        if case == "zero groups":
            for b in batches:
                b.advantages[: shape.sequences * sparse.ZERO // 32] = 0
        true = sparse.truth(batches[0], case) if shape.tokens <= TRUTH_TOKENS else None
        for name, options in routed_entries(case, run.paths, exact=true is not None).items():
            row, found = measure(run, shape, batches, library, partial(loss, case=case, **options))
            if true is not None:
                row |= {f"error {k}": e for k, e in sparse.errors(*found, *true, batches[0].targets).items()}
            run.add("routed", shape=str(shape), data=data, case=case, path=name, **row)
            del found
            if run.time_left() < 8:
                return
        del batches, true


def step_parts(run: Run) -> None:
    """What a routed call on peaked data spends its time on; the smallest call shows what launching costs."""
    from lad_kernels.head.routing import route

    shape, batches, small = run.shapes[0], run.batches(run.shapes[0], "peaked"), run.batches(TINY[0], "peaked")
    outs = [forward(b, want_block_lse=True) for b in batches]

    def objective(i: int) -> LogitGradient:
        b, out = batches[i % len(batches)], outs[i % len(batches)]
        logprobs = out.logprobs.view(b.padded).requires_grad_()  # [B, T]
        value = lad_loss(logprobs, b.old_logprobs, b.advantages, config=sparse.SPARSE, impl="triton").loss
        c = torch.autograd.grad(value, logprobs)[0].flatten()  # [N]
        return LogitGradient(c, -c)

    @torch.no_grad()
    def choose(i: int) -> Routing:
        b, out = batches[i % len(batches)], outs[i % len(batches)]
        work = memory.Work(*b.hidden.shape, len(b.weight), 2, cost.architecture(b.hidden.device, True))
        return route(
            b.hidden, b.weight, b.targets, PLAIN, out.lse, out.logprobs, out.block_lse, gradient, sparse.TAIL_MASS,
            dense_share=cost.dense_share(work), unbiased=sparse.SPARSE.tail == "unbiased", triton=True,
        )[0]  # fmt: skip

    def backward(i: int, options: dict) -> HeadGradients:
        return routed_backward(batches[i % len(batches)], outs[i % len(batches)].lse, gradient, routing, options)

    def whole(i: int, of: list[Batch]) -> None:
        b = of[i % len(of)]
        gradients(loss(b, "routed"), b)

    gradient = objective(0)
    routing = choose(0)
    blocks = routing.blocks
    kept = (routing.offsets[-1] + len(routing.dense) * blocks) / (shape.tokens * blocks)
    parts: dict[str, Callable[[int], object]] = {
        "whole call": partial(whole, of=batches),
        "forward with block masses": lambda i: forward(batches[i % len(batches)], want_block_lse=True),
        "forward without": lambda i: forward(batches[i % len(batches)], want_block_lse=False),
        "route": choose,
        **{f"routed backward, {way}": partial(backward, options=options) for way, options in WAYS.items()},
        "objective": objective,
        f"whole call, {TINY[0].tokens} tokens, D={TINY[0].hidden_size}": partial(whole, of=small),
    }
    total = None
    for part, function in parts.items():
        ms = run.time(function, repeats=10)
        total, busy = total or ms[1], {}
        if run.device == "cuda":  # `ms` over what the device worked is the share of waiting for the host
            times = device_times(partial(function, 0))
            busy = {"device_ms": sum(t.ms for t in times.values()), "launches": sum(t.calls for t in times.values())}
        run.add(
            "step parts",
            shape=str(shape),
            part=part,
            ms=ms,
            of_whole_call=ms[1] / total,
            kept_share=kept,
            dense_tokens=len(routing.dense),
            **busy,
        )


EXPERIMENTS: dict[str, Callable[[Run], None]] = {f.__name__: f for f in (one_pass, routed_kernels, routed, step_parts)}
