"""How sparse the logit gradient of a policy is: measured on your own hidden states, before you change a setting.

What the routed backward saves depends on how concentrated next-token distributions are. `profile_sparsity` runs the
forward and the routing rule of head/routing.py, without a backward, and reports by entropy what would be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import cost, dispatch
from lad_kernels.head.head import Head
from lad_kernels.head.operands import HeadArguments, prepare
from lad_kernels.head.records import BLOCK, LogitGradient, Needs
from lad_kernels.head.routing import ErrorBound, route

UNIT = "every coefficient is 0, as with equal rewards: measured with c = 1 for every token instead"


@dataclass(frozen=True)
class EntropyBucket:
    """Tokens of similar entropy."""

    entropy_low: float  # nats
    entropy_high: float
    tokens: int
    kept_share: float  # active (token, block) pairs over all pairs of these tokens
    zero_share: float  # tokens with coefficient 0, of which nothing is kept


@dataclass(frozen=True)
class SparsityProfile:
    """Result of `profile_sparsity`; `print` it, or `save_png` it."""

    tokens: int
    vocab_size: int
    tail_mass: float
    mean_entropy: float  # nats
    kept_share: float  # of all (token, block) pairs
    zero_share: float  # of all tokens
    dropped_mass_mean: float  # L1 norm of what is dropped over |c|, mean over tokens with c != 0
    dropped_mass_max: float
    dense_tokens: int  # tokens with so many pairs that the dense path takes them
    flops_share: float  # routed flops over the dense minimum 6 N D V
    predicted_speedup: float  # fastest dense path over routed, by the cost model that chooses a path
    buckets: tuple[EntropyBucket, ...]
    path: str  # that backward="auto" takes for these tokens with token-level ratios: one_pass, two_pass or routed
    unit_coefficients: bool = False  # the given ones were all 0, so that c = 1 was measured in their place

    def __str__(self) -> str:
        lines = [UNIT] if self.unit_coefficients else []
        lines += [
            f"{self.tokens} tokens, vocabulary {self.vocab_size}, mean entropy {self.mean_entropy:.3f} nats, "
            f"tail_mass {self.tail_mass:g}",
            f"kept {self.kept_share:.2%} of (token, block) pairs, {self.zero_share:.1%} of tokens without a gradient, "
            f"{self.dense_tokens} tokens dense",
            f"dropped gradient mass: mean {self.dropped_mass_mean:.2e}, largest {self.dropped_mass_max:.2e}",
            f"flops {self.flops_share:.2f} of the dense minimum; predicted time {1 / self.predicted_speedup:.2f} of "
            f"the fastest dense path's; backward='auto' takes {self.path}",
            "",
            "| entropy, nats | tokens | active pairs | zero coefficient |",
            "|---|---|---|---|",
        ]
        for b in self.buckets:
            span = f"{b.entropy_low:.3f} to {b.entropy_high:.3f}"
            lines.append(f"| {span} | {b.tokens} | {b.kept_share:.2%} | {b.zero_share:.1%} |")
        return "\n".join(lines)

    def save_png(self, path: str | Path) -> Path:
        """Kept share by entropy; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        low = [b.entropy_low for b in self.buckets]  # nats
        widths = [b.entropy_high - b.entropy_low for b in self.buckets]
        axes.bar(low, [100 * b.kept_share for b in self.buckets], widths, align="edge", edgecolor="white")
        axes.axhline(100 * self.kept_share, linestyle="--", color="black", label=f"all tokens: {self.kept_share:.2%}")
        axes.set_xlabel("entropy of the token's distribution, nats (equally many tokens in each)")
        axes.set_ylabel(f"active pairs of {BLOCK} columns, %")
        axes.set_title(f"tail_mass {self.tail_mass:g}, V = {self.vocab_size}")
        axes.legend()
        figure.savefig(path, dpi=150)
        return Path(path)


