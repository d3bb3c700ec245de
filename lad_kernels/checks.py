"""Input validation: every message names the argument, what was expected, what came, and what to do.

No check reads a tensor's values on an accelerator, because that would wait for the device; LAD_KERNELS_VALIDATE=1 in
the environment, or `lad_kernels.checks.validate_values(True)`, turns those on. On the CPU they always run.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

IMPLS = ("auto", "triton", "torch", "reference")
_always_read_values = os.environ.get("LAD_KERNELS_VALIDATE", "0") == "1"


def validate_values(on: bool) -> None:
    """Switch checks that read tensor values on accelerators (a host sync each): target range, cu_seqlens order,
    signs and finiteness of log-probs, advantages, weights, temperatures and the normalizer."""
    global _always_read_values
    _always_read_values = bool(on)


def reads_all_values() -> bool:
    """Whether checks were asked for that cost a host sync or a second computation."""
    return _always_read_values


def may_read(x: Tensor) -> bool:
    """Whether a check may look at values: always on the CPU."""
    return _always_read_values or x.device.type == "cpu"


def is_number(value: object) -> bool:
    """A real number of Python or numpy; booleans do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def plain_tensor(name: str, x: object) -> None:
    """Refuse what is not an ordinary dense tensor: shards, functorch wrappers, nested and quantised tensors."""
    if torch.compiler.is_compiling():  # the operators check again what they are given
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}; wrap it with torch.as_tensor")
    if hasattr(x, "placements") and hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor with placements {x.placements}; call the loss inside the "
            f"wrapped module's forward, or pass {name}.full_tensor(grad_placements=[Partial('avg')]) (FSDP2's mean; a "
            f"bare full_tensor() gives a wrong gradient); rows on a tensor-parallel mesh: {name}.to_local() with "
            f"vocab_group=mesh.get_group()"
        )
    is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    if is_wrapped is not None and is_wrapped(x):
        raise RuntimeError(
            f"{name}: torch.func transforms (grad, vmap, jvp) are not supported; use loss.backward() or "
            f"torch.autograd.grad, or the function of lad_kernels.reference"
        )
    if x.is_sparse or x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense strided tensor, got layout {x.layout}")


def no_tangent(name: str, x: Tensor | None) -> None:
    """Refuse a dual tensor of forward-mode derivatives, whose tangent would be lost."""
    if x is not None and not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: forward-mode derivatives are not supported; use loss.backward() or torch.autograd.grad, or "
            f"impl='reference'"
        )


def constant(name: str, x: object) -> None:
    """No tensor that a gradient would have to reach."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name}: expected a constant, got a tensor that requires grad; detach it")


def impl(value: str) -> None:
    if value not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {value!r}")


def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on such a tensor; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "the kernels compute in float32 and the input is float64"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"the input is on {device} and the kernels need a CUDA or ROCm device"
    return None


def use_triton(value: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `impl` means Triton for such a tensor. A forced path that cannot run raises the reason; auto never."""
    impl(value)
    reason = triton_unavailable(device, dtype)
    if value == "triton" and reason is not None:
        raise RuntimeError(f"impl: 'triton' was asked for, but {reason}; use impl='auto' or 'torch'")
    return reason is None and (value == "triton" or (value == "auto" and device.type == "cuda"))


def _same_device(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as {like_name}, got {x.device}; use .to({like_name}.device)"
        )


def floating_dtype(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point or x.element_size() < 2:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def vocab_group(group: object, impl: str, backward: str = "auto") -> None:
    """None, or a process group that this rank belongs to, with a path that supports it."""
    if group is None:
        return
    from torch import distributed

    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"vocab_group: expected a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(group).__name__}; of a DeviceMesh pass mesh.get_group(name)"
        )
    if impl == "reference":
        raise ValueError("vocab_group: expected None with impl='reference', which needs all rows; gather them first")
    if backward == "routed":
        raise ValueError(
            "vocab_group: expected None with config.backward='routed', which is not built for a sharded head; use "
            "'auto' or 'dense'"
        )


