"""The GPU experiments on single kernels, next to bare products of the library: tiles, workspaces, one pass.

TFLOP/s count 2 N D V per product that the path launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.run import Run
from benchmarks.harness.data import Batch
from benchmarks.harness.measure import describe
from benchmarks.harness.shapes import Shape

MIB = 2**20


def rate(flops: float, milliseconds: list[float]) -> float:
    """TFLOP/s at the median."""
    return flops / milliseconds[1] / 1e9


def ceilings(run: Run) -> None:
    """What the library and the memory of this device reach."""
    side, buffer = (64, 1 << 16) if run.dry_run else (8192, 4 << 30)
    squares = [torch.randn(side, side, device=run.device).bfloat16() for _ in range(4)]
    ms = run.time(lambda i: squares[i % 2] @ squares[2 + i % 2])
    run.add("ceilings", what=f"bf16 product {side}^3", ms=ms, tflops=rate(2 * side**3, ms), gb_per_s=None)
    source, target = (torch.randint(0, 255, (buffer,), dtype=torch.uint8, device=run.device) for _ in range(2))
    ms = run.time(lambda i: target.copy_(source))
    run.add("ceilings", what=f"copy of {buffer / MIB:.3g} MiB", ms=ms, tflops=None, gb_per_s=2 * buffer / ms[1] / 1e6)
    for shape in run.shapes:
        for what, ms in three_products(run, shape).items():
            run.add("ceilings", what=f"{what}, {shape}", ms=ms, tflops=rate(shape.flops, ms), gb_per_s=None)
        if run.time_left() < 8:
            return


def three_products(run: Run, shape: Shape, repeats: int | None = None) -> dict[str, list[float]]:
    """Bare library products of a head's forward and backward."""
    n, d, v = shape.tokens, shape.hidden_size, shape.vocab_size
    hidden = [torch.randn(n, d, device=run.device).bfloat16() for _ in range(2)]  # [N, D]
    weight = [torch.randn(v, d, device=run.device).bfloat16() for _ in range(2)]  # [V, D]
    dz = torch.randn(n, v, device=run.device, dtype=torch.bfloat16)  # [N, V]
    found = {
        "logits = h W^T": run.time(lambda i: hidden[i % 2] @ weight[i % 2].T, repeats),
        "dH = dZ W": run.time(lambda i: dz @ weight[i % 2], repeats),
        "dW = dZ^T h": run.time(lambda i: dz.T @ hidden[i % 2], repeats),
    }
    if run.device == "cuda":
        mixed = {"out_dtype": torch.float32}
        found["logits, fp32 output"] = run.time(lambda i: torch.mm(hidden[i % 2], weight[i % 2].T, **mixed), repeats)
    return found


def library_ms(run: Run, shape: Shape) -> float:
    """The sum of the three bare library products of a head's forward and backward."""
    return sum(ms[1] for what, ms in three_products(run, shape, repeats=10).items() if "fp32" not in what)


@torch.no_grad()
def product_ms(run: Run, batches: list[Batch]) -> float:
    """One bare library product of the shape."""
    return run.time(lambda i: batches[i % len(batches)].hidden @ batches[0].weight.T)[1]


def forward_tiles(run: Run) -> None:
    """Tile shapes of the forward; all at the first shape, then the best three at the others and with entropy."""
    from lad_kernels.head.kernels import forward
    from lad_kernels.head.records import LogitTransform

    def measure(shape: Shape, batches: list[Batch], tiles, entropy: bool) -> float:
        def call(i: int):
            b = batches[i % len(batches)]
            return forward.forward(
                b.hidden,
                b.weight,
                b.targets,
                None,
                LogitTransform(),
                want_entropy=entropy,
                want_block_lse=True,
                tiles=tiles,
            )

        name = "table's choice" if tiles is None else repr(tiles)
        try:
            error = (call(0).lse[: len(truth)] - truth).abs().max().item()
            ms = run.time(call)
        except Exception as problem:  # a tile the device refuses is a result
            run.add("forward tiles", shape=str(shape), tiles=name, entropy=entropy, ms=None, note=describe(problem))
            return float("inf")
        run.add(
            "forward tiles",
            shape=str(shape),
            tiles=name,
            entropy=entropy,
            ms=ms,
            tflops=rate(shape.flops, ms),
            of_library_product=product / ms[1],
            lse_difference=error,
        )
        return ms[1]

    first, *others = run.shapes[:2] if run.dry_run else run.shapes[:5]
    batches = run.batches(first)
    product, truth = product_ms(run, batches), lse(batches[0])
    found = {tiles: measure(first, batches, tiles, False) for tiles in (None, *tile_variants(run.dry_run))}
    best = sorted(found, key=found.get)[: 1 if run.dry_run else 3]
    for tiles in best:
        measure(first, batches, tiles, True)
    for shape in others:
        if run.time_left() < 8:
            return
        del batches
        batches = run.batches(shape)
        product, truth = product_ms(run, batches), lse(batches[0])
        for tiles in dict.fromkeys((None, *best)):
            measure(shape, batches, tiles, False)


