"""linear_logprobs: validate, pack, choose a path, unpack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head.autograd import Head, LinearLogprobsFunction
from lad_kernels.head.records import LogitTransform
from lad_kernels.outputs import LinearLogprobs
from lad_kernels.packing import Packing, pack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.compiler.disable
def linear_logprobs(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # number, or the shape of target_ids
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_mask: Tensor | None = None,  # the shape of target_ids
    return_entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> LinearLogprobs:
    """Token log-probabilities of z = softcap(logit_scale (h W^T + b)) / temperature, without storing logits.

    Differentiable in hidden_states, lm_head_weight and bias through log-probs, entropy and lse. Under torch.compile
    the call is a graph break. Under torch.autocast hidden states and weight are cast to its dtype, and it changes
    nothing else.

    Args:
        hidden_states: [N, D] or [B, T, D], bfloat16, float16, float32 or float64; after the final norm.
        lm_head_weight: [V, D], same dtype, as `lm_head.weight` stores it.
        target_ids: [N] or [B, T] integers in [0, V), already shifted: target_ids[t] is predicted by hidden_states[t].
        bias: [V] head bias.
        temperature: a number, or a float tensor with one value per token.
        logit_scale: multiplies the product (Cohere's logit_scale; for Granite 1 / logits_scaling).
        softcap: c in c tanh(z / c) (Gemma's final_logit_softcapping).
        loss_mask: nonzero where a token counts; other positions return 0, get exactly zero gradient and may hold
            anything. Costs one host sync on an accelerator.
        return_entropy: also return the entropy of each token's distribution.
        vocab_group: the process group over which the rows of the head are spread. lm_head_weight [V_r, D] and bias
            [V_r] are then this rank's consecutive rows, in rank order and of any number (0 too; cut padding rows off
            with weight[:rows]). Everything else is the same on every rank, target_ids are numbered over the whole
            vocabulary, and every rank makes every call and every backward. Results are the same on every rank; dH is
            in full on every rank and must not be summed again, dW is that of the local rows. A DTensor's rows are
            weight.to_local(). Two all-gathers forward, all-reduces of dH backward, one host sync.
        impl: `auto` (Triton on CUDA and ROCm, PyTorch elsewhere), `triton`, `torch` or `reference`.

    Returns:
        LinearLogprobs of float32 tensors (float64 for float64 input), shaped like target_ids.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.plain_tensor("target_ids", target_ids)
    checks.mask(loss_mask, target_ids, "target_ids")
    checks.vocab_group(vocab_group, impl)
    hidden, weight, targets, packing, transform = prepare(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, loss_mask, impl,
        sharded=vocab_group is not None,
    )  # fmt: skip
    if impl == "reference":
        from lad_kernels import reference

        return without_autocast(reference.linear_logprobs)(
            hidden, weight, target_ids.long(), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, loss_mask=loss_mask, return_entropy=return_entropy,
        )  # fmt: skip
    replicated = {
        "hidden_states": hidden, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
        "loss_mask": loss_mask, "return_entropy": return_entropy, "impl": impl,
    }  # fmt: skip
    logprobs, entropy, lse = LinearLogprobsFunction.apply(
        hidden,
        weight,
        bias,
        targets,
        packing,
        transform,
        return_entropy,
        checks.use_triton(impl, hidden.device, hidden.dtype),
        head_kind(vocab_group, hidden, weight, bias, targets, replicated, packing),
    )
    place = packing.place
    return LinearLogprobs(place(logprobs), None if entropy is None else place(entropy), place(lse))


def prepare(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float | Tensor,
    logit_scale: float, softcap: float | None, loss_mask: Tensor | None, impl: str, cu_seqlens: Tensor | None = None,
    *, sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Packing, LogitTransform]:  # fmt: skip
    """Validate what the head needs and pack it; with `sharded` the range of the targets is not known yet.

    Returns hidden and weight in the dtype to compute in, targets [M], packing and transform.
    """
    checks.impl(impl)
    checks.plain_tensor("hidden_states", hidden)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    checks.head(hidden, weight, target_ids, bias, autocast=autocast, sharded=sharded)
    checks.transform(temperature, logit_scale, softcap, target_ids)
    if autocast:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if impl != "reference":
        checks.use_triton(impl, hidden.device, hidden.dtype)
    packing = pack(target_ids, loss_mask, cu_seqlens)
    targets = packing.take(target_ids).long()  # [M]
    if packing.inside is not None:
        targets = targets.masked_fill(~packing.inside, 0)  # those beyond the last bound may hold anything
    if not sharded:
        checks.target_range(targets, len(weight))
    if isinstance(temperature, Tensor):
        full = temperature.detach().to(torch.promote_types(hidden.dtype, torch.float32)).expand(target_ids.shape)
        temperature = packing.take(full)  # [M]
    else:
        temperature = float(temperature)
    softcap = None if softcap is None else float(softcap)
    return hidden, weight, targets, packing, LogitTransform(float(logit_scale), softcap, temperature)


def head_kind(
    vocab_group: ProcessGroup | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    replicated: Mapping[str, object], packing: Packing,
) -> Callable[..., Head]:  # fmt: skip
    """What builds a head from the fields of `Head`: all rows here, or spread over a group (collective).

    `replicated` are the arguments that must be the same on every rank of the group, by name.
    """
    if vocab_group is None:
        return Head
    from lad_kernels.head import vocab_parallel

    shard = vocab_parallel.join(vocab_group, hidden, weight, bias, targets, replicated, packing)
    checks.target_range(targets, shard.vocabulary)
    return functools.partial(vocab_parallel.ShardedHead, shard=shard)