def capturable(*, loss_mask: object, vocab_group: object, reference: bool) -> None:
    """Nothing that would wait for the device, which a CUDA graph cannot."""
    for name, given, what in (
        ("loss_mask", loss_mask is not None, "leaves tokens out, and the host reads how many remain"),
        ("vocab_group", vocab_group is not None, "compares the arguments of all ranks on the host"),
        ("impl", reference, "'reference' reads values on the host"),
    ):
        if given:
            raise ValueError(
                f"capturable: expected False with {name}, which {what}; leave it out (give such tokens the advantage "
                f"0), or call outside the graph"
            )


def head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *, autocast: bool, sharded: bool = False
) -> None:
    """hidden [N, D] or [B, T, D]; weight [V, D]; targets [N] or [B, T]; bias [V]; `sharded`: any part of the rows."""
    for name, x in (("hidden_states", hidden), ("lm_head_weight", weight), ("target_ids", targets), ("bias", bias)):
        if x is not None:
            plain_tensor(name, x)
            _same_device(name, x, hidden, "hidden_states")
    if hidden.ndim not in (2, 3):
        raise ValueError(f"hidden_states: expected [N, D] or [B, T, D], got {_shape(hidden)}")
    if weight.ndim != 2:
        empty = "; a shard of ZeRO-3 or FSDP1 must be gathered first" if weight.numel() == 0 or weight.ndim == 1 else ""
        raise ValueError(f"lm_head_weight: expected [V, D], got {_shape(weight)}{empty}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight: expected [V, {hidden.shape[-1]}] to match hidden_states {_shape(hidden)}, got "
            f"{_shape(weight)}; pass lm_head.weight as it is, not transposed"
        )
    if weight.shape[0] < 2 and not sharded:
        raise ValueError(f"lm_head_weight: expected a vocabulary of at least 2 rows, got {weight.shape[0]}")
    floating_dtype("hidden_states", hidden)
    floating_dtype("lm_head_weight", weight)
    if not autocast and weight.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head_weight: expected {hidden.dtype} as hidden_states, got {weight.dtype}; cast one of them, or call "
            f"inside torch.autocast"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target_ids: expected {list(hidden.shape[:-1])} to match hidden_states {_shape(hidden)}, got "
            f"{_shape(targets)}; targets are already shifted: target_ids[t] is the token that hidden_states[t] predicts"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_ids: expected int64 or int32, got {targets.dtype}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {_shape(bias)}")
        floating_dtype("bias", bias)


