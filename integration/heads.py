"""The head module of a language model as one product, logits = hidden weight^T + bias, or a refusal that names why not.

LoRA on the head is joined by rank, logits = [h, A dropout(h)] [W, s B]^T, so that it stays exact without merging. The
joined weight is a copy of W for the time of the call, and its gradient is computed for W and B together.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """A head as one product: logits = hidden weight^T + bias, before scale and softcap."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def effective_head(layer: nn.Module, hidden: Tensor) -> Head:
    """The layer with its active LoRA adapters as one product, in one dtype; hidden is [..., D].

    Raises:
        TypeError, ValueError: a layer or weight that this cannot be computed for.
    """
    base, adapters = head_parts(layer)
    weight, bias = base.weight, base.bias  # [V, D], [V]
    # A head in float32 behind a 16-bit body computes in float32; whether it does so is checked before.
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
    return Head(inputs[0], blocks[0], bias)


def without_dropout(layer: nn.Module) -> nn.Module:
    """The layer without its adapters' dropout: another object with the same weights, since threads share the layer."""
    if not hasattr(layer, "lora_dropout"):
        return layer
    twin = object.__new__(type(layer))
    identities = nn.ModuleDict({name: nn.Identity() for name in layer.lora_dropout})
    twin.__dict__ |= layer.__dict__ | {"_modules": {**layer._modules, "lora_dropout": identities}}
    return twin


def head_parts(layer: nn.Module) -> tuple[nn.Linear, tuple[str, ...]]:
    """The linear layer and the names of the LoRA adapters that add to its output now; refuses what is anything else."""
    lora = "peft" in sys.modules and isinstance(layer, sys.modules["peft"].tuners.lora.Linear)
    base = layer.get_base_layer() if lora else layer
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"lm_head: expected torch.nn.Linear, LoRA on it, or modules_to_save, got {type(base).__module__}."
            f"{type(base).__name__}; train the head fully, with LoRA, or not at all; compile the model, not its head"
        )
    _whole(base.weight)
    if not lora:
        return base, ()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    if layer.disable_adapters or layer.merged:
        return base, ()
    names = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    for name in names:
        if name in layer.lora_variant:
            raise TypeError(
                f"lm_head: expected plain LoRA, got {type(layer.lora_variant[name]).__name__} in adapter {name!r}; "
                f"use plain LoRA or modules_to_save=['lm_head'] on the head"
            )
    return base, names


def _whole(weight: Tensor) -> None:
    """Refuse a weight that is sharded, absent or quantised."""
    if hasattr(weight, "placements"):
        problem = f"a DTensor with placements {weight.placements}"
    elif not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"lm_head.weight: expected 16 to 64-bit floats, got {weight.dtype}; keep the head unquantised")
    elif weight.is_meta or weight.ndim != 2 or weight.numel() == 0:
        problem = f"shape {list(weight.shape)} on {weight.device}"
    elif type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"lm_head.weight: expected a plain tensor, got {type(weight).__name__}; keep it unquantised")
    else:
        return
    raise ValueError(
        f"lm_head.weight: expected the whole weight, got {problem}; call through the wrapped model, and do not offload "
        f"the head"
    )


def head_layer(outer: nn.Module) -> nn.Module:
    """The layer that computes the logits: what PEFT's modules_to_save trains, or the head itself."""
    if "peft" in sys.modules and isinstance(outer, sys.modules["peft"].utils.ModulesToSaveWrapper):
        active = outer.active_adapters if not outer.disable_adapters else []
        return outer.modules_to_save[active[0]] if active else outer.original_module
    return outer


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of torch.autocast, if it is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
