"""The head in chunked PyTorch, for CPU, MPS and anything without Triton: logits exist one tile at a time.

The vocabulary is cut into slabs and the tokens into chunks; one tile of logits is at most TILE_BYTES, whatever N and
V are. Slabs are the outer loop, so a slab of a 16-bit weight is widened once, and each slab of dW is finished before
the next begins: written once, deterministic.

    forward    per slab and chunk: z = transform(h W^T + b); running maximum, sum of exponentials and (for the
               entropy) sum of e^(z - max) (z - max), rescaled where the maximum moves                       2 N D V
    backward   per slab and chunk: z again, p = e^(z - lse), dZ, then dW += dZ^T h and dH += dZ W            6 N D V
    routed     the same for active (token, block) pairs alone, whose tokens are gathered by the slab         6 D BLOCK P
    one pass   whole rows of a chunk: z, lse, c, then dH and dW at once, when c is known inside the chunk     6 N D V

Arithmetic is float32 (float64 for float64 inputs) throughout: 16-bit operands are widened before each product, which
is exact; each gradient is rounded once, when it is written. Not used: 16-bit matrix units (the Triton path has them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.pytorch_runs import Runs
from lad_kernels.head.records import (
    BLOCK,
    GradientSums,
    HeadForward,
    HeadGradients,
    LogitGradient,
    LogitTransform,
    Needs,
    Routing,
    gather,
    scatter,
)

TILE_BYTES = 16 << 20  # one tile of logits; at most three such tiles exist at a time
MAX_CHUNK = 2048  # tokens of a tile
CACHE_BYTES = 1 << 20  # of a tile, for each thread: between its products a few rows at a time stay in a core's cache
FEW_DENSE = 32  # tokens whose own products do not pay: they read W twice and write dW once more (docs/LOG.md)
# What lies below e to this power counts as 0. CPUs take 10 to 100 times longer over exponentials and products that
# underflow, so the smallest probability times a coefficient and an entry of W or H has to stay above 1.2e-38 (float32):
# e^-64 = 1.6e-28 does for factors from 1e-10 up. Next to a sum of at least 1 it is nothing: its rounding is 6e-8.
LOWEST = {torch.float32: -64.0, torch.float64: -685.0}


def _tiles(tokens: int, vocabulary: int, item: int) -> tuple[list[slice], list[slice]]:
    """(vocabulary slabs of whole blocks, token chunks) whose product fits in TILE_BYTES."""
    chunk = max(1, min(tokens, MAX_CHUNK, TILE_BYTES // (item * BLOCK)))
    slab = max(1, TILE_BYTES // (item * chunk * BLOCK)) * BLOCK
    cut = lambda total, step: [slice(i, min(i + step, total)) for i in range(0, total, step)]  # noqa: E731
    return cut(vocabulary, slab), cut(tokens, chunk)


class _Logits:
    """Logits of one tile at a time, and their derivative with respect to the pre-transform logits h W^T + b."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform):
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.weight, self.bias, self.transform = hidden.to(self.dtype), weight, bias, transform
        t = transform.temperature
        self.inverse_temperature = (1 / t.to(self.dtype))[:, None] if isinstance(t, Tensor) else 1 / t  # [N, 1]
        self.slabs, self.chunks = _tiles(len(hidden), len(weight), self.dtype.itemsize)
        self.reserve(*(max((s.stop - s.start for s in x[:1]), default=0) for x in (self.chunks, self.slabs)))

    def reserve(self, tokens: int, columns: int) -> None:
        """Allocate the memory of one tile, which all tiles reuse."""
        self._memory = self.hidden.new_empty(max(tokens * columns, BLOCK * min(len(self.hidden), MAX_CHUNK)))

    def slab(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Weight [Vs, D] and bias [Vs] of a slab, widened."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.dtype), bias

    def _per_row(self, rows: slice | Tensor) -> Tensor | float:
        t = self.inverse_temperature
        return t[rows] if isinstance(t, Tensor) else t

    def tile(self, rows: slice | Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z [C, Vs], valid until the next tile, and tanh [C, Vs] of the softcap if there is one."""
        return self.tiles(rows, [self.hidden[rows]], [(w, b)])

    def tiles(
        self, rows: slice | Tensor, hidden: Sequence[Tensor], operands: Sequence[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """`tile` where each part of the C hidden states [c, D] has its own w [Vs, D] and b [Vs]."""
        sizes, width = [len(h) for h in hidden], len(operands[0][0])
        z = self._memory[: sum(sizes) * width].view(-1, width)  # [C, Vs]
        for h, part, (w, b) in zip(hidden, z.split(sizes), operands):
            torch.mm(h, w.T, out=part) if b is None else torch.addmm(b, h, w.T, out=part)
        flops.product(len(z), self.hidden.shape[1], width)
        if self.transform.scale != 1.0:
            z.mul_(self.transform.scale)
        cap, tanh = self.transform.softcap, None
        if cap is not None:
            tanh = z.div_(cap).tanh_()
            z = tanh * cap
        inverse = self._per_row(rows)
        if isinstance(inverse, Tensor) or inverse != 1.0:
            z.mul_(inverse)
        return z, tanh

    def chain(self, dz: Tensor, rows: slice | Tensor, tanh: Tensor | None) -> Tensor:
        """dZ [C, Vs] -> the gradient of the pre-transform logits, in place."""
        if tanh is not None:
            dz.mul_(1 - tanh.square())
        inverse = self._per_row(rows)
        if isinstance(inverse, Tensor) or inverse * self.transform.scale != 1.0:
            dz.mul_(inverse * self.transform.scale)
        return dz

    def walk(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        for columns in self.slabs:
            yield columns, *self.slab(columns)


def forward(
    hidden: Tensor,  # [N, D]; with `tokens` also [B, T, D], see `gather`
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    *,
    want_entropy: bool,
    want_block_lse: bool = False,
    want_correct: bool = False,
    tokens: Tensor | None = None,  # [N] rows of hidden; None: all
) -> HeadForward:
    """Log-probs, lse and entropy of N tokens; memory beyond the inputs is O(TILE_BYTES + N D if 16-bit).

    A logit more than 64 nats (float64: 685) below the largest one so far adds nothing to any sum.
    """
    hidden = gather(hidden, tokens)  # [N, D]
    logits = _Logits(hidden, weight, bias, transform)
    top = hidden.new_full((len(hidden),), -torch.inf, dtype=logits.dtype)  # [N] the largest logit so far
    mass = torch.zeros_like(top)  # [N] sum e^(z - top)
    moment = torch.zeros_like(top)  # [N] sum e^(z - top) (z - top)
    chosen = torch.full_like(top, -torch.inf)  # [N] z_y; a target outside [0, V) keeps probability 0
    blocks = -(-len(weight) // BLOCK)
    block_lse = top.new_empty(blocks, len(top)) if want_block_lse else None  # [blocks, N]
    for columns, w, b in logits.walk():
        for rows in logits.chunks:
            column, inside = _column(targets[rows], columns.start, len(w))
            z, _ = logits.tile(rows, w, b)  # [C, Vs]
            chosen[rows] = torch.where(inside, z.gather(1, column[:, None])[:, 0], chosen[rows])
            for i, part in _by_rows(z):
                few = slice(rows.start + i.start, rows.start + i.stop)
                new = torch.maximum(top[few], part.amax(1))  # [c]
                start = torch.where(new == -torch.inf, 0.0, new)  # [c]; a bias may exclude every entry so far
                part.sub_(start[:, None])
                e = _exp(part, keep=want_entropy)  # [c, Vs]
                sums = _block_sums(e)  # [c, Vs / BLOCK]
                shift = top[few] - start  # [c]
                decay = shift.exp()  # [c], 0 for the first slab
                if want_entropy:
                    carried = torch.where(decay > 0, decay * (moment[few] + shift * mass[few]), 0.0)
                    moment[few] = carried + torch.linalg.vecdot(e, part)
                if want_block_lse:
                    first = columns.start // BLOCK
                    block_lse[first : first + sums.shape[1], few] = (sums.log() + start[:, None]).T
                mass[few] = mass[few] * decay + sums.sum(1)
                top[few] = new
    log_mass = mass.log()  # [N]
    lse = top + log_mass
    entropy = log_mass - moment / mass if want_entropy else None
    logprobs = ((chosen - top) - log_mass).clamp(max=0.0)
    correct = chosen >= top if want_correct else None  # [N]; both come from the same tile
    return HeadForward(logprobs, lse, entropy, block_lse, log_mass - (lse - top), correct)


def _by_rows(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, part [c, Vs]) of a tile [C, Vs], few enough for a CPU's caches; elsewhere all at once."""
    rows = max(1, len(z))
    if z.device.type == "cpu":
        rows = max(1, CACHE_BYTES * torch.get_num_threads() // max(1, z.shape[1] * z.itemsize))
    for first, part in zip(range(0, len(z), rows), z.split(rows)):
        yield slice(first, first + len(part)), part


def _exp(x: Tensor, *, keep: bool) -> Tensor:
    """e^x of any shape, exactly 0 up to LOWEST, in the memory of x; with `keep` x stays, cut off where e^x is 0."""
    lowest = LOWEST[x.dtype]
    x.clamp_(min=lowest - 1)  # 0 times this is 0, not NaN
    return torch.threshold_(x.exp() if keep else x.exp_(), math.exp(lowest), 0.0)


def _block_sums(e: Tensor) -> Tensor:
    """[C, Vs] -> sums over blocks of columns [C, ceil(Vs / BLOCK)]; the last block may be partial."""
    whole = e.shape[1] // BLOCK * BLOCK
    sums = e[:, :whole].unflatten(1, (-1, BLOCK)).sum(2) if whole else e.new_empty(len(e), 0)
    return sums if whole == e.shape[1] else torch.cat([sums, e[:, whole:].sum(1, keepdim=True)], 1)


def _column(targets: Tensor, first: int | Tensor, width: int) -> tuple[Tensor, Tensor]:  # [C], [C] or a number
    """Where each target lies among `width` columns from `first` on, and whether it does."""
    column = targets - first  # [C]
    inside = (column >= 0) & (column < width)
    return torch.where(inside, column, 0), inside


def backward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    lse: Tensor,  # [N]
    gradient: LogitGradient,
    routing: Routing | None = None,
    *,
    needs: Needs,
    sums: GradientSums | None = None,
) -> HeadGradients:
    """Gradients for any LogitGradient, exact without a routing; see the module docstring for the order of the work.

    With `sums` dW and dbias are added to it, and dH stays in the dtype of the arithmetic.
    """
    logits = _Logits(hidden, weight, bias, transform)
    dtype = logits.dtype
    narrow = (lambda x: dtype) if sums is not None else (lambda x: x.dtype)
    needs = needs._replace(bias=needs.bias and bias is not None)
    if len(hidden) == 0:
        inputs = zip((hidden, weight, bias), needs)
        zeros = HeadGradients(*(torch.zeros_like(x, dtype=narrow(x)) if need else None for x, need in inputs))
        return _added(zeros, sums)
    dh = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs.hidden else None
    dw = weight.new_empty(weight.shape, dtype=narrow(weight)) if needs.weight else None
    db = bias.new_empty(bias.shape, dtype=narrow(bias)) if needs.bias else None
    runs = Runs(logits.hidden, logits.chunks, routing, MAX_CHUNK, TILE_BYTES, FEW_DENSE)
    for columns in logits.slabs:
        dw_slab = None  # [Vs, D]: dW itself, or a wider copy of its slab
        if needs.weight:
            dw_slab = dw[columns] if dw.dtype == dtype else dw.new_empty(dw[columns].shape, dtype=dtype)
            for part in runs.absent(columns):
                dw_slab[part].zero_()
        db_slab = lse.new_zeros(columns.stop - columns.start) if needs.bias else None  # [Vs]
        for run in runs.of(columns):
            rows = run.rows  # [R]
            h = runs.hidden_states(rows).split(run.sizes)  # [r, D] each
            operands = [logits.slab(part) for part in run.columns]
            z, tanh = logits.tiles(rows, h, operands)  # [R, v]
            dz = logits.chain(_logit_gradient(z, rows, run.first, targets, lse, gradient), rows, tanh)
            if run.scale is not None:
                dz.mul_(run.scale[:, None])
            flops.product(len(dz), dz.shape[1], hidden.shape[1], times=needs.hidden + needs.weight)
            parts = dz.split(run.sizes)  # [r, v] each
            if needs.hidden and isinstance(rows, Tensor):
                runs.add_hidden(dh, rows, parts, [w for w, _ in operands])
            elif needs.hidden:
                dh[rows].addmm_(dz, operands[0][0])
            for x, h_part, part, written in zip(parts, h, run.columns, run.written):
                at = slice(part.start - columns.start, part.stop - columns.start)
                if needs.weight:  # beta 0: written, not added
                    dw_slab[at].addmm_(x.T, h_part, beta=int(written))
                if needs.bias:
                    db_slab[at] += x.sum(0)
        if needs.weight and dw.dtype != dtype:
            dw[columns] = dw_slab
        if needs.bias:
            db[columns] = db_slab
    return _added(HeadGradients(None if dh is None else dh.to(narrow(hidden)), dw, db), sums)


def _added(gradients: HeadGradients, sums: GradientSums | None) -> HeadGradients:
    """dW and dbias added to those of other token chunks."""
    if sums is None:
        return gradients
    for total, x in zip(sums, gradients[1:]):
        if total is not None:
            total.add_(x)
    return HeadGradients(gradients.hidden, sums.weight, sums.bias)


def _logit_gradient(
    z: Tensor, rows: slice | Tensor, first: int | Tensor, targets: Tensor, lse: Tensor, gradient: LogitGradient
) -> Tensor:
    """dZ [C, Vs] of `LogitGradient`, in the memory of z, whose columns begin at `first` [C]."""
    lse, gradient = lse[rows, None], gradient.select(rows)  # [C, 1], [C]
    for few, part in _by_rows(z):
        log_p = part.sub_(lse[few])  # [c, Vs]
        p = _exp(log_p, keep=gradient.entropy is not None)  # [c, Vs]
        if gradient.entropy is None:
            p.mul_(gradient.prob[few, None])
        else:
            log_p.mul_(-gradient.entropy[few, None]).add_(gradient.prob[few, None]).mul_(p)
    column, inside = _column(targets[rows], first, z.shape[1])
    z[torch.arange(len(z), device=z.device), column] += torch.where(inside, gradient.onehot, 0.0)
    return z


def one_pass(
    hidden: Tensor,  # [N, D] float32 or float64; with `tokens` also [B, T, D], see `gather`
    weight: Tensor,  # [V, D], same dtype
    targets: Tensor,  # [M]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,  # without a softcap
    prior: Tensor | None,  # [M] unused: this backend computes the row maximum
    gradient: Callable[[slice, HeadForward], LogitGradient],
    *,
    chunks: Sequence[slice],
    want_entropy: bool,
    want_correct: bool = False,
    needs: Needs,
    tokens: Tensor | None = None,  # [M] rows of hidden; None: all, M = N
) -> tuple[HeadForward, HeadGradients]:
    """Forward and gradient of a loss, each logit computed once.

    Args:
        gradient: (rows, outputs [M] known up to rows.stop) -> that of those rows [C], without a part by the entropy.
        chunks: ascending cover of the M tokens. One chunk's logits [C, V] are the workspace.
    """
    source, hidden = hidden, gather(hidden, tokens)  # [M, D]
    logits = _Logits(hidden, weight, bias, transform)
    logprobs, lse = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))  # [M], [M]
    entropy = torch.empty_like(lse) if want_entropy else None  # [M]
    correct = torch.empty_like(lse, dtype=torch.bool) if want_correct else None  # [M]
    outputs = HeadForward(logprobs, lse, entropy, None, None, correct)
    dh = torch.zeros_like(hidden) if needs.hidden else None  # [M, D]
    dw = weight.new_empty(weight.shape) if needs.weight else None  # [V, D]
    db = torch.zeros_like(bias) if needs.bias and bias is not None else None  # [V]
    longest = max((c.stop - c.start for c in chunks), default=1)
    logits.reserve(longest, len(weight))
    for rows in chunks:
        z, _ = logits.tile(rows, weight, bias)  # [C, V]
        every = torch.arange(len(z), device=z.device)
        z_y = z[every, targets[rows]]  # [C]
        top, mass, moment = (torch.empty_like(z_y) for _ in range(3))  # [C] each
        for few, part in _by_rows(z):  # [c, V], in place
            torch.amax(part, 1, out=top[few])
            part.sub_(top[few, None])
            e = _exp(part, keep=want_entropy)  # [c, V]
            torch.sum(e, 1, out=mass[few])
            if want_entropy:
                moment[few] = torch.linalg.vecdot(e, part)
                part.copy_(e)
        log_mass = mass.log()  # [C]
        lse[rows] = top + log_mass
        logprobs[rows] = ((z_y - top) - log_mass).clamp(max=0.0)
        if correct is not None:
            correct[rows] = z_y >= top
        if want_entropy:
            entropy[rows] = log_mass - moment / mass
        given = gradient(rows, outputs)  # [C]
        active = given.is_active().nonzero()[:, 0]  # [A] tokens with a gradient, moved to the front
        for i, n in enumerate(active.tolist()):
            if i != n:
                z[i] = z[n]
        dz, every, given = z[: len(active)], every[: len(active)], given.select(active)  # [A, V], [A], [A]
        dz.mul_((given.prob / mass[active])[:, None])
        dz[every, targets[rows][active]] += given.onehot
        dz = logits.chain(dz, rows.start + active, None)
        if needs.hidden:
            dh[rows.start + active] = dz @ weight
        if needs.weight:
            dw.addmm_(dz.T, hidden[rows.start + active], beta=int(rows.start > 0))  # the first is written, not added
        if db is not None:
            db += dz.sum(0)
        flops.product(len(active), len(weight), hidden.shape[1], times=needs.hidden + needs.weight)
    if needs.weight and not chunks:
        dw.zero_()
    dh = None if dh is None else scatter(dh, source, tokens)  # [N, D]
    return outputs, HeadGradients(dh, dw, db)
