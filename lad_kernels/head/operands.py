"""From what the user gave to what the head computes on: validated, in one dtype, masked tokens dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head.head import Head
from lad_kernels.head.records import LogitTransform, Needs
from lad_kernels.outputs import LinearLogprobs
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
    capturable: bool = False

    def flat(self) -> tuple:
        """As an operator takes them, in the order of SCHEMA."""
        t, group = self.temperature, self.vocab_group
        checks.constant("temperature", t)  # an operator would not see that a gradient is expected of it
        temperatures, temperature = (t, 1.0) if isinstance(t, Tensor) else (None, t)
        name = "" if group is None else group.group_name
        return (*self[:4], temperatures, temperature, *self[5:7], name, self.impl, self.capturable)

    @classmethod
    def of_flat(cls, flat: Sequence[Any]) -> HeadArguments:
        """Of what `flat` gave."""
        hidden, weight, targets, bias, temperatures, temperature, scale, softcap, name, impl, capturable = flat
        group = None
        if name:
            from torch.distributed.distributed_c10d import _resolve_process_group as group_named

            group = group_named(name)
        temperature = temperature if temperatures is None else temperatures
        return cls(hidden, weight, targets, bias, temperature, scale, softcap, group, impl, capturable)


SCHEMA = (
    "Tensor hidden_states, Tensor lm_head_weight, Tensor target_ids, Tensor? bias, Tensor? temperatures, "
    "float temperature, float logit_scale, float? softcap, str vocab_group, str impl, bool capturable"
)
ARGUMENTS = SCHEMA.count(",") + 1


@dataclass(frozen=True)
class Layout:
    """How operands become a `Head`: everything that autograd does not save."""

    packing: Packing
    transform: LogitTransform
    triton: bool
    shard: Shard | None  # this rank's part of the vocabulary; None: all rows are here

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Head:
        """hidden [N, D] or [B, T, D], weight [V, D], bias [V], targets [M]."""
        rows, tokens = self.packing.flatten(hidden)
        if self.shard is None:
            return Head(rows, weight, targets, bias, self.transform, self.triton, tokens)
        from lad_kernels.head.vocab_parallel import ShardedHead

        return ShardedHead(rows, weight, targets, bias, self.transform, self.triton, tokens, shard=self.shard)

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Tokens that take part [M] and temperatures [M], for autograd to save."""
        return self.packing.kept, self.transform.temperatures

    def holding(self, kept: Tensor | None, temperatures: Tensor | None) -> Layout:
        """The same with these tensors and no others, for a backward."""
        number = 1.0 if self.transform.temperatures is not None else self.transform.temperature
        transform = replace(self.transform, temperature=number if temperatures is None else temperatures)
        return replace(self, packing=Packing(self.packing.shape, kept, None), transform=transform)


class Operands(NamedTuple):
    """What the head computes on. `hidden` and `weight` are in the dtype to compute in."""

    hidden: Tensor  # [N, D] or [B, T, D]
    weight: Tensor  # [V, D], or this rank's rows
    bias: Tensor | None  # [V]
    targets: Tensor  # [M]
    layout: Layout

    def head(self) -> Head:
        """The head on the M tokens that take part."""
        return self.layout.head(self.hidden, self.weight, self.bias, self.targets)

    def needs(self) -> Needs:
        """Which gradients are asked for."""
        return Needs.of(self.hidden, self.weight, self.bias)

    def for_reference(self, given: HeadArguments) -> HeadArguments:
        """`given` as the reference takes it: in the dtype to compute in, targets as int64."""
        return given._replace(hidden_states=self.hidden, lm_head_weight=self.weight, target_ids=given.target_ids.long())

    @without_autocast
    def reference_logprobs(self, given: HeadArguments, loss_mask: Tensor | None, entropy: bool) -> LinearLogprobs:
        """The specification's log-probs on validated arguments; loss_mask in the shape of target_ids."""
        from lad_kernels import reference

        head = self.for_reference(given)
        return reference.linear_logprobs(
            head.hidden_states,
            head.lm_head_weight,
            head.target_ids,
            bias=head.bias,
            temperature=head.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            loss_mask=loss_mask,
            return_entropy=entropy,
        )


