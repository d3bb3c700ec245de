"""What an objective is given besides log-probabilities: as the user gave it, its checks, and what backends read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.objective.config import PolicyConfig
from lad_kernels.packing import Packing, pack


class PolicyInputs(NamedTuple):
    """What the objective is given besides the log-probabilities, as the user gave it: per token is [N] or [B, T]."""

    old_logprobs: Tensor | None = None  # per token
    advantages: Tensor | None = None  # [B] or per token
    rewards: Tensor | None = None  # [B]
    group_size: int | None = None
    group_ids: Tensor | None = None  # [B]
    loss_mask: Tensor | None = None  # per token
    cu_seqlens: Tensor | None = None  # [B + 1]
    normalizer: float | Tensor | None = None
    ref_logprobs: Tensor | None = None  # per token
    entropy: Tensor | None = None  # per token
    rollout_is_weights: Tensor | None = None  # [B] or per token


def validate(inputs: PolicyInputs, like: Tensor, like_name: str, config: PolicyConfig) -> PolicyInputs:
    """Check everything the objective needs, before anything runs; `like` holds one value per token.

    Returns the inputs with [B] where [B, 1] was given for one value per sequence.
    """
    count = checks.layout(like, like_name, inputs.cu_seqlens)
    inputs = without_columns(inputs, like, like_name)
    for name in ("old_logprobs", "ref_logprobs", "entropy"):
        checks.per_token(name, getattr(inputs, name), like, like_name)
    checks.mask(inputs.loss_mask, like, like_name)
    checks.normalizer(inputs.normalizer)
    _validate_signal(inputs, count, like, like_name)
    if inputs.rollout_is_weights is not None:
        checks.per_sequence("rollout_is_weights", inputs.rollout_is_weights, count, like, like_name)
    if config.kl_coef != 0 and inputs.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: needed because config.kl_coef is {config.kl_coef}, got None")
    if count is None and (config.importance_sampling_level != "token" or config.loss_agg_mode != "token-mean"):
        raise ValueError(
            f"cu_seqlens: needed on packed input for importance_sampling_level={config.importance_sampling_level!r} "
            f"and loss_agg_mode={config.loss_agg_mode!r}, got None"
        )
    if config.loss_agg_mode == "seq-mean-token-sum-norm" and like.ndim == 1 and inputs.normalizer is None:
        raise ValueError(
            "normalizer: needed on packed input for loss_agg_mode='seq-mean-token-sum-norm', got None; pass "
            "B * max_completion_length"
        )
    if config.norms_target and inputs.advantages is not None and inputs.advantages.shape != (count,):
        raise ValueError("advantages: target_norm='group' needs one per sequence [B], got one per token")
    if config.norms_target or inputs.rewards is not None:
        checks.groups(count, like.device, inputs.group_size, inputs.group_ids)
    _validate_values(inputs, like, config)
    return inputs


def without_columns(inputs: PolicyInputs, like: Tensor, like_name: str) -> PolicyInputs:
    """Frameworks keep one value per sequence as [B, 1], to broadcast over [B, T]."""
    count = checks.layout(like, like_name, inputs.cu_seqlens)

    def flat(x: Tensor | None) -> Tensor | None:
        column = isinstance(x, Tensor) and x.shape == (count, 1) and x.shape != like.shape
        return x[:, 0] if column else x

    return inputs._replace(advantages=flat(inputs.advantages), rollout_is_weights=flat(inputs.rollout_is_weights))


def _validate_values(inputs: PolicyInputs, like: Tensor, config: PolicyConfig) -> None:
    """Checks of values, for the tokens that count, where they may be read."""
    if not checks.may_read(like):
        return
    packing = pack(like.detach(), inputs.loss_mask, inputs.cu_seqlens)
    tokens = packing.scatter_back(
        torch.ones(packing.tokens, dtype=torch.bool, device=like.device)
    )  # the shape of `like`
    sequences = None if packing.cu_seqlens is None else lengths_of(packing.cu_seqlens, packing.inside) > 0  # [B]
    logprobs = like if like.dtype.is_floating_point else None  # target_ids else
    given = {"old_logprobs": inputs.old_logprobs, "ref_logprobs": inputs.ref_logprobs, "logprobs": logprobs}
    for name, x in given.items():
        if x is not None:
            checks.log_probs(name, x, tokens)
    for name, check in (("advantages", checks.signal), ("rollout_is_weights", checks.weights)):
        x = getattr(inputs, name)
        if x is not None:
            by_sequence = sequences is not None and x.shape == sequences.shape
            every = config.norms_target and name == "advantages"  # also of sequences without a token
            check(name, x, torch.ones_like(sequences) if every else sequences if by_sequence else tokens)


def _validate_signal(inputs: PolicyInputs, count: int | None, like: Tensor, like_name: str) -> None:
    """Exactly one of advantages and rewards, of the right size."""
    if (inputs.advantages is None) == (inputs.rewards is None):
        both = "both" if inputs.rewards is not None else "neither"
        raise ValueError(f"advantages, rewards: expected exactly one, got {both}")
    if inputs.advantages is not None:
        checks.per_sequence("advantages", inputs.advantages, count, like, like_name)
        return
    checks.rewards(inputs.rewards, like, like_name)
    if count is None or len(inputs.rewards) != count:
        have = "packed tokens without cu_seqlens" if count is None else f"{count} sequences"
        raise ValueError(f"rewards: expected one per sequence, got {len(inputs.rewards)} for {have}")


@dataclass(frozen=True)
class PackedInputs:
    """What a backend reads besides log-probs and entropy, for the M tokens that pass through the head."""

    normalizer: Tensor  # [] the divisor Z
    cu_seqlens: Tensor | None = None  # [B + 1]; None: no sequences, everything is per token
    usable: Tensor | None = None  # [M] False: takes no part, whatever its inputs hold; None: all take part
    old_logprobs: Tensor | None = None  # [M]; None: the ratio is exactly 1
    ref_logprobs: Tensor | None = None  # [M], read if config.kl_coef is not 0
    advantages: Tensor | None = None  # [B], or [M] if advantages_by_token
    advantages_by_token: bool = False
    rewards: Tensor | None = None  # [B]; exactly one of advantages and rewards
    group_ids: Tensor | None = None  # [B] integers, for rewards and for the target's norm
    rollout_is_weights: Tensor | None = None  # [B], or [M] if weights_by_token
    weights_by_token: bool = False
    # Set by a backend's `prepare`:
    prepared: bool = False
    shift: Tensor | None = None  # [B] log of the mean of e^u over each sequence's group, if config.norms_target
    lengths: Tensor | None = None  # [B] tokens of each sequence that take part; None: no sequences

    def with_advantages(self, advantages: Tensor, shift: Tensor | None) -> PackedInputs:
        """Prepared: advantages [B] or [M] in the place of rewards, and all that does not depend on log-probs."""
        lengths = None if self.cu_seqlens is None else lengths_of(self.cu_seqlens, self.usable)  # [B]
        return replace(self, prepared=True, rewards=None, advantages=advantages, shift=shift, lengths=lengths)

    def chunk(self, rows: slice) -> PackedInputs:
        """Prepared inputs of the tokens `rows` [C]; values per sequence stay [B], even in a chunk of a part."""

        def cut(x: Tensor | None, by_token: bool = True) -> Tensor | None:  # [M] -> [C]
            return x[rows] if by_token and x is not None else x

        return replace(
            self,
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.clamp(rows.start, rows.stop) - rows.start,
            usable=cut(self.usable),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            advantages=cut(self.advantages, self.advantages_by_token),
            rollout_is_weights=cut(self.rollout_is_weights, self.weights_by_token),
        )


def tokens_by_input(inputs: PolicyInputs, packing: Packing, config: PolicyConfig) -> Tensor | None:
    """[M] True where every input that the objective reads is finite; None if there is no such input.

    Inputs are log-probs and weights of a rollout or reference engine; a NaN of the policy itself is not looked for.
    """
    weights = inputs.rollout_is_weights
    given = (
        (inputs.old_logprobs, True),
        (inputs.ref_logprobs if config.kl_coef != 0 else None, True),
        (weights, has_values_by_token(weights, packing)),
    )
    finite = None
    for x, by_token in given:
        if x is None:
            continue
        good = x.detach().abs() < torch.inf  # isfinite is four kernels on a GPU
        good = packing.select(good) if by_token else good[packing.sequence]  # [M]
        finite = good if finite is None else finite & good
    return finite


def has_values_by_token(x: Tensor | None, packing: Packing) -> bool:
    """False: none, or one per sequence. Where N equals B, a packed [B] is read as one per sequence."""
    return x is not None and (packing.cu_seqlens is None or x.shape != (len(packing.cu_seqlens) - 1,))


def lengths_of(cu_seqlens: Tensor, usable: Tensor | None) -> Tensor:  # [B + 1], [M] -> [B]
    """Tokens of each sequence that count."""
    if usable is None:
        return cu_seqlens.diff().long()
    before = torch.cat([usable.new_zeros(1, dtype=torch.long), usable.cumsum(0)])  # [M + 1]
    return before[cu_seqlens.long()].diff()
