"""The head with its vocabulary sharded over the ranks of a process group: no rank ever holds V x D.

Every rank holds consecutive rows of the weight, in rank order, and the same hidden states and targets.

    forward    each rank scores its own rows; ONE all-gather of 3 or 4 numbers per token (lse_r, its rounding
               error, log p_r, H_r), then
                   lse   = log sum_r e^lse_r
                   log p = log p_owner - log sum_r e^(lse_r - lse_owner)      never a difference of two large lse
                   H     = sum_r e^(lse_r - lse) (H_r + lse - lse_r)
    backward   dR of the local rows from the global lse gives the local dW and dbias in full, and a part of dH, which
               is all-reduced in float32 and rounded once; tokens go in chunks, so that the all-reduce of one runs
               while the next is computed

Every rank adds the gathered numbers in the same order, so log-probs, lse and entropy agree bitwise between ranks. dH is
as deterministic as the backend's all-reduce.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lad_kernels import checks
from lad_kernels.head import memory
from lad_kernels.head.head import Head
from lad_kernels.head.records import GradientSums, HeadForward, HeadGradients, LogitGradient, Needs, Routing
from lad_kernels.packing import Packing

if TYPE_CHECKING:
    from lad_kernels.head.operands import HeadArguments

CHUNK = 2048  # tokens of an all-reduce of dH, or more ...
_ARGUMENTS = 24  # slots for replicated arguments in the exchange, which has one length for all functions
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNKS = 4  # ... so that there are about so many of them, or less for memory
_FACTS = ("tokens that take part", "hidden size", "dtype", "arguments that need a gradient", "target_ids")


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary."""

    group: dist.ProcessGroup
    rank: int
    rows: list[int]  # of every rank, in rank order

    @property
    def vocabulary(self) -> int:
        return sum(self.rows)

    @property
    def start(self) -> int:
        """Number of this rank's first row in the whole vocabulary."""
        return sum(self.rows[: self.rank])


def join(
    given: HeadArguments,  # with a weight [V_r, D] and a bias [V_r]
    targets: Tensor,  # [M]
    replicated: Mapping[str, object],
    packing: Packing,
    needs: Needs,
) -> Shard:
    """Exchange row counts and check that all ranks make the same call, by one all-gather of a few dozen integers.

    Args:
        replicated: arguments besides those of `given` that must be the same on every rank. Tensors are compared by
            shape and dtype, and by their values at the tokens that take part where checks may read values.
        packing: which tokens take part.
        needs: which gradients are asked for.

    Raises:
        ValueError: on every rank, if something that must be the same differs between ranks, or V < 2.
    """
    hidden, weight, group = given.hidden_states, given.lm_head_weight, given.vocab_group
    own = ("hidden_states", "temperature", "logit_scale", "softcap", "impl")
    replicated = {**{name: getattr(given, name) for name in own}, **replicated}
    position = torch.arange(1, len(targets) + 1, device=targets.device)  # [M]
    code = 8 * (given.bias is not None) + 4 * needs.hidden + 2 * needs.weight + needs.bias
    facts = [len(weight), len(targets), hidden.shape[-1], _code(hidden.dtype), code]
    names = ("function", *replicated)  # compared first: with another function the others mean something else
    codes = [_code(", ".join(replicated)), *map(_code, replicated.values())]
    codes += [0] * (_ARGUMENTS - len(codes))
    sums = [(targets * position).sum(), *(_checksum(x, packing) for x in replicated.values())]
    sums += [0] * (_ARGUMENTS - len(sums))
    mine = torch.tensor(facts + codes, device=targets.device)  # [5 + _ARGUMENTS]
    mine = torch.cat([mine, torch.stack([torch.as_tensor(x, device=targets.device) for x in sums])])
    every = gather(mine, group).tolist()  # [R, 5 + 2 _ARGUMENTS]
    columns = list(zip(*every))
    first = columns[len(facts) + _ARGUMENTS :]  # of the values
    compared = [*zip(_FACTS, [*columns[1 : len(facts)], first[0]])]
    compared += [*zip(names, columns[len(facts) :]), *((f"values of {n}", c) for n, c in zip(names[1:], first[1:]))]
    for what, values in compared:
        if len(set(values)) > 1:
            ranks = [[r for r, y in enumerate(values) if y == x] for x in dict.fromkeys(values)]  # by value
            raise ValueError(
                f"vocab_group: expected the same {what} on every rank, got different ones on ranks "
                f"{' and '.join(map(str, ranks))}; hidden states, targets and all other arguments but lm_head_weight "
                f"and bias are replicated on the group"
            )
    shard = Shard(group, dist.get_rank(group), [row[0] for row in every])
    if shard.vocabulary < 2:
        raise ValueError(f"lm_head_weight: expected 2 rows or more on all ranks together, got {shard.vocabulary}")
    return shard


def _code(x: object) -> int:
    """A hash of what must be equal on all ranks and is known without reading a device."""
    text = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
    return zlib.crc32(text.encode())


