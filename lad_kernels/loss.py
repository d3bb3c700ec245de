"""The staircase between head and objective: hidden states and rewards in, a differentiable loss out.

Up go N log-probabilities, down comes one coefficient per token, c_t = d loss / d logp_t (and one for the entropy).
Both storeys run in the forward; the backward is the head's alone, with c already known, and never passes through the
objective again. What only this module knows is exploited here: which tokens have c != 0, and when c is known.

    c known in advance (ratio 1)   tokens with c = 0 are scored at most; the others take one pass or routed
    c known inside a chunk         one pass, if head/dispatch.py finds it cheaper than what is expected of routing
    otherwise                      score, then the backward of the tokens with c != 0, dense or routed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lad_kernels import checks
from lad_kernels.head import dispatch, flops
from lad_kernels.head.autograd import Head, live_tokens, spread, take, take_gradient
from lad_kernels.head.logits import HeadForward, HeadGradients, LogitGradient, Routing
from lad_kernels.head.logprobs import head_kind, prepare
from lad_kernels.head.routing import Certificate, route
from lad_kernels.objective.config import GRPOConfig, LADConfig
from lad_kernels.objective.policy import Config, PolicyInputs, PolicyTerms, compute_terms, validate
from lad_kernels.outputs import LossOutput
from lad_kernels.packing import Packing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.compiler.disable
def linear_lad_loss(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None = None,  # the shape of target_ids
    *,
    advantages: Tensor | None = None,  # [B], or the shape of target_ids
    rewards: Tensor | None = None,  # [B]
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    loss_mask: Tensor | None = None,  # the shape of target_ids
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: LADConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of target_ids
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of target_ids
    return_entropy: bool = False,
    return_logprobs: bool = True,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> LossOutput:
    """LAD (arXiv 2602.20132) from last hidden states and the lm_head weight, without storing N x V logits.

    Args:
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl: as for
            `linear_logprobs`. With a group the backward is dense and `head_flops` counts this rank's.
        old_logprobs: the behaviour policy's log-probs; None means on-policy: the ratio is exactly 1.
        advantages: one per sequence [B] or one per token. Give this or `rewards`.
        rewards: [B], turned into advantages by `config.advantage_scale`; needs `group_size` or `group_ids`.
        loss_mask: nonzero where a token counts. Others are dropped before the first product, get exactly zero
            gradient and may hold anything (-100, NaN). A fully masked batch gives a differentiable zero.
        cu_seqlens: int32 [B + 1] cumulative lengths of packed [N] input, flash-attention's convention.
        config, normalizer, ref_logprobs, rollout_is_weights: as for `lad_loss`.
        return_entropy: also return per-token entropy and its mean as a metric; free otherwise.
        return_logprobs: with False the log-probs are not returned, and where coefficients are known in advance
            (`old_logprobs` None, no KL, no entropy) tokens whose coefficient is 0 skip the forward too.

    Returns:
        LossOutput. `loss` is differentiable in hidden_states, lm_head_weight and bias; everything else is detached.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.config(config, LADConfig, "linear_grpo_loss")
    return _linear_policy_loss(**locals())


@torch.compiler.disable
def linear_grpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: GRPOConfig = GRPOConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    return_entropy: bool = False,
    return_logprobs: bool = True,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> LossOutput:
    """PPO-clip and its family (see `GRPOConfig`) in the same kernels; arguments as for `linear_lad_loss`."""
    checks.config(config, GRPOConfig, "linear_lad_loss")
    return _linear_policy_loss(**locals())


class LADLoss(nn.Module):
    """`linear_lad_loss` with its constants bound, for people who like modules.

    Args:
        config: what to minimise.
        **constants: any keyword of `linear_lad_loss` that stays the same from call to call, such as `temperature`,
            `softcap` or `group_size`.
    """

    def __init__(self, config: LADConfig = LADConfig(), **constants: Any):
        super().__init__()
        self.config, self.constants = config, constants

    def forward(
        self, hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, old_logprobs: Tensor | None = None,
        **batch: Any,
    ) -> LossOutput:  # fmt: skip
        """Arguments of `linear_lad_loss`; those given here override the bound ones."""
        return linear_lad_loss(
            hidden_states,
            lm_head_weight,
            target_ids,
            old_logprobs,
            **{**self.constants, "config": self.config, **batch},
        )

    def extra_repr(self) -> str:
        return ", ".join([repr(self.config), *(f"{k}={v!r}" for k, v in self.constants.items())])