def target_range(targets: Tensor, vocabulary: int) -> None:
    """Targets [M] of the tokens that take part lie in [0, V); masked ones may hold anything."""
    if targets.numel() and may_read(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocabulary:
            bad = low if low < 0 else high
            raise ValueError(
                f"target_ids: expected ids in [0, {vocabulary}) wherever loss_mask keeps the token, got {bad}; mask "
                f"padding out with loss_mask = target_ids != {bad}"
            )


def transform(temperature: float | Tensor, logit_scale: float, softcap: float | None, targets: Tensor) -> None:
    if isinstance(temperature, Tensor):
        plain_tensor("temperature", temperature)
        constant("temperature", temperature)
        by_sequence = targets.ndim == 2 and temperature.shape == (len(targets), 1)  # is expanded to the tokens
        if temperature.ndim and temperature.shape != targets.shape and not by_sequence:
            hint = f" or one per sequence [{len(targets)}, 1]" if targets.ndim == 2 else ""
            raise ValueError(
                f"temperature: expected a number or one per token {_shape(targets)}{hint}, got {_shape(temperature)}"
            )
        _same_device("temperature", temperature, targets, "target_ids")
        if temperature.dtype == torch.bool:
            raise TypeError("temperature: expected numbers, got torch.bool")
        if may_read(temperature) and not bool(((temperature > 0) & (temperature < math.inf)).all()):
            raise ValueError("temperature: expected finite values > 0; greedy decoding (0) has no log-probabilities")
    elif not (is_number(temperature) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number > 0 or a tensor, got {temperature!r}")
    if not (is_number(logit_scale) and math.isfinite(logit_scale) and logit_scale != 0):
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale!r}")
    if softcap is not None and not (is_number(softcap) and math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")


def per_token(name: str, x: Tensor | None, like: Tensor, like_name: str, *, floating: bool = True) -> None:
    """`x` has the shape and device of `like`, the tensor that holds one value per token."""
    if x is None:
        return
    plain_tensor(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected {_shape(like)} as {like_name}, got {_shape(x)}")
    _same_device(name, x, like, like_name)
    if floating:
        floating_dtype(name, x)


def layout(like: Tensor, like_name: str, cu_seqlens: Tensor | None) -> int | None:
    """Number of sequences B of a packed [N] or padded [B, T] batch; None for packed tokens without sequences.

    Packed tokens beyond the last bound are allowed, as padding at the end: they do not count.
    """
    if like.ndim == 2:
        if cu_seqlens is not None:
            raise ValueError(
                f"cu_seqlens: expected None for padded {like_name} {_shape(like)}; it describes packed [N] input"
            )
        return like.shape[0]
    if like.ndim != 1:
        raise ValueError(f"{like_name}: expected [N] (packed) or [B, T] (padded), got {_shape(like)}")
    if cu_seqlens is None:
        return None
    plain_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 [B + 1], got {cu_seqlens.dtype} {_shape(cu_seqlens)}; it holds the cumulative "
            f"lengths 0, n_1, n_1 + n_2, ..., N"
        )
    _same_device("cu_seqlens", cu_seqlens, like, like_name)
    if cu_seqlens.dtype == torch.int32 and len(like) >= 2**31:
        raise ValueError(f"cu_seqlens: expected int64 for N = {len(like)} tokens, got int32, which overflows")
    if len(cu_seqlens) == 1 and len(like):
        raise ValueError(f"cu_seqlens: expected a sequence for N = {len(like)} tokens, got [1], which has none")
    if may_read(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > len(like) or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens: expected to rise from 0 to at most N = {len(like)} without falling, got {bounds[:4]} "
                f"... {bounds[-1]}"
            )
    return len(cu_seqlens) - 1


def mask(x: Tensor | None, like: Tensor, like_name: str) -> None:
    """A mask keeps or drops; weights between 0 and 1 would be ignored, so they are refused."""
    per_token("loss_mask", x, like, like_name, floating=False)
    if x is not None and x.dtype.is_floating_point and may_read(x) and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(
            "loss_mask: expected zeros and ones, got other values; pass weights as rollout_is_weights, one per token"
        )


def config(x: object, kind: type, other: str) -> None:
    """The config belongs to the function that was called, not to the other loss."""
    if not isinstance(x, kind):
        raise TypeError(f"config: expected {kind.__name__}, got {type(x).__name__}; the other objective is {other}")


def per_sequence(name: str, x: Tensor, count: int | None, like: Tensor, like_name: str) -> None:
    """`x` is [B] or has one value per token."""
    plain_tensor(name, x)
    _same_device(name, x, like, like_name)
    if x.shape == like.shape or (count is not None and x.shape == (count,)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}; call .float()")
        return
    sequences = f"[{count}] (one per sequence) or " if count is not None else ""
    hint = "; packed input needs cu_seqlens for values per sequence" if count is None else ""
    raise ValueError(f"{name}: expected {sequences}{_shape(like)} (one per token), got {_shape(x)}{hint}")


POSITIVE = 0.5  # a log-prob above this is not a rounding error: 16-bit logits of 50 may give 0.25


def log_probs(name: str, x: Tensor, counts: Tensor) -> None:
    """Of tokens that count, by a mask in the shape of `x`, none is far above 0. NaN and -inf pass."""
    above = (x.detach() > POSITIVE) & counts & (x < math.inf)
    if bool(above.any()):
        raise ValueError(
            f"{name}: expected log-probabilities in nats, which are not above 0, got {x[above].max().item():g}; "
            f"probabilities need .log(), negative log-likelihoods a minus sign"
        )


def signal(name: str, x: Tensor, counts: Tensor) -> None:
    """Finite values wherever `counts`, a mask in the shape of `x`, is set."""
    if not bool((x.detach().isfinite() | ~counts).all()):
        raise ValueError(
            f"{name}: expected finite values wherever a token counts, got NaN or infinity; mask such tokens out, or "
            f"give rewards, of which those that are not finite count as unscorable"
        )


def weights(name: str, x: Tensor, counts: Tensor) -> None:
    """No negative value wherever `counts` is set; one that is not finite drops its token."""
    if bool(((x.detach() < 0) & (x > -math.inf) & counts).any()):
        raise ValueError(f"{name}: expected importance weights >= 0, got negative ones; pass ratios, not their logs")


def token_weights(x: Tensor | None, like: Tensor, counts: Tensor) -> None:
    """One finite factor >= 0 per token, wherever `counts`, a mask in the shape of `like`, is set."""
    per_token("token_weights", x, like, "target_ids")
    constant("token_weights", x)
    if x is not None and may_read(x) and not bool((((x >= 0) & (x < math.inf)) | ~counts).all()):
        raise ValueError("token_weights: expected finite factors >= 0 wherever a token counts, got others")


def rewards(x: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    plain_tensor("rewards", x)
    if like is not None:
        _same_device("rewards", x, like, like_name)
    if x.ndim != 1:
        raise ValueError(f"rewards: expected [B], one per completion, got {_shape(x)}; combine reward functions first")
    if not x.dtype.is_floating_point:
        raise TypeError(f"rewards: expected a floating dtype, got {x.dtype}; call .float()")


def groups(count: int, device: torch.device, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """The id [B] of each completion's group, from exactly one of group_size and group_ids."""
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(f"group_size, group_ids: expected exactly one, got {given}")
    if group_ids is None:
        if isinstance(group_size, bool) or not isinstance(group_size, numbers.Integral) or group_size < 2:
            why = "; alone in its group every completion has advantage 0" if group_size == 1 else ""
            raise ValueError(f"group_size: expected an integer >= 2, got {group_size!r}{why}")
        if count % group_size:
            raise ValueError(
                f"group_size: expected a divisor of the {count} rewards, got {group_size}; use group_ids for groups of "
                f"different sizes"
            )
        return torch.arange(count, device=device) // group_size
    plain_tensor("group_ids", group_ids)
    if group_ids.shape != (count,) or group_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"group_ids: expected int64 [{count}], one per reward, got {group_ids.dtype} {_shape(group_ids)}"
        )
    return group_ids.to(device)


def normalizer(value: float | Tensor | None) -> None:
    """A positive number or a 0-d tensor."""
    if isinstance(value, Tensor):
        plain_tensor("normalizer", value)
        if value.numel() != 1:
            raise ValueError(f"normalizer: expected a number or a 0-d tensor, got {_shape(value)}")
        if value.dtype == torch.bool:
            raise TypeError("normalizer: expected a number, got torch.bool; pass mask.sum(), not mask.any()")
        if may_read(value) and not 0 < float(value) < math.inf:
            raise ValueError(f"normalizer: expected a finite number > 0, got {float(value)}; clamp it: .clamp(min=1)")
    elif value is not None and not (is_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(
            f"normalizer: expected a finite number > 0, got {value!r}; for token-mean it is the number of loss tokens "
            f"in the global batch"
        )
