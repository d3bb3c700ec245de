"""One call of a loss through the head: which tokens pass, on which path, and what its backward needs.

c known in advance (ratio 1)   tokens with c = 0 are scored at most; the others take one pass or routed
c known inside a chunk         one pass, if head/dispatch.py finds it cheaper than what is expected of routing
otherwise                      score, then the backward of the tokens with c != 0, dense or routed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels.autocast import without_autocast
from lad_kernels.head import dispatch
from lad_kernels.head.autograd import Head, live_tokens, take, take_gradient
from lad_kernels.head.records import HeadForward, HeadGradients, LogitGradient, Routing
from lad_kernels.head.routing import Certificate, kept_share, route
from lad_kernels.objective.policy import Config, PolicyInputs, PolicyTerms, compute_terms
from lad_kernels.packing import Packing

_BLOCKS = 64  # vocabulary blocks whose masses are moved together


class Step:
    """One call: which tokens pass through the head, on which path, and what its backward needs."""

    def __init__(
        self, head: Head, inputs: PolicyInputs, packing: Packing, config: Config, impl: str,
        needs: tuple[bool, bool, bool], want_logprobs: bool, return_entropy: bool,
    ):  # fmt: skip
        self.head, self.inputs, self.packing, self.config, self.impl = head, inputs, packing, config, impl
        self.needs, self.want_logprobs = needs, want_logprobs
        self.want_entropy = return_entropy or config.entropy_coef != 0
        self.theta = dispatch.tail_mass(config.tail_mass, head.hidden.dtype)
        # With ratio 1, no KL and no entropy term, coefficients do not depend on the log-probs at all.
        self.known = inputs.old_logprobs is None and config.kl_coef == 0 and config.entropy_coef == 0
        wide = torch.promote_types(head.hidden.dtype, torch.float32)
        self.logprobs = head.hidden.new_zeros(len(head.targets), dtype=wide)  # [M]
        self.entropy: Tensor | None = None  # [M]
        self.live: Tensor | None = None  # [A] tokens with a gradient; None: all
        self.routing: Routing | None = None
        self.ready: HeadGradients | None = None  # of one pass
        self.settled: PolicyTerms | None = None  # terms that one pass has computed already
        self.metrics: dict[str, Tensor] = {}

    def objective(self, logprobs: Tensor, entropy: Tensor | None = None) -> PolicyTerms:  # [M], [M]
        return compute_terms(logprobs, entropy, self.inputs, self.packing, self.config, self.impl)

    @without_autocast
    def run(self) -> None:
        """Fill logprobs, entropy, terms, metrics and what `backward` needs."""
        grad, show = any(self.needs), self.want_logprobs or self.want_entropy
        if self.known and (grad or not show):
            self.terms = self.objective(self.logprobs)
            if not grad:
                return
            self.live = live_tokens(_gradient(self.terms, None))  # [A]
        part = self.head.take(self.live)
        out = self._one_pass(part) if grad and part.has_one_pass(self.needs[2]) else None
        if out is None:
            route = grad and dispatch.may_route(self._work(part), self.theta, backward=self.config.backward)
            out = part.forward(want_entropy=self.want_entropy, want_block_lse=route)
        self._place(out, show)
        self.terms = self.settled or self.objective(self.logprobs, self.entropy)
        if grad:
            self._prepare(out)

    def _work(self, head: Head) -> dispatch.Work:
        vocab, hidden_size = head.weight.shape
        kind = dispatch.kind(head.hidden.device, head.triton)
        return dispatch.Work(
            len(head.targets), hidden_size, vocab, head.hidden.dtype.itemsize, kind, self.needs[0], self.needs[1]
        )

    def _one_pass(self, part: Head) -> HeadForward | None:
        """Forward and gradient at once if coefficients are known inside a chunk and it is worth it."""
        config, live, work = self.config, self.live, self._work(part)
        if config.entropy_coef != 0:
            return None
        whole = None if self.known or config.importance_sampling_level == "token" else self.packing.cu_seqlens
        chunks = _chunks(work.tokens, work.chunk_rows(), whole)
        if chunks is None:
            return None
        shares: dict[str, float] = {}
        if dispatch.must_look(work, self.theta, backward=config.backward, known=self.known):
            shares = self._look(part, work)
        if not dispatch.takes_one_pass(work, self.theta, backward=config.backward, **shares):
            return None
        ahead = take(self.terms.dlogprobs, live) if self.known else None  # [A]

        all_at_once: list[PolicyTerms] = []  # those of the whole call, met on the way

        def coefficients(rows: slice, logprobs: Tensor) -> Tensor:  # [A] -> [C]
            if ahead is not None:
                return ahead[rows]
            terms = self.objective(logprobs)
            if len(chunks) == 1 and not self.want_entropy:
                all_at_once.append(terms)
            return terms.dlogprobs[rows]

        found = part.one_pass(
            self._old(), coefficients, chunks=chunks, want_entropy=self.want_entropy, needs=self.needs
        )
        out, self.ready = (None, None) if found is None else found
        self.settled = all_at_once[0] if found is not None and all_at_once else None
        return out

    def _old(self) -> Tensor | None:  # [M]
        """Log-probabilities of the behaviour policy; any number where the objective drops the token."""
        old = self.inputs.old_logprobs
        if old is None:
            return None
        return self.packing.take(old.detach()).to(self.logprobs.dtype).nan_to_num(0.0, 0.0, 0.0)

    def _look(self, part: Head, work: dispatch.Work) -> dict[str, float]:
        """Shares that `dispatch.takes_one_pass` asks for, of a few of the tokens [A] at a fixed stride."""
        chosen = torch.arange(work.sample, device=self.logprobs.device) * work.tokens // work.sample  # [S]
        few = part.take(chosen)
        out = few.forward(want_entropy=False, want_block_lse=True)
        if self.known:
            c = take(self.terms.dlogprobs, self.live)[chosen]  # [S]
        else:
            logprobs = self.logprobs.clone() if self.inputs.old_logprobs is None else self._old().clone()  # [M]
            c = self.objective(logprobs.index_copy_(0, chosen, out.logprobs)).dlogprobs[chosen]  # [S]
        kept = c.new_ones(())  # []
        if self.theta > 0:
            kept = kept_share(out, few.targets, c, self.theta, **self._rule()).nan_to_num(0.0)
        live, kept = torch.stack([(c != 0).to(c.dtype).mean(), kept]).tolist()
        return {"live": live, "kept": kept}

    def _rule(self) -> dict[str, Any]:
        """How `route` chooses, beside theta."""
        gathered = dispatch.SPEEDS[self._work(self.head).device].gathered
        return {"dense_share": gathered, "unbiased": self.config.tail == "unbiased"}

    def _place(self, out: HeadForward, show: bool) -> None:
        """Results of the tokens that passed, and of the others if they are asked for."""
        live = self.live
        if live is None:
            self.logprobs, self.entropy = out.logprobs, out.entropy
            return
        self.logprobs[live] = out.logprobs
        if show:
            order = torch.zeros_like(self.logprobs).index_fill_(0, live, 1.0).argsort(stable=True)  # [M]
            dead = order[: len(order) - len(live)]  # without asking the device how many
            others = self.head.take(dead).forward(want_entropy=self.want_entropy)
            self.logprobs[dead] = others.logprobs
            if self.want_entropy:
                self.entropy = torch.empty_like(self.logprobs)
                self.entropy[live], self.entropy[dead] = out.entropy, others.entropy

    def _prepare(self, out: HeadForward) -> None:
        """Which tokens and blocks the backward multiplies; `out` covers all tokens, or the live ones if known."""
        gradient, lse, logprobs, block_lse = _gradient(self.terms, self.entropy), out.lse, out.logprobs, out.block_lse
        rest = out.lse_rest  # [A]
        if self.known:
            gradient = take_gradient(gradient, self.live)
        elif self.ready is None:
            self.live = live_tokens(gradient)  # [A]
            gradient, rest = take_gradient(gradient, self.live), take(rest, self.live)
            lse, logprobs = take(lse, self.live), take(logprobs, self.live)
            if block_lse is not None and self.live is not None:
                for blocks in block_lse.split(_BLOCKS):  # in place: there may be no room for both
                    blocks[:, : len(self.live)] = blocks[:, self.live]
                block_lse = block_lse[:, : len(self.live)]
        self.lse, self.gradient, certificate = lse, gradient, None  # [A]
        tokens, work = len(lse), self._work(self.head)
        if block_lse is not None and tokens:
            part, backward = self.head.take(self.live), self.config.backward
            most = dispatch.most_pairs(work) if backward == "auto" else None
            routing, certificate = route(
                part.hidden, part.weight, part.targets, part.transform, lse, logprobs, block_lse, gradient, self.theta,
                tokens=part.tokens, most_pairs=most, triton=part.triton, **self._rule(),
            )  # fmt: skip
            dense, pairs = len(routing.dense), sum(routing.counts) + len(routing.dense) * work.blocks
            if dispatch.takes_routed(work, tokens, pairs, dense, backward=backward) and dense < tokens:
                self.routing = routing
            else:
                certificate = None
        if rest is not None:
            self.gradient = gradient.with_rest(rest)
        zero = self.logprobs.new_zeros(())  # []
        everything = zero + tokens * work.blocks
        certificate = certificate or Certificate(everything, zero, zero, zero, zero)
        self.metrics = {
            "kept_share": certificate.pairs.float() / max(work.tokens * work.blocks, 1),
            "dropped_mass_mean": certificate.dropped_mass_mean,
            "dropped_mass_max": certificate.dropped_mass_max,
            "dhidden_bound": certificate.dhidden_bound,
            "dweight_bound": certificate.dweight_bound,
        }

    def backward(self, head: Head, upstream: Tensor) -> HeadGradients:
        """Gradients of the hidden states [N, D], weight and bias, times `upstream` []."""
        ready, self.ready = self.ready, None
        if ready is not None:  # the memory is handed on; a second backward computes again
            return head.scale(ready, upstream)
        g = self.gradient
        scaled = LogitGradient(*(None if x is None else upstream * x for x in (g.onehot, g.prob, g.entropy)))
        return head.take(self.live).backward(self.lse, scaled, self.routing, self.needs)


def _gradient(terms: PolicyTerms, entropy: Tensor | None) -> LogitGradient:
    """Coefficients of log-prob and entropy -> those of the logits."""
    c, c_entropy = terms.dlogprobs, terms.dentropy  # [M], [M]
    return LogitGradient(c, -c if c_entropy is None else -c - c_entropy * entropy, c_entropy)


def _chunks(tokens: int, rows: int, cu_seqlens: Tensor | None) -> list[slice] | None:
    """Chunks of at most `rows` tokens, of whole sequences if their bounds are given (read on the host)."""
    if cu_seqlens is None:
        return [slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows)]
    chunks, start, last = [], 0, 0
    for bound in cu_seqlens.tolist():
        if bound - last > rows:
            return None
        if bound - start > rows:
            chunks.append(slice(start, last))
            start = last
        last = bound
    return [*chunks, slice(start, last)]