def _linear_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    config: Config,
    return_entropy: bool,
    return_logprobs: bool,
    vocab_group: ProcessGroup | None,
    impl: str,
    **objective: Any,
) -> LossOutput:
    inputs = PolicyInputs(**objective)
    checks.plain_tensor("target_ids", target_ids)
    checks.vocab_group(vocab_group, impl, config.backward)
    validate(inputs, target_ids, "target_ids", config)
    hidden, weight, targets, packing, transform = prepare(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, inputs.loss_mask, impl,
        inputs.cu_seqlens, sharded=vocab_group is not None,
    )  # fmt: skip
    if impl == "reference":
        from lad_kernels import reference

        loss: Any = reference.linear_lad_loss if isinstance(config, LADConfig) else reference.linear_grpo_loss
        return loss(
            hidden, weight, target_ids.long(), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, config=config, return_entropy=return_entropy, return_logprobs=return_logprobs, **objective,
        )  # fmt: skip
    triton = checks.use_triton(impl, hidden.device, hidden.dtype)
    grad = torch.is_grad_enabled()
    needs = (
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        bool(grad and bias is not None and bias.requires_grad),
    )
    new_head = head_kind(vocab_group, hidden, weight, bias, targets)
    with torch.no_grad(), flops.counting() as tally:
        head = new_head(packing.take(hidden), weight, targets, bias, transform, triton)
        step = _Step(head, inputs, packing, config, impl, needs, return_logprobs, return_entropy)
        step.run()
    terms, spent = step.terms, targets.new_full((), tally[0], dtype=_widest(hidden.device))  # []
    loss = _LinearPolicyLoss.apply(hidden, weight, bias, targets, step, spent, new_head)
    entropy = None if step.entropy is None else packing.place(step.entropy)
    used = terms.advantages if inputs.advantages is None else inputs.advantages.detach()
    logprobs = packing.place(step.logprobs) if return_logprobs else None
    return LossOutput(loss, logprobs, entropy, used, {**terms.metrics, **step.metrics, "head_flops": spent})