@torch.no_grad()
def profile_sparsity(
    model_or_hidden: nn.Module | Tensor,  # or hidden states [N, D] or [B, T, D]
    weight: Tensor | None = None,  # [V, D]
    target_ids: Tensor | None = None,  # [N] or [B, T]
    *,
    input_ids: Tensor | None = None,  # [B, T + 1]
    attention_mask: Tensor | None = None,  # [B, T + 1]
    coefficients: Tensor | None = None,  # the shape of target_ids
    loss_mask: Tensor | None = None,  # the shape of target_ids
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tail_mass: float | None = dispatch.DEFAULT_TAIL_MASS,
    tail: str = "unbiased",
    buckets: int = 10,
    impl: str = "auto",
) -> SparsityProfile:
    """What `tail_mass` would keep of the logit gradient of this policy on these tokens.

    Args:
        model_or_hidden: last hidden states, with `weight` and `target_ids` as for `linear_logprobs`; or a causal LM
            of transformers with `input_ids`, whose own forward runs. What it does to its logits is measured
            (`frameworks.transformers.attach_fused_head`), and the targets are the input shifted by one.
        coefficients: c = d loss / d logp per token, for instance advantages; None: 1 for every token, as where they
            are all 0 (equal rewards), which `unit_coefficients` of the result and its text say.
        loss_mask, bias, temperature, logit_scale, softcap, impl: as for `linear_logprobs`.
        tail_mass, tail: as in `LADConfig`.
        buckets: number of entropy buckets, equally filled.

    Returns:
        SparsityProfile: overall and by entropy the kept share, the share of tokens without a gradient, what is
        dropped, flops and the cost model's speed-up. Memory: 4 N V / 128 bytes of block masses.

    Raises:
        ValueError, TypeError: an argument is missing or of the wrong shape, dtype or device; the message says which.
    """
    if isinstance(model_or_hidden, nn.Module):
        for name, x in (("weight", weight), ("target_ids", target_ids), ("bias", bias), ("softcap", softcap)):
            if x is not None:
                raise ValueError(f"{name}: expected None with a model, got {type(x).__name__}; the model has its own")
        if logit_scale != 1.0:
            raise ValueError(f"logit_scale: expected 1 with a model, got {logit_scale}; the model has its own")
        if loss_mask is None and attention_mask is not None:
            loss_mask = attention_mask[:, 1:] * attention_mask[:, :-1]  # [B, T] no target of padding
        of_hidden = partial(
            profile_sparsity,
            coefficients=coefficients,
            loss_mask=loss_mask,
            temperature=temperature,
            tail_mass=tail_mass,
            tail=tail,
            buckets=buckets,
            impl=impl,
        )
        return _of_model(model_or_hidden, input_ids, attention_mask, of_hidden)
    if weight is None or target_ids is None:
        raise ValueError("weight, target_ids: needed with hidden states, got None")
    if impl == "reference":
        raise ValueError("impl: expected 'auto', 'triton' or 'torch', got 'reference', which has no routing")
    _check(tail_mass, tail, buckets)
    checks.per_token("coefficients", coefficients, target_ids, "target_ids")
    checks.mask(loss_mask, target_ids, "target_ids")
    given = HeadArguments(model_or_hidden, weight, target_ids, bias, temperature, logit_scale, softcap, None, impl)
    operands = prepare(given, loss_mask, None, {})
    if operands.layout.packing.tokens == 0:
        raise ValueError("target_ids, loss_mask: expected at least one token that counts, got none")
    tail_mass = dispatch.threshold(tail_mass, operands.hidden.dtype)
    c = None if coefficients is None else operands.layout.packing.select(coefficients)  # [M]
    return _measure(operands.head(), c, tail_mass, tail, buckets)


def _check(tail_mass: float | None, tail: str, buckets: int) -> None:
    if tail_mass is not None and not (checks.is_number(tail_mass) and 0 <= tail_mass < math.inf):
        raise ValueError(f"tail_mass: expected a finite number >= 0 or None, got {tail_mass!r}")
    if tail not in ("unbiased", "drop"):
        raise ValueError(f"tail: expected 'unbiased' or 'drop', got {tail!r}")
    if buckets < 1:
        raise ValueError(f"buckets: expected at least 1, got {buckets}")


