"""From what the user gave to what the head computes on: validated, in one dtype, masked tokens dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.head.head import Head
from lad_kernels.head.records import LogitTransform, Needs
from lad_kernels.packing import Packing, pack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lad_kernels.head.vocab_parallel import Shard


class HeadArguments(NamedTuple):
    """The head's part of a call, as the user gave it; see `linear_logprobs`."""

    hidden_states: Tensor  # [N, D] or [B, T, D]
    lm_head_weight: Tensor  # [V, D]
    target_ids: Tensor  # [N] or [B, T]
    bias: Tensor | None  # [V]
    temperature: float | Tensor  # a number, or the shape of target_ids
    logit_scale: float
    softcap: float | None
    vocab_group: ProcessGroup | None
    impl: str


@dataclass(frozen=True)
class Layout:
    """How operands become a `Head`: everything that autograd does not save."""

    packing: Packing
    transform: LogitTransform
    triton: bool
    shard: Shard | None  # this rank's part of the vocabulary; None: all rows are here

    def head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor | None
    ) -> Head:
        """hidden [N, D] or [B, T, D], weight [V, D], bias [V], targets [M], temperatures [M] as they were saved."""
        rows, tokens = self.packing.source(hidden)
        transform = self.transform.at(temperatures)
        if self.shard is None:
            return Head(rows, weight, targets, bias, transform, self.triton, tokens)
        from lad_kernels.head.vocab_parallel import ShardedHead

        return ShardedHead(rows, weight, targets, bias, transform, self.triton, tokens, shard=self.shard)


class Operands(NamedTuple):
    """What the head computes on. `hidden` and `weight` are in the dtype to compute in."""

    hidden: Tensor  # [N, D] or [B, T, D]
    weight: Tensor  # [V, D], or this rank's rows
    bias: Tensor | None  # [V]
    targets: Tensor  # [M]
    layout: Layout

    def head(self) -> Head:
        """The head on the M tokens that take part."""
        temperatures = self.layout.transform.temperatures
        return self.layout.head(self.hidden, self.weight, self.bias, self.targets, temperatures)

    def needs(self) -> Needs:
        """Which gradients are asked for."""
        return Needs.of(self.hidden, self.weight, self.bias)


def prepare(
    given: HeadArguments,
    loss_mask: Tensor | None,  # the shape of target_ids
    cu_seqlens: Tensor | None,  # [B + 1]
    replicated: Mapping[str, object],
) -> Operands:
    """Validate and pack; collective on the vocabulary group.

    Args:
        replicated: arguments besides those of `given` that must be the same on every rank of the group, by name.
    """
    sharded, weight, hidden = given.vocab_group is not None, given.lm_head_weight, given.hidden_states
    checks.impl(given.impl)
    checks.plain_tensor("hidden_states", hidden)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    checks.head(hidden, weight, given.target_ids, given.bias, autocast=autocast, sharded=sharded)
    checks.transform(given.temperature, given.logit_scale, given.softcap, given.target_ids)
    if autocast:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    triton = checks.use_triton(given.impl, hidden.device, hidden.dtype)
    packing = pack(given.target_ids, loss_mask, cu_seqlens)
    targets = packing.take(given.target_ids).long()  # [M]
    if packing.inside is not None:
        targets = targets.masked_fill(~packing.inside, 0)  # those beyond the last bound may hold anything
    shard = None
    if given.vocab_group is not None:
        from lad_kernels.head import vocab_parallel

        own = {name: getattr(given, name) for name in ("temperature", "logit_scale", "softcap", "impl")}
        alike = {"hidden_states": hidden, **own, **replicated}
        shard = vocab_parallel.join(given.vocab_group, hidden, weight, given.bias, targets, alike, packing)
    checks.target_range(targets, len(weight) if shard is None else shard.vocabulary)
    layout = Layout(packing, _transform(given, packing, hidden.dtype), triton, shard)
    return Operands(hidden, weight, given.bias, targets, layout)


def _transform(given: HeadArguments, packing: Packing, dtype: torch.dtype) -> LogitTransform:
    temperature, softcap = given.temperature, given.softcap
    if isinstance(temperature, Tensor):
        wide = temperature.detach().to(torch.promote_types(dtype, torch.float32))
        temperature = packing.take(wide.expand(given.target_ids.shape))  # [M]
    else:
        temperature = float(temperature)
    return LogitTransform(float(given.logit_scale), None if softcap is None else float(softcap), temperature)