@torch.no_grad()
def lse(batch: Batch) -> Tensor:  # [1024] or [N]
    """Log-sum-exp of the first rows in float32, the check that a tile shape computes at all."""
    chunks = batch.hidden[:1024].split(256)
    return torch.cat([(h.float() @ batch.weight.float().T).logsumexp(1) for h in chunks])


def tile_variants(dry_run: bool) -> list:
    """Most promising first, so that a cut costs the least."""
    from lad_kernels.head.kernels.tile_table import Tiles

    if dry_run:
        return [Tiles(64, 128, 32, 8, 8, 2), Tiles(128, 256, 64, 8, 8, 3, tma=True)]
    base = Tiles(128, 256, 64, 8, 8, 3, tma=True)
    small = Tiles(128, 128, 64, 8, 4, 3, tma=True)
    return [
        base,
        replace(base, stages=4),
        replace(base, group_n=16),
        replace(base, group_n=4),
        small,
        replace(small, stages=4),
        Tiles(256, 128, 64, 8, 8, 3, tma=True),
        Tiles(128, 256, 32, 8, 8, 4, tma=True),
        replace(base, tma=False),
        replace(small, warps=8),
        Tiles(128, 128, 128, 8, 8, 2, tma=True),
        Tiles(64, 256, 64, 8, 4, 4, tma=True),
    ]


def slabs(run: Run) -> None:
    """The two-pass backward against its workspace."""
    from lad_kernels.head.kernels import dense, forward
    from lad_kernels.head.records import LogitGradient, LogitTransform, Needs

    plain = LogitTransform()
    for shape in run.shapes[:2] if run.dry_run else (run.shapes[0], run.shapes[3], run.shapes[1]):
        batches = run.batches(shape)
        outs = [
            forward.forward(b.hidden, b.weight, b.targets, None, plain, want_entropy=False, want_block_lse=False)
            for b in batches
        ]
        for mib in (1, 64) if run.dry_run else (512, 256, 1024, 2048, 128):

            def call(i: int, mib: int = mib, batches: list[Batch] = batches, outs: list = outs):
                b, out = batches[i % len(batches)], outs[i % len(batches)]
                return dense.backward(
                    b.hidden,
                    b.weight,
                    b.targets,
                    None,
                    plain,
                    out.lse,
                    LogitGradient(b.upstream, -b.upstream),
                    needs=Needs(True, True, False),
                    workspace_bytes=mib * MIB,
                )

            ms = run.time(call)
            run.add("slabs", shape=str(shape), workspace_mib=mib, ms=ms, tflops=rate(3 * shape.flops, ms))
            if run.time_left() < 6:
                return


def single_pass(run: Run) -> None:
    """Coefficients known in advance, rows in chunks: three library products and row operations, dW in float32."""
    for shape in run.shapes[:1] if run.dry_run else (run.shapes[0], run.shapes[3], run.shapes[1]):
        batches = run.batches(shape)
        for rows in (32, 64) if run.dry_run else (4096, 2048, 8192, 1024):

            def call(i: int, rows: int = rows, batches: list[Batch] = batches):
                return single_pass_step(batches[i % len(batches)], rows)

            ms = run.time(call)
            run.add("single pass", shape=str(shape), rows=rows, ms=ms, tflops=rate(3 * shape.flops, ms))
            if run.time_left() < 6:
                return


@torch.no_grad()
def single_pass_step(batch: Batch, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs [N], dH [N, D], dW [V, D]) with the upstream gradient at hand in the forward."""
    mixed = {"out_dtype": torch.float32} if batch.hidden.is_cuda else {}
    dw = torch.zeros(batch.weight.shape, dtype=torch.float32, device=batch.weight.device)  # [V, D]
    dh, logprobs = torch.empty_like(batch.hidden), torch.empty_like(batch.upstream)
    for start in range(0, len(batch.hidden), rows):
        chunk = slice(start, start + rows)
        h, y, c = batch.hidden[chunk], batch.targets[chunk, None], batch.upstream[chunk, None]  # [C, D], [C, 1], [C, 1]
        log_p = torch.mm(h, batch.weight.T, **mixed).float().log_softmax(-1)  # [C, V]
        logprobs[chunk] = log_p.gather(1, y)[:, 0]
        dz = log_p.exp_().mul_(-c).scatter_add_(1, y, c).to(h.dtype)  # [C, V]
        torch.mm(dz, batch.weight, out=dh[chunk])
        if mixed:
            torch.addmm(dw, dz.T, h, out=dw, **mixed)
        else:
            dw.addmm_(dz.float().T, h.float())
    return logprobs, dh, dw.to(batch.weight.dtype)


EXPERIMENTS: dict[str, Callable[[Run], None]] = {f.__name__: f for f in (ceilings, forward_tiles, slabs, single_pass)}