def _checksum(x: object, packing: Packing) -> Tensor | int:
    """A sum of a tensor's bits, each row with its own weight; 0 for other values and where checks do not read them."""
    if not isinstance(x, Tensor) or x.numel() == 0 or not checks.may_read(x):
        return 0
    by_token = x.shape[: len(packing.shape)] == packing.shape
    words = x.detach().contiguous().view(_WORDS[x.element_size()])
    words = words.reshape(packing.shape.numel() if by_token else x.shape[:1].numel(), -1)  # [rows, ...]
    rows = words.sum(1, dtype=torch.int64)  # [rows]
    rows = packing.select(rows.view(packing.shape)) if by_token else rows
    return (rows * torch.arange(1, len(rows) + 1, device=x.device)).sum()


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] on every rank -> [R, ...]."""
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    if x.numel():
        dist.all_gather(out, x, group=group)
    return torch.stack(out)


@dataclass(frozen=True)
class ShardedHead(Head):
    """`Head` on this rank's rows; targets [M] are numbered over the whole vocabulary. Collective on the group."""

    shard: Shard = field(kw_only=True)

    def forward(self, *, want_entropy: bool, want_block_lse: bool = False, want_correct: bool = False) -> HeadForward:
        """Log-probs, lse and entropy over the whole vocabulary; block masses are never reported."""
        if want_correct:
            raise ValueError("want_correct: not built for a head that is spread over ranks")
        if len(self.weight):
            out = self._local().forward(want_entropy=want_entropy)
            outputs = [out.lse, out.lse_rest, out.logprobs, *([out.entropy] if want_entropy else [])]
            parts = torch.stack(outputs)  # [3 or 4, M]
        else:
            wide = torch.promote_types(self.hidden.dtype, torch.float32)
            parts = torch.zeros(3 + want_entropy, len(self.targets), dtype=wide, device=self.hidden.device)
            parts[0] = -torch.inf
        parts = gather(parts, self.shard.group)  # [R, 3 or 4, M]
        lse_r, rest_r, logprobs_r = parts[:, 0], parts[:, 1], parts[:, 2]  # [R, M]
        ends = torch.tensor(list(itertools.accumulate(self.shard.rows)))  # [R]
        ends = ends.to(lse_r.device, non_blocking=True)  # the host does not wait for the forward
        owner = torch.bucketize(self.targets, ends, right=True).clamp(max=len(ends) - 1)[None]  # [1, M]
        top = lse_r.amax(0)  # [M]
        above = (lse_r - top) + rest_r  # [R, M] lse_r over the largest one
        log_mass = above.logsumexp(0)  # [M]
        lse = top + log_mass  # [M]
        beyond = ((lse_r - lse_r.gather(0, owner)) + (rest_r - rest_r.gather(0, owner))).logsumexp(0)  # lse - lse_owner
        logprobs = (logprobs_r.gather(0, owner)[0] - beyond).clamp(max=0.0)
        known = (self.targets >= 0) & (self.targets < ends[-1])  # [M]
        logprobs = torch.where(known, logprobs, -torch.inf)  # as `Head.forward` has it
        entropy = None
        if want_entropy:
            log_share = above - log_mass  # [R, M]
            share = log_share.exp()
            entropy = torch.where(share > 0, share * (parts[:, 3] - log_share), 0.0).sum(0)  # [M]
        return HeadForward(logprobs, lse, entropy, None, log_mass - (lse - top))

    def has_one_pass(self, need_bias: bool, *, want_all: bool = False) -> bool:
        return False  # the coefficients need the global lse

    def backward(
        self, lse: Tensor, gradient: LogitGradient, routing: Routing | None, needs: Needs, *, wide: bool = False
    ) -> HeadGradients:
        """dH [N, D] in full, dW and dbias of this rank's rows; exact, `routing` is None."""
        local = self._local()
        inside = (self.targets >= self.shard.start) & (self.targets < self.shard.start + len(self.weight))  # [M]
        gradient = LogitGradient(torch.where(inside, gradient.onehot, 0.0), gradient.prob, gradient.entropy)
        share = memory.BUDGET // 4  # for each of two float32 dH: one is reduced while the next is computed
        most = max(share // (4 * self.hidden.shape[-1]) // memory.ROWS, 1) * memory.ROWS
        size = min(max(CHUNK, -(-len(lse) // CHUNKS)), most)
        sums = GradientSums.zeros(self.weight, self.bias, needs)
        dh = self.no_gradient(wide) if needs.hidden else None  # [N, D]
        reducing: list[tuple[slice, Tensor, dist.Work]] = []  # tokens, their dH [C, D], its all-reduce

        def finish() -> None:
            tokens, part, work = reducing.pop()
            work.wait()
            dh[tokens if self.tokens is None else self.tokens[tokens]] = part.to(dh.dtype)

        for first in range(0, len(lse), size):
            tokens = slice(first, min(first + size, len(lse)))
            gradients = _gradients(local.select(tokens), lse[tokens], gradient.select(tokens), needs, sums)
            if reducing:
                finish()
            if dh is not None:
                work = dist.all_reduce(gradients.hidden, group=self.shard.group, async_op=True)
                reducing.append((tokens, gradients.hidden, work))
        if reducing:
            finish()
        return HeadGradients(dh, *sums.rounded(self.weight, self.bias, wide))

    def _local(self) -> Head:
        """A head of this rank's rows alone; targets on other ranks are replaced by any local row."""
        targets = (self.targets - self.shard.start).clamp(0, max(len(self.weight) - 1, 0))  # [M]
        return Head(self.hidden, self.weight, targets, self.bias, self.transform, self.triton, self.tokens)


def _gradients(head: Head, lse: Tensor, gradient: LogitGradient, needs: Needs, sums: GradientSums) -> HeadGradients:
    """`Head.chunk_gradients` of a rank that may have no rows; dH is not rounded."""
    if len(head.weight):
        return head.chunk_gradients(lse, gradient, None, needs, memory.BUDGET // 4, sums=sums)
    return HeadGradients(lse.new_zeros(len(lse), head.hidden.shape[-1]) if needs.hidden else None, *sums)