def _widest(device: torch.device) -> torch.dtype:
    """A dtype in which flops are counted: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Step:
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
        self.metrics: dict[str, Tensor] = {}

    def objective(self, logprobs: Tensor, entropy: Tensor | None = None) -> PolicyTerms:  # [M], [M]
        return compute_terms(logprobs, entropy, self.inputs, self.packing, self.config, self.impl)

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
            want_block_lse = grad and dispatch.may_route(self.theta, self.config.backward)
            out = part.forward(want_entropy=self.want_entropy, want_block_lse=want_block_lse)
        self._place(out, show)
        self.terms = self.objective(self.logprobs, self.entropy)
        if grad:
            self._prepare(out)

    def _work(self, head: Head) -> dispatch.Work:
        (tokens, hidden_size), vocab = head.hidden.shape, len(head.weight)
        kind = dispatch.kind(head.hidden.device, head.triton)
        return dispatch.Work(tokens, hidden_size, vocab, head.hidden.dtype.itemsize, kind)

    def _one_pass(self, part: Head) -> HeadForward | None:
        """Forward and gradient at once if coefficients are known inside a chunk and it is worth it."""
        config, live, work = self.config, self.live, self._work(part)
        if config.entropy_coef != 0:
            return None
        if not dispatch.takes_one_pass(work, self.theta, backward=config.backward, known=self.known):
            return None
        whole = None if self.known or config.importance_sampling_level == "token" else self.packing.cu_seqlens
        chunks = _chunks(work.tokens, work.chunk_rows(), whole)
        if chunks is None:
            return None
        ahead = take(self.terms.dlogprobs, live) if self.known else None  # [A]

        def coefficients(rows: slice, logprobs: Tensor) -> Tensor:  # [A] -> [C]
            return (self.objective(logprobs).dlogprobs if ahead is None else ahead)[rows]

        prior = self.inputs.old_logprobs
        prior = None if prior is None else self.packing.take(prior.detach()).to(self.logprobs.dtype)  # [M]
        found = part.one_pass(prior, coefficients, chunks=chunks, want_entropy=self.want_entropy, needs=self.needs)
        out, self.ready = (None, None) if found is None else found
        return out

    def _place(self, out: HeadForward, show: bool) -> None:
        """Results of the tokens that passed, and of the others if they are asked for."""
        live = self.live
        if live is None:
            self.logprobs, self.entropy = out.logprobs, out.entropy
            return
        self.logprobs[live] = out.logprobs
        if show:
            dead = torch.ones_like(self.logprobs, dtype=torch.bool).index_fill_(0, live, False).nonzero()[:, 0]
            others = self.head.take(dead).forward(want_entropy=self.want_entropy)
            self.logprobs[dead] = others.logprobs
            if self.want_entropy:
                self.entropy = torch.empty_like(self.logprobs)
                self.entropy[live], self.entropy[dead] = out.entropy, others.entropy

    def _prepare(self, out: HeadForward) -> None:
        """Which tokens and blocks the backward multiplies; `out` covers all tokens, or the live ones if known."""
        gradient, lse, logprobs, block_lse = _gradient(self.terms, self.entropy), out.lse, out.logprobs, out.block_lse
        if self.known:
            gradient = take_gradient(gradient, self.live)
        elif self.ready is None:
            self.live = live_tokens(gradient)  # [A]
            gradient, lse, logprobs = (
                take_gradient(gradient, self.live),
                take(lse, self.live),
                take(logprobs, self.live),
            )
            if block_lse is not None and self.live is not None:
                block_lse = block_lse[:, self.live]
        self.lse, self.gradient, certificate = lse, gradient, None  # [A]
        tokens, work = len(lse), self._work(self.head)
        if block_lse is not None and tokens:
            part = self.head.take(self.live)
            routing, certificate = route(
                part.hidden, part.weight, part.targets, part.transform, lse, logprobs, block_lse, gradient, self.theta,
                dense_share=dispatch.SPEEDS[work.device].gathered, unbiased=self.config.tail == "unbiased",
            )  # fmt: skip
            dense, pairs = len(routing.dense), sum(routing.counts) + len(routing.dense) * work.blocks
            backward = self.config.backward
            pays = dispatch.takes_routed(work, self.theta, tokens, pairs, dense, backward=backward)
            if pays and dense < tokens:
                self.routing = routing
            else:
                certificate = None
        zero = self.logprobs.new_zeros(())  # []
        everything = zero + tokens * work.blocks
        certificate = certificate or Certificate(everything, zero, zero, zero, zero)
        self.metrics = {
            "kept_share": certificate.pairs / max(work.tokens * work.blocks, 1),
            "dropped_mass_mean": certificate.dropped_mass_mean,
            "dropped_mass_max": certificate.dropped_mass_max,
            "dhidden_bound": certificate.dhidden_bound,
            "dweight_bound": certificate.dweight_bound,
        }

    def backward(self, head: Head, upstream: Tensor) -> HeadGradients:
        """Gradients of the hidden states [M, D], weight and bias, times `upstream` []."""
        ready, self.ready = self.ready, None
        if ready is not None:  # the memory is handed on; a second backward computes again
            if upstream.device.type != "cpu" or upstream != 1:
                ready = HeadGradients(*(None if x is None else x.mul_(upstream) for x in ready))
            return ready
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


class _LinearPolicyLoss(torch.autograd.Function):
    """Gives the loss its gradient with respect to (hidden, weight, bias), from coefficients already known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, step: _Step, spent: Tensor,
        new_head: Callable[..., Head],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.packing, ctx.transform, ctx.triton = step.packing, step.head.transform, step.head.triton
        ctx.step, ctx.spent, ctx.new_head = step, spent, new_head
        ctx.set_materialize_grads(False)
        del step.head  # holds a packed copy of the hidden states
        return step.terms.loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:  # []
        checks.refuse_double_backward()
        if grad is None:
            return (None,) * 7
        hidden, weight, bias, targets = ctx.saved_tensors
        with flops.counting() as tally:
            head = ctx.new_head(ctx.packing.take(hidden), weight, targets, bias, ctx.transform, ctx.triton)
            found = ctx.step.backward(head, grad)
        ctx.spent += tally[0]
        return *spread(found, ctx.packing, ctx.step.live), None, None, None, None
