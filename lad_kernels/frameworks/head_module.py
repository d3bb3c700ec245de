"""The head module of a language model as one product, logits = hidden weight^T + bias; other heads are refused.

LoRA on the head is concatenated along the hidden size, logits = [h, A dropout(h)] [W, s B]^T, which is exact without
merging. The concatenated weight is a copy of W during the call, and its gradient is computed for W and B together; the
same holds for rows trained by PEFT (`trainable_token_indices`). Of a head that transformers shards over ranks
(`tp_plan`) the local rows are used, with their process group.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOKENS = ("peft.tuners.trainable_tokens", "TrainableTokensLayer")


class Head(NamedTuple):
    """A head as one product: logits = hidden weight^T + bias, before scale and softcap."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    vocab_group: Any = None  # the ranks that have the other rows; weight and bias are then the local ones

    def options(self) -> dict[str, Any]:
        """Arguments of the functions of `lad_kernels` besides hidden states and weight."""
        return {"bias": self.bias} | ({} if self.vocab_group is None else {"vocab_group": self.vocab_group})


def effective_head(layer: nn.Module, hidden: Tensor) -> Head:
    """The layer with its active LoRA adapters as one product, in one dtype; hidden is [..., D].

    Raises:
        TypeError, ValueError: a layer or weight that this cannot be computed for.
    """
    base, adapters = head_parts(layer)
    weight, bias, group = base.weight, base.bias, None  # [V, D], [V]
    if hasattr(weight, "placements"):
        if adapters:
            raise TypeError(
                f"lm_head: expected no adapter on a head that tp_plan spreads over ranks, got {', '.join(adapters)}; "
                f"load the model without tp_plan, or train it without adapters"
            )
        group = weight.device_mesh.get_group()
        weight, bias = (None if x is None else x.to_local() for x in (weight, bias))  # [V_r, D], [V_r]
    if adapters and _is(layer, *TOKENS):
        weight, bias, adapters = layer.get_merged_weights(adapters), None, ()  # as the layer's own forward does
    # A float32 head on a 16-bit body computes in float32; `HeadCall.check_head` verifies that.
    dtype = autocast_dtype(weight.device.type) or torch.promote_types(hidden.dtype, weight.dtype)
    hidden = hidden.to(weight.device)
    inputs, blocks = [hidden.to(dtype)], [weight.to(dtype)]
    for name in adapters:
        down, up = layer.lora_A[name], layer.lora_B[name]
        x = hidden.to(down.weight.dtype)
        inputs.append(down(layer.lora_dropout[name](x)).to(dtype))  # [..., r]
        # Through the module, so that its hooks see the call: rows B^T, then a row for an input of 0, its bias.
        rank = layer.r[name]
        rows = layer.scaling[name] * up(torch.eye(rank + 1, rank, dtype=up.weight.dtype, device=x.device))  # [r+1, V]
        blocks.append((rows[:-1] - rows[-1]).T.to(dtype))  # [V, r]
        if up.bias is not None:
            bias = rows[-1] if bias is None else bias + rows[-1]
    if adapters:
        return Head(torch.cat(inputs, -1), torch.cat(blocks, 1), bias)
    return Head(inputs[0], blocks[0], bias, group)


def without_dropout(layer: nn.Module) -> nn.Module:
    """The layer without its adapters' dropout: another object with the same weights, since threads share the layer."""
    if not hasattr(layer, "lora_dropout"):
        return layer
    copy = object.__new__(type(layer))
    identities = nn.ModuleDict({name: nn.Identity() for name in layer.lora_dropout})
    copy.__dict__ |= layer.__dict__ | {"_modules": {**layer._modules, "lora_dropout": identities}}
    return copy


def head_parts(layer: nn.Module) -> tuple[nn.Linear, tuple[str, ...]]:
    """The linear layer and the names of the adapters that change its output now; refuses what is anything else."""
    lora, tokens = _is(layer, "peft.tuners.lora", "Linear"), _is(layer, *TOKENS)
    base = layer.get_base_layer() if lora or tokens else layer
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"lm_head: expected torch.nn.Linear, LoRA or trained tokens on it, or modules_to_save, got "
            f"{type(base).__module__}.{type(base).__name__}; train the head fully, with LoRA, or not at all: leave "
            f"lm_head out of the adapter's target_modules, or call merge_and_unload(); compile the model, not its head"
        )
    _whole(base)
    if not lora and not tokens:
        return base, ()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    if layer.disable_adapters or layer.merged:
        return base, ()
    if tokens:
        return base, tuple(layer.active_adapters)
    names = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    for name in names:
        if name in layer.lora_variant:
            raise TypeError(
                f"lm_head: expected plain LoRA, got {type(layer.lora_variant[name]).__name__} in adapter {name!r}; "
                f"use plain LoRA or modules_to_save=['lm_head'] on the head"
            )
    return base, names


def _whole(base: nn.Linear) -> None:
    """Refuse a weight that is sharded otherwise than by rows through transformers, absent or quantised."""
    weight = base.weight
    if hasattr(weight, "placements"):
        # FSDP2's is one outside its forward alone. transformers' own forward shows that the rows stay sharded.
        own = getattr(base.__dict__.get("forward"), "__module__", None)
        by_rows = weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)
        if by_rows and own == "transformers.distributed.tensor_parallel":
            return
        raise ValueError(
            f"lm_head.weight: expected the whole weight, or its rows spread by tp_plan, got a DTensor with placements "
            f"{weight.placements}; under FSDP2 call through the wrapped model; leave the head out of the plan of "
            f"parallelize_module"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"lm_head.weight: expected 16 to 64-bit floats, got {weight.dtype}; keep the head unquantised")
    if weight.is_meta or weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"lm_head.weight: expected the whole weight, got shape {list(weight.shape)} on {weight.device}; call "
            f"through the wrapped model, and do not offload the head"
        )
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"lm_head.weight: expected a plain tensor, got {type(weight).__name__}; keep it unquantised")


def head_layer(outer: nn.Module) -> nn.Module:
    """The layer that computes the logits, inside FSDP1, PEFT's modules_to_save or its trained tokens."""
    if _is(outer, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return head_layer(outer.module)
    if _is(outer, "peft.utils.other", "TrainableTokensWrapper"):
        return outer.token_adapter
    if _is(outer, "peft.utils", "ModulesToSaveWrapper"):
        active = outer.active_adapters if not outer.disable_adapters else []
        return outer.modules_to_save[active[0]] if active else outer.original_module
    return outer


def _is(module: nn.Module, package: str, name: str) -> bool:
    """isinstance of a class that is imported where it is used; older versions may lack it."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(module, kind)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of torch.autocast, if it is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