@without_autocast
def _measure(head: Head, c: Tensor | None, tail_mass: float, tail: str, buckets: int) -> SparsityProfile:  # [M]
    """Forward and routing; c None: 1 for every token."""
    out = head.forward(want_entropy=True, want_block_lse=True)
    unit = c is not None and len(c) > 0 and not c.any()
    c = torch.ones_like(out.lse) if c is None or unit else c.to(out.lse.dtype)  # [M]
    work = head.work(Needs(hidden=True, weight=True, bias=False))
    active, kept = c.nonzero()[:, 0], torch.zeros_like(head.targets)  # [A] the others have nothing to drop, [M]
    dense, bound = active, ErrorBound(0, 0, *[out.lse.new_zeros(())] * 4)
    if len(active):
        part = head.select(active)
        routing, bound = route(
            part.hidden, part.weight, part.targets, part.transform, out.lse[active], out.logprobs[active],
            out.block_lse[:, active], LogitGradient(c[active], -c[active]), tail_mass, tokens=part.tokens,
            dense_share=cost.dense_share(work), unbiased=tail == "unbiased", triton=part.triton,
        )  # fmt: skip
        dense = active[routing.dense]  # [Nd] tokens that keep every block
        kept[active] = torch.bincount(routing.rows, minlength=len(active))
        kept[dense] = work.blocks
    pairs, active_tokens, whole = int(kept.sum()), len(active), len(dense)
    fastest = cost.score(work) + cost.dense(work, active_tokens)
    routed = cost.score(work) + cost.routed(work, pairs - whole * work.blocks, whole, active_tokens)
    path = "routed" if dispatch.takes_routed(work, active_tokens, pairs, whole, backward="auto") else "two_pass"
    if head.has_one_pass(need_bias=False):
        fastest = min(fastest, cost.one_pass(work, active_tokens))
        rule = dispatch.Sparsity(tail_mass, unbiased=True, backward="auto")
        shares = dispatch.Shares(
            active_tokens / work.tokens, pairs / max(active_tokens * work.blocks, 1), whole / max(active_tokens, 1)
        )
        path = "one_pass" if dispatch.takes_one_pass(work, rule, shares) else path
    return SparsityProfile(
        tokens=work.tokens,
        vocab_size=work.vocab_size,
        tail_mass=tail_mass,
        mean_entropy=out.entropy.mean().item(),
        kept_share=pairs / (work.tokens * work.blocks),
        zero_share=1 - active_tokens / work.tokens,
        dropped_mass_mean=bound.dropped_mass_mean.item(),
        dropped_mass_max=bound.dropped_mass_max.item(),
        dense_tokens=whole,
        flops_share=1 / 3 + pairs / (work.tokens * work.blocks),
        predicted_speedup=fastest / routed,
        buckets=_buckets(out.entropy, c, kept.double() / work.blocks, buckets),
        path=path,
        unit_coefficients=unit,
    )


def _buckets(entropy: Tensor, c: Tensor, kept: Tensor, count: int) -> tuple[EntropyBucket, ...]:
    """`count` buckets, equally filled, from entropy, coefficient and share of active pairs of each token [M]."""
    filled = []
    for part in entropy.argsort().tensor_split(count):
        if len(part):
            nats, share = entropy[part], kept[part].mean().item()
            zero = (c[part] == 0).double().mean().item()
            filled.append(EntropyBucket(nats.min().item(), nats.max().item(), len(part), share, zero))
    return tuple(filled)


def _of_model(
    model: Any,
    input_ids: Tensor | None,  # [B, T + 1]
    attention_mask: Tensor | None,  # [B, T + 1]
    of_hidden: Callable[..., SparsityProfile],  # hidden states, weight, targets and the head's own arguments
) -> SparsityProfile:
    """The profile of a model's own head, whose logit transform the adapter measures."""
    from lad_kernels.frameworks.transformers import attach_fused_head

    if input_ids is None:
        raise ValueError("input_ids: needed with a model, got None; give token ids [B, T + 1]")
    base = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    attached = "_fused_head" in vars(base)
    fused, profiles = attach_fused_head(model), []

    def measure(hidden: Tensor, weight: Tensor, **head: Any) -> tuple:  # [B, T + 1, D], [V, D]
        if "vocab_group" in head:
            raise ValueError(
                "model_or_hidden: expected a head that is whole on this rank, got one that tp_plan spreads over ranks; "
                "load the model without tp_plan"
            )
        profiles.append(of_hidden(hidden[:, :-1], weight, input_ids[:, 1:], **head))
        return ()

    try:
        model(input_ids=input_ids, attention_mask=attention_mask, fused_head=measure)
    finally:
        if not attached:
            fused.detach()
    return profiles[-1]  # the last: the adapter calls again if the model's config was misleading
