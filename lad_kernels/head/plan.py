"""Which path a head takes, and what its backward multiplies: active tokens, routed pairs, the bound on their error.

Whether gradients come with the forward, in one pass, is decided before it. After it the routing rule keeps (token,
block) pairs, if the cost model finds that faster, and tokens whose coefficients are all zero are dropped before the
backward's first product. Either takes one host sync on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lad_kernels.autocast import without_autocast
from lad_kernels.head import cost, dispatch, memory
from lad_kernels.head.dispatch import Shares, Sparsity
from lad_kernels.head.head import Head
from lad_kernels.head.records import BLOCK, HeadForward, HeadGradients, LogitGradient, Needs, Routing, select
from lad_kernels.head.routing import ErrorBound, kept_share, route

_BLOCKS = 64  # vocabulary blocks whose masses are moved together


@dataclass
class BackwardPlan:
    """The backward of a call; tokens without a gradient are left out."""

    needs: Needs
    active: Tensor | None  # [A] tokens with a gradient; None: all M
    lse: Tensor  # [A]
    gradient: LogitGradient  # [A]
    routing: Routing | None
    metrics: dict[str, Tensor | float]  # density and error bounds, 0-d or not yet on the device
    flops: int  # of the products that the backward will launch
    mean_logit: Tensor | None = None  # [A] d loss / d (the mean of a token's logits); None: the loss has no such part
    ready: HeadGradients | None = None  # gradients that are computed already, for an upstream gradient of 1

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it holds, for autograd to save."""
        g, r, ready = self.gradient, self.routing, self.ready
        routing = (None, None, None) if r is None else (r.rows, r.scale, r.dense)
        gradients = (None, None, None) if ready is None else ready
        return (self.active, self.lse, g.onehot, g.prob, g.entropy, self.mean_logit, *routing, *gradients)

    def holding(self, tensors: Sequence[Tensor | None]) -> BackwardPlan:
        """The same with these tensors; autograd does not notice changes to gradients that are ready."""
        active, lse, onehot, prob, entropy, mean_logit, rows, scale, dense, *gradients = tensors
        routing = None if self.routing is None else Routing(rows, scale, self.routing.offsets, dense)
        ready = None if self.ready is None else HeadGradients(*(None if x is None else x.data for x in gradients))
        gradient = LogitGradient(onehot, prob, entropy)
        return replace(
            self, active=active, lse=lse, gradient=gradient, routing=routing, mean_logit=mean_logit, ready=ready
        )

    @without_autocast
    def made(self, head: Head) -> BackwardPlan:
        """The same with its gradients computed; `head` has all M tokens."""
        gradients = head.select(self.active).backward(self.lse, self.gradient, self.routing, self.needs)
        return replace(self, ready=gradients)

    def run(self, head: Head, upstream: Tensor, *, wide: bool = False) -> HeadGradients:
        """Gradients of the hidden states [N, D], weight and bias, times `upstream` []; `head` has all M tokens.

        `wide`: not rounded to 16 bits, unless they are ready.
        """
        gradients = self.ready
        part = head.select(self.active)
        if gradients is None:
            gradients = part.backward(self.lse, self.gradient.scaled(upstream), self.routing, self.needs, wide=wide)
        else:  # its buffers go to the caller; step.py has a second backward compute them again
            head.scale(gradients, upstream)
        if self.mean_logit is not None:
            part.add_mean_logit(gradients, self.mean_logit * upstream)
        return gradients


def takes_one_pass(
    part: Head,  # [A]
    needs: Needs,
    sparsity: Sparsity,
    gradient: Callable[[Tensor, HeadForward, bool], LogitGradient] | None,
    *,
    all_active: bool,
) -> bool:
    """Whether forward and gradient together are faster than what is expected of two passes or of routing.

    Where that depends on the call's own numbers, a few of its tokens, at a fixed stride, are scored first (one host
    sync).

    Args:
        gradient: (indices [S] into the A tokens, what the head computed of these [S], whether it has their log-probs)
            -> their gradient [S]; None: not known of a few tokens, so none are scored.
        all_active: every token has one.
    """
    work, shares = part.work(needs), Shares()
    if gradient is not None and dispatch.needs_sample(work, sparsity, all_active=all_active):
        step = dispatch.sample_step(work)
        size = min(step * work.sample, work.tokens)
        chosen = torch.arange(size, device=part.targets.device) * work.tokens // size  # [S]
        few, known = part.select(chosen), None
        if step > 1:
            few, known = few.thin_vocabulary(step), few.targets % step == 0  # [S]
        out = few.forward(want_entropy=False, want_block_lse=True)
        of_few = gradient(chosen, out, known is None)  # [S]
        kept = out.lse.new_ones(2)  # [2] pairs, tokens that are whole
        if sparsity.threshold > 0:
            kept = kept_share(
                out,
                few.targets,
                of_few if known is None else of_few.where(known),
                sparsity.threshold * step**0.5,  # masses of half the entries are larger, those of single ones are not
                dense_share=cost.dense_share(work),
                unbiased=sparsity.unbiased,
            ).nan_to_num(0.0)  # [2]
        active = of_few.is_active().to(kept.dtype).mean()  # []
        shares = Shares(*torch.cat([active[None], kept]).tolist())
    return dispatch.takes_one_pass(work, sparsity, shares)


