"""The head in chunked PyTorch, for CPU, MPS and anything without Triton: logits exist one tile at a time.

The vocabulary is cut into slabs and the tokens into chunks; one tile of logits is at most TILE_BYTES, whatever N and
V are. Slabs are the outer loop, so a slab of a 16-bit weight is widened once, and each slab of dW is finished before
the next begins: written once, deterministic.

    forward    per slab and chunk: z = transform(h W^T + b); running maximum, sum of exponentials and (for the
               entropy) sum of e^(z - max) (z - max), rescaled when the maximum moves                        2 N D V
    backward   per slab and chunk: z again, p = e^(z - lse), dZ, then dW += dZ^T h and dH += dZ W            6 N D V

Arithmetic is float32 (float64 for float64 inputs) throughout: 16-bit operands are widened before each product, which
is exact; each gradient is rounded once, when it is written. Left out: 16-bit matrix units (the Triton path has them).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lad_kernels.head.logits import HeadForward, HeadGradients, LogitGradient, LogitTransform

TILE_BYTES = 16 << 20  # one tile of logits; at most three such tiles are alive at a time
MAX_CHUNK = 2048  # tokens of a tile


def _tiles(tokens: int, vocabulary: int, item: int) -> tuple[list[slice], list[slice]]:
    """(vocabulary slabs, token chunks) whose product fits in TILE_BYTES."""
    chunk = max(1, min(tokens, MAX_CHUNK))
    slab = max(1, min(vocabulary, TILE_BYTES // (item * chunk)))
    cut = lambda total, step: [slice(i, min(i + step, total)) for i in range(0, total, step)]  # noqa: E731
    return cut(vocabulary, slab), cut(tokens, chunk)


class _Logits:
    """Logits of one tile at a time, and their derivative with respect to the raw product h W^T + b."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform):
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.weight, self.bias, self.transform = hidden.to(self.dtype), weight, bias, transform
        t = transform.temperature
        self.inverse_temperature = (1 / t.to(self.dtype))[:, None] if isinstance(t, Tensor) else 1 / t  # [N, 1]
        self.slabs, self.chunks = _tiles(len(hidden), len(weight), self.dtype.itemsize)
        room = max((s.stop - s.start for s in self.slabs[:1]), default=0) * min(len(hidden), MAX_CHUNK)
        self._memory = self.hidden.new_empty(room)  # one tile, used again and again

    def slab(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Weight [Vs, D] and bias [Vs] of a slab, widened."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.dtype), bias

    def _per_row(self, rows: slice) -> Tensor | float:
        t = self.inverse_temperature
        return t[rows] if isinstance(t, Tensor) else t

    def tile(self, rows: slice, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z [C, Vs], valid until the next tile, and tanh [C, Vs] of the softcap if there is one."""
        h = self.hidden[rows]  # [C, D]
        z = self._memory[: len(h) * len(w)].view(len(h), len(w))
        torch.mm(h, w.T, out=z) if b is None else torch.addmm(b, h, w.T, out=z)
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

    def chain(self, dz: Tensor, rows: slice, tanh: Tensor | None) -> Tensor:
        """dZ [C, Vs] -> d loss / d raw product, in place."""
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
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    *,
    want_entropy: bool,
) -> HeadForward:
    """Log-probs, lse and entropy of N tokens; memory beyond the inputs is O(TILE_BYTES + N D if 16-bit)."""
    logits = _Logits(hidden, weight, bias, transform)
    top = hidden.new_full((len(hidden),), -torch.inf, dtype=logits.dtype)  # [N] running maximum
    mass = torch.zeros_like(top)  # [N] sum e^(z - top)
    moment = torch.zeros_like(top)  # [N] sum e^(z - top) (z - top)
    chosen = torch.full_like(top, -torch.inf)  # [N] z_y; a target outside [0, V) keeps probability 0
    for columns, w, b in logits.walk():
        for rows in logits.chunks:
            z, _ = logits.tile(rows, w, b)  # [C, Vs]
            column, inside = _column(targets[rows], columns)
            chosen[rows] = torch.where(inside, z.gather(1, column[:, None])[:, 0], chosen[rows])
            new = torch.maximum(top[rows], z.amax(1))  # [C]
            shift = top[rows] - new  # [C]
            decay = shift.exp()  # 0 for the first slab
            z.sub_(new[:, None])
            e = z.exp() if want_entropy else z.exp_()  # [C, Vs]
            if want_entropy:
                carried = torch.where(mass[rows] > 0, decay * (moment[rows] + shift * mass[rows]), 0.0)
                moment[rows] = carried + torch.linalg.vecdot(e, z)
            mass[rows] = mass[rows] * decay + e.sum(1)
            top[rows] = new
    lse = top + mass.log()
    entropy = mass.log() - moment / mass if want_entropy else None
    return HeadForward((chosen - lse).clamp(max=0.0), lse, entropy, None)


def _column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each target [C] lies in a slab, and whether it does."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0), inside


def backward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    lse: Tensor,  # [N]
    gradient: LogitGradient,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> HeadGradients:
    """Exact gradients for any LogitGradient; see the module docstring for the order of the work."""
    needs = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    if len(hidden) == 0:
        return HeadGradients(*(torch.zeros_like(x) if need else None for x, need in needs))
    logits = _Logits(hidden, weight, bias, transform)
    dtype = logits.dtype
    dh = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    db = torch.empty_like(bias) if need_bias else None
    for columns, w, b in logits.walk():
        dw_slab = None  # [Vs, D]: dW itself, or a wider copy of its slab
        if need_weight:
            dw_slab = dw[columns] if dw.dtype == dtype else torch.empty_like(w)
        db_slab = w.new_zeros(len(w)) if need_bias else None  # [Vs]
        for rows in logits.chunks:
            z, tanh = logits.tile(rows, w, b)  # [C, Vs]
            dz = _logit_gradient(z, rows, columns, targets, lse, gradient)
            dz = logits.chain(dz, rows, tanh)
            if need_hidden:
                dh[rows].addmm_(dz, w)
            if need_weight:
                dw_slab.addmm_(dz.T, logits.hidden[rows], beta=int(rows.start > 0))  # beta 0: written, not added
            if need_bias:
                db_slab += dz.sum(0)
        if need_weight and dw.dtype != dtype:
            dw[columns] = dw_slab
        if need_bias:
            db[columns] = db_slab
    return HeadGradients(None if dh is None else dh.to(hidden.dtype), dw, db)


def _logit_gradient(
    z: Tensor, rows: slice, columns: slice, targets: Tensor, lse: Tensor, gradient: LogitGradient
) -> Tensor:
    """dZ [C, Vs] of `LogitGradient`, in the memory of z where it can be."""
    log_p = z.sub_(lse[rows, None])  # [C, Vs]
    if gradient.entropy is None:
        dz = log_p.exp_().mul_(gradient.prob[rows, None])
    else:
        p = log_p.exp()
        dz = log_p.mul_(-gradient.entropy[rows, None]).add_(gradient.prob[rows, None]).mul_(p)
    column, inside = _column(targets[rows], columns)
    dz[torch.arange(len(dz), device=dz.device), column] += torch.where(inside, gradient.onehot[rows], 0.0)
    return dz