def in_autocast_dtype(given: HeadArguments) -> HeadArguments:
    """Checked, with hidden states and weight in the dtype of torch.autocast, if that is on."""
    hidden, weight = given.hidden_states, given.lm_head_weight
    if not torch.compiler.is_compiling():  # the operators check again what they are given
        sharded = given.vocab_group is not None
        checks.plain_tensor("hidden_states", hidden)
        if given.impl != "reference":
            for name in ("hidden_states", "lm_head_weight", "bias"):
                checks.no_tangent(name, getattr(given, name))
        autocast = torch.is_autocast_enabled(hidden.device.type)
        checks.head(hidden, weight, given.target_ids, given.bias, autocast=autocast, sharded=sharded)
        checks.transform(given.temperature, given.logit_scale, given.softcap, given.target_ids)
    if not torch.is_autocast_enabled(hidden.device.type):
        return given
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return given._replace(hidden_states=hidden.to(dtype), lm_head_weight=weight.to(dtype))


def prepare(
    given: HeadArguments,
    loss_mask: Tensor | None,  # the shape of target_ids
    cu_seqlens: Tensor | None,  # [B + 1]
    replicated: Mapping[str, object],
    needs: Needs | None = None,
) -> Operands:
    """Validate and pack; collective on the vocabulary group.

    Args:
        replicated: arguments besides those of `given` that must be the same on every rank of the group, by name.
        needs: which gradients are asked for; None: those of inputs that require one.
    """
    checks.impl(given.impl)
    if given.capturable:
        checks.capturable(loss_mask=loss_mask, vocab_group=given.vocab_group, reference=given.impl == "reference")
    given = in_autocast_dtype(given)
    hidden, weight = given.hidden_states, given.lm_head_weight
    triton = checks.use_triton(given.impl, hidden.device, hidden.dtype)
    packing = pack(given.target_ids, loss_mask, cu_seqlens)
    targets = packing.select(given.target_ids).long()  # [M]
    if packing.inside is not None:
        targets = targets.masked_fill(~packing.inside, 0)  # those beyond the last bound may hold anything
    shard = None
    if given.vocab_group is not None:
        from lad_kernels.head import vocab_parallel

        shard = vocab_parallel.join(given, targets, replicated, packing, needs or Needs.of(hidden, weight, given.bias))
    checks.target_range(targets, len(weight) if shard is None else shard.vocabulary)
    layout = Layout(packing, _transform(given, packing), triton, shard)
    return Operands(hidden, weight, given.bias, targets, layout)


def every_position(given: HeadArguments, rows: list[int]) -> Head:
    """The head on all N positions, whose targets may be anything where masked; `rows` of every rank, or none.

    For a backward: the call has been checked, and tokens without a gradient are left out later.
    """
    hidden, weight, group = given.hidden_states, given.lm_head_weight, given.vocab_group
    packing, shard, vocabulary = Packing(given.target_ids.shape, None, None), None, len(weight)
    if group is not None:
        from lad_kernels.head.vocab_parallel import Shard

        shard, vocabulary = Shard(group, group.rank(), rows), sum(rows)
    targets = given.target_ids.reshape(-1).long().clamp(0, vocabulary - 1)  # [N]
    triton = checks.use_triton(given.impl, hidden.device, hidden.dtype)
    return Layout(packing, _transform(given, packing), triton, shard).head(hidden, weight, given.bias, targets)


def _transform(given: HeadArguments, packing: Packing) -> LogitTransform:
    temperature, softcap = given.temperature, given.softcap
    if isinstance(temperature, Tensor):
        wide = temperature.detach().to(torch.promote_types(given.hidden_states.dtype, torch.float32))
        temperature = packing.select(wide.expand(given.target_ids.shape))  # [M]
    else:
        temperature = float(temperature)
    return LogitTransform(float(given.logit_scale), None if softcap is None else float(softcap), temperature)