def one_pass_chunks(part: Head, needs: Needs, cu_seqlens: Tensor | None) -> list[slice] | None:  # [B + 1]
    """Chunks of all tokens whose logits fit memory, of whole sequences if their bounds are given.

    The bounds are read on the host unless one chunk holds all tokens. None where a sequence does not fit.
    """
    work = part.work(needs)
    tokens, rows = work.tokens, work.chunk_rows()
    if cu_seqlens is None or tokens <= rows:
        return [slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows)]
    bounds = cu_seqlens.tolist()
    bounds += [*range(bounds[-1] + rows, tokens, rows), tokens]  # padding behind the last may be cut anywhere
    chunks, start, last = [], 0, 0
    for bound in bounds:
        if bound - last > rows:
            return None
        if bound - start > rows:
            chunks.append(slice(start, last))
            start = last
        last = bound
    return [*chunks, slice(start, last)]


def forward_for_backward(
    part: Head, needs: Needs, sparsity: Sparsity, *, want_entropy: bool, want_correct: bool
) -> HeadForward:
    """The forward, with block masses if the backward may be routed."""
    route = dispatch.may_route(part.work(needs), sparsity)
    return part.forward(want_entropy=want_entropy, want_block_lse=route, want_correct=want_correct)


def select_active(out: HeadForward, active: Tensor | None) -> HeadForward:
    """The outputs of the active tokens [A]; block masses are compacted in place, since two copies may not fit."""
    if active is None:
        return out
    block_lse = out.block_lse  # [blocks, M]
    if block_lse is not None:
        for blocks in block_lse.split(_BLOCKS):
            blocks[:, : len(active)] = blocks[:, active]
        block_lse = block_lse[:, : len(active)]
    rest = select(out.lse_rest, active)
    return HeadForward(out.logprobs[active], out.lse[active], select(out.entropy, active), block_lse, rest)


def plan_backward(
    head: Head,  # of all M tokens
    out: HeadForward,  # [A]
    gradient: LogitGradient,  # [A]
    active: Tensor | None,  # [A]; None: all
    needs: Needs,
    sparsity: Sparsity,
    ready: HeadGradients | None = None,
    *,
    mean_logit: Tensor | None = None,  # [A]
    all_given: bool = False,
) -> BackwardPlan:
    """Choose what the backward of the active tokens multiplies; exact where `out` has no block masses.

    With `all_given`, `active` is None and what is given are all M tokens: a routing leaves those without a gradient out
    by itself, any other backward after a host sync.
    """
    work, routing, bound = head.work(needs), None, None
    exact = gradient if out.lse_rest is None else gradient.with_rest(out.lse_rest)  # [A]
    if out.block_lse is not None and len(out.lse):
        part = head.select(active)
        chosen, error_bound = route(
            part.hidden, part.weight, part.targets, part.transform, out.lse, out.logprobs, out.block_lse, gradient,
            sparsity.threshold, tokens=part.tokens, dense_share=cost.dense_share(work),
            unbiased=sparsity.unbiased, most_pairs=memory.most_pairs(work) if sparsity.backward == "auto" else None,
            triton=part.triton,
        )  # fmt: skip
        dense, active_tokens = len(chosen.dense), error_bound.active
        taken = dispatch.takes_routed(work, active_tokens, error_bound.pairs, dense, backward=sparsity.backward)
        if taken and dense < active_tokens:
            routing, bound = chosen, error_bound
    if all_given and routing is None:
        active = gradient.active()  # [A]
        out, exact = select_active(out._replace(block_lse=None), active), exact.select(active)
        mean_logit = select(mean_logit, active)
    tokens = len(out.lse)
    if bound is None:
        zero = out.lse.new_zeros(())  # []
        bound = ErrorBound(tokens, tokens * work.blocks, zero, zero, zero, zero)  # nothing is left out
    metrics: dict[str, Tensor | float] = {
        "kept_share": bound.pairs / max(work.tokens * work.blocks, 1),
        "routed_share": float(routing is not None),
        "dropped_mass_mean": bound.dropped_mass_mean,
        "dropped_mass_max": bound.dropped_mass_max,
        "dhidden_bound": bound.dhidden_bound,
        "dweight_bound": bound.dweight_bound,
    }
    flops = 0 if ready is not None else _flops(head, tokens, routing, needs)
    return BackwardPlan(needs, active, out.lse, exact, routing, metrics, flops, mean_logit, ready)


def _flops(head: Head, tokens: int, routing: Routing | None, needs: Needs) -> int:
    """Flops of a backward, which recomputes each logit and multiplies its gradient once for dH and once for dW."""
    vocab, hidden_size = head.weight.shape
    logits = tokens * vocab
    if routing is not None:
        last, columns = len(routing.rows) - routing.offsets[-2], (vocab - 1) % BLOCK + 1  # of the last block
        logits = (len(routing.rows) - last) * BLOCK + last * columns + len(routing.dense) * vocab
    return 2 * hidden_size * logits * (1 + needs.hidden + needs.weight)
