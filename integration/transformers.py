"""Call a transformers causal language model with your own function in place of its head's matrix product.

    attach_fused_head(model)  # before DDP, FSDP2, DeepSpeed or accelerate wrap it
    out = model(
        input_ids=ids, fused_head=lambda h, w, **head: linear_logprobs(h[:, :-1], w, ids[:, 1:], **head)
    )
    out.result.logprobs, out.aux_loss

The model's own forward runs, so whatever it does before the head is kept. When it calls the head, `function` gets the
hidden states and the weight inside the head module's own `__call__`: hooks of FSDP, ZeRO-3 and DDP see the call, the
weight is gathered, and its gradient is reduced. In place of logits the model's forward gets a small stand-in.

What the model does to its logits afterwards (scale, softcap) is first read from its config. Configs mislead: some
families ignore such a value, some multiply where others divide. So the first call checks it: the stand-in is then a
ramp of numbers, and what the model makes of it shows the transform. If the config misled, the pass is repeated once
with the measured one; what is no scale and softcap is refused. The first call also compares a few rows of the head's
own output with `linear_logprobs`. A change of the head, as by adding LoRA, is checked anew.

To answer another library's keyword, wrap `model.forward` with a function that calls `model.forward(fused_head=...)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from integration.heads import autocast_dtype, effective_head, head_layer, head_parts
from lad_kernels import linear_logprobs

# How text configs name what happens to logits after the head. Only a first guess: the first call measures it.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)

CHECKED_ROWS = 8
# Error of a log-prob over (1 + max abs(logit)): logits are rounded to their dtype; float32 ones may come from tf32.
HEAD_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-10, torch.float64: 2**-30}
TRANSFORM_TOLERANCE = 2**-16  # relative; the model may compute the transform in float32
TINY, HUGE = 2.0**-20, 2.0**40  # on the ramp: a softcap changes the one by less than rounding, and the other to itself


class Leaves:
    """Tensors as they were before hooks of wrappers saw them, and the tree they came from."""

    def __init__(self, tree: Any, tensors: tuple) -> None:
        self.tree, self.tensors = tree, tensors

    def join(self, seen: tuple) -> Any:
        """The tree of the tensors that hooks returned; where a hook only rounded one (FSDP2 does), of the original."""
        kept = [old if old is not None and new.dtype != old.dtype else new for old, new in zip(self.tensors, seen)]
        return pytree.tree_unflatten(kept, self.tree)


class FusedHeadOutput(NamedTuple):
    """What a call with `fused_head` returns: a flat tuple, so that hooks of wrappers find every tensor."""

    tensors: tuple
    leaves: Leaves

    @property
    def result(self) -> Any:
        """What the function returned: a pytree of tensors."""
        return self.leaves.join(self.tensors)[0]

    @property
    def aux_loss(self) -> Tensor | None:
        """The mixture-of-experts loss [] times its coefficient; None where there is none."""
        return self.leaves.join(self.tensors)[1]


class LogitTransform(NamedTuple):
    """z = softcap(logit_scale * (h W^T + b)), in the names of `linear_logprobs`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = self.logit_scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def attach_fused_head(model: nn.Module) -> FusedHead:
    """Give `model` the keyword `fused_head`; without the keyword its forward is untouched.

    Copies keep the patch, with their own weights; pickles and checkpoints do not.

    Args:
        model: a transformers causal LM, a vision-language model with a language-model head, or a PeftModel around one.

    Returns:
        The FusedHead that removes it again; a second call returns the same one.

    Raises:
        TypeError: `model` is wrapped already, or is no such model.
        ValueError: the model has no output embeddings, or a PEFT method that adds virtual tokens.
    """
    if hasattr(type(model), "get_base_model"):  # PEFT
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"model: expected a PEFT method that keeps the sequence length, got {model.peft_type}; virtual tokens "
                f"shift hidden states against targets"
            )
        model = model.get_base_model()
    if not hasattr(type(model), "get_output_embeddings"):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel or a PeftModel, got {type(model).__name__}; attach before "
            f"wrapping with torch.compile, DDP, FSDP, DeepSpeed or accelerate"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"model: expected a language-model head, got {type(model).__name__} without output embeddings")
    head = model.__dict__.get("_fused_head")
    return head if head is not None and hasattr(head._patch, "fused") else FusedHead(model)  # unpickled: patch is lost


class FusedHead:
    """The patch on one causal LM's `forward`; made by `attach_fused_head`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before = model.__dict__.get("forward")  # another library's patch; None for the class's own method
        self._checked: tuple | None = None
        self._measured: dict[LogitTransform, LogitTransform] = {}  # where the config misled
        self._patch = MethodType(_forward_of(type(model)), model)
        model.forward = self._patch
        model._fused_head = self

    def detach(self) -> None:
        """Restore the forward that was there before.

        Raises:
            RuntimeError: somebody patched `forward` after us; remove that patch first.
        """
        if self.model.__dict__.get("forward") != self._patch:
            raise RuntimeError(
                f"FusedHead.detach: expected our own forward on {type(self.model).__name__}, got "
                f"{self.model.forward!r}, patched later by somebody else; undo that patch first"
            )
        if self._before is None:
            del self.model.forward
        else:
            self.model.forward = self._before
        del self.model._fused_head

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward without us."""
        before = self._before or MethodType(type(self.model).forward, self.model)
        return before(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> FusedHeadOutput:
        """The model's forward with `function` in place of the head's product."""
        _check_call(function, kwargs)
        outer = self.model.get_output_embeddings()
        guess = logit_transform(self.model.config.get_text_config())
        for _ in range(2):
            call = _HeadCall(head_layer(outer), function, self._measured.get(guess, guess), self._checked)
            with call.installed(outer):
                out = self.own_forward(*args, **kwargs, use_cache=False, return_dict=True)
            if call.result is None:
                raise ValueError(
                    f"fused_head: expected {type(self.model).__name__} to call its output embeddings, it never did; "
                    f"this family's head cannot be replaced"
                )
            if call.ramp is None:
                break
            self._measured[guess] = call.measured_transform(out.logits, type(self.model).__name__)
            if self._measured[guess] == call.transform:
                self._checked = call.state
                break
        else:
            raise ValueError(
                f"fused_head: expected {type(self.model).__name__} to treat its logits alike in every call, got "
                f"{call.transform} and then {self._measured[guess]}; this family is not supported"
            )
        tensors, tree = pytree.tree_flatten((call.result[0], _weighted_aux_loss(self.model, out)))
        return FusedHeadOutput(tuple(tensors), Leaves(tree, tuple(tensors)))


def _forward_of(cls: type) -> Callable[..., Any]:
    """A forward with the signature of `cls.forward`, which `generate` and trainers inspect."""

    def forward(self: nn.Module, *args: Any, fused_head: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if fused_head is None:
            return self._fused_head.own_forward(*args, **kwargs)
        return self._fused_head.run(fused_head, args, kwargs)

    forward.fused = True
    forward.__signature__ = inspect.signature(cls.forward)
    return forward


class _HeadCall:
    """One call of the head module: `function` runs instead of the matrix product."""

    def __init__(
        self, layer: nn.Module, function: Callable[..., Any], transform: LogitTransform, checked: tuple | None
    ) -> None:
        self.layer, self.function, self.transform, self.checked = layer, function, transform, checked
        self.own = layer.forward
        self.state: tuple | None = None  # what decides how the head is computed
        self.ramp: Tensor | None = None  # [1, 1, V]
        self.stand_in: Tensor | None = None
        self.leaves: Leaves | None = None
        self.result: tuple[Any] | None = None

    @contextmanager
    def installed(self, outer: nn.Module) -> Iterator[None]:
        """Replace the layer's forward, and give the model the stand-in after all other hooks saw the outputs."""
        before = self.layer.__dict__.get("forward")
        self.layer.forward = self.forward
        hook = outer.register_forward_hook(self.take_outputs)
        try:
            yield
        finally:
            hook.remove()
            del self.layer.forward
            if before is not None:
                self.layer.forward = before

    @torch.compiler.disable
    def forward(self, hidden: Tensor, **unknown: Any) -> tuple:
        """hidden [B, T, D] -> the leaves of what `function` returns."""
        if unknown:
            raise TypeError(f"fused_head: expected hidden states alone for the head, got {', '.join(unknown)} as well")
        if self.leaves is not None:
            raise ValueError("fused_head: expected a model that calls its head once, got a second call")
        base, adapters = head_parts(self.layer)
        autocast = autocast_dtype(hidden.device.type)
        if autocast is None and hidden.dtype != base.weight.dtype:
            raise TypeError(
                f"fused_head: expected hidden states and lm_head.weight in one dtype, got {hidden.dtype} and "
                f"{base.weight.dtype}; cast one of them or call under torch.autocast"
            )
        self.state = (base, adapters, self.transform, hidden.dtype, autocast)
        if self.state != self.checked:
            self.check_head(hidden.detach())
        self.stand_in = hidden.new_zeros(*hidden.shape[:-1], 1) if self.ramp is None else self.ramp
        head = effective_head(self.layer, hidden)
        found = self.function(head.hidden, head.weight, bias=head.bias, **self.transform._asdict())
        tensors, tree = pytree.tree_flatten(found)
        for i, x in enumerate(tensors):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"fused_head: expected a function that returns tensors, got {type(x).__name__}")
            if x is not None and x.requires_grad and x._is_view():
                tensors[i] = x.clone()  # writing to a view would lose the hooks of FSDP2
        self.leaves = Leaves(tree, tuple(tensors))
        return self.leaves.tensors

    def take_outputs(self, module: nn.Module, args: tuple, outputs: tuple) -> Tensor:
        self.result = (self.leaves.join(outputs),)
        return self.stand_in

    @torch.no_grad()
    def check_head(self, hidden: Tensor) -> None:
        """Compare the layer's own output with `linear_logprobs` on a few rows [K, D], without dropout."""
        rows = hidden.flatten(0, -2)
        rows = rows[torch.linspace(0, len(rows) - 1, min(CHECKED_ROWS, len(rows)), device=rows.device).long()]
        with _no_dropout(self.layer):
            raw = self.own(rows)  # [K, V]
            head = effective_head(self.layer, rows)
        targets = torch.cat([raw.argmax(-1), raw.argmin(-1)])  # [2K]
        ours = linear_logprobs(head.hidden.repeat(2, 1), head.weight, targets, bias=head.bias).logprobs  # [2K]
        own = raw.to(ours.dtype).log_softmax(-1).repeat(2, 1).gather(-1, targets[:, None])[:, 0]  # [2K]
        double = torch.float32 if raw.device.type == "mps" else torch.float64
        self.ramp = 256 * torch.linspace(-1, 1, raw.shape[-1], device=raw.device)[None, None].to(double) ** 3
        self.ramp[..., 0], self.ramp[..., -1] = TINY, HUGE
        known = own.isfinite()  # rows of padding may be NaN
        if not bool(known.any()):
            self.state = None  # to be checked again
            return
        error = (ours - own)[known].abs().max().item()
        allowed = HEAD_TOLERANCE[raw.dtype] * (1 + raw[known[: len(raw)]].abs().max().item())
        if not error <= allowed:
            raise ValueError(
                f"fused_head: expected the head, {type(self.layer).__name__}, to be hidden W^T + bias, but its "
                f"log-probs differ by {error:.3g} (allowed {allowed:.3g}); this head is not supported"
            )

    @torch.compiler.disable
    def measured_transform(self, logits: Tensor, owner: str) -> LogitTransform:
        """The transform that explains what the model made of the ramp [1, 1, V]: the one used, or else a fitted one."""
        if logits.shape != self.ramp.shape:
            raise ValueError(
                f"fused_head: expected {owner} to keep its {self.ramp.shape[-1]} logits, got {list(logits.shape)}; a "
                f"vocabulary that is cut after the head is not supported"
            )
        scale, cap = logits[0, 0, 0].item() / TINY, logits[0, 0, -1].abs().item()
        fitted = LogitTransform(scale, cap if cap < 0.5 * abs(scale) * HUGE else None)
        for transform in (self.transform, fitted):
            expected = transform(self.ramp)
            wrong = ~((logits - expected).abs() <= TRANSFORM_TOLERANCE * (expected.abs() + TINY))  # [1, 1, V]
            if not bool(wrong.any()):
                return transform
        at = wrong.flatten().nonzero()[0, 0]
        x, y = self.ramp.flatten()[at].item(), logits.flatten()[at].item()
        raise ValueError(
            f"fused_head: expected {owner} to apply a scale and a softcap to the head's output, but it makes {y:.6g} "
            f"of {x:.6g}, and {fitted} would fit elsewhere; this family is not supported"
        )


def logit_transform(config: Any) -> LogitTransform:
    """Scale and softcap as a text config names them."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(x) for x in found if isinstance(x, (int, float)) and x]

    scale = math.prod(numbers(FACTORS)) / math.prod(numbers(DIVISORS))
    return LogitTransform(scale, next(iter(numbers(SOFTCAPS)), None))


@contextmanager
def _no_dropout(layer: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def _check_call(function: Any, kwargs: dict[str, Any]) -> None:
    if not callable(function):
        raise TypeError(f"fused_head: expected a function of hidden states and weight, got {type(function).__name__}")
    for name in ("labels", "past_key_values", "cache_params"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with fused_head, got {type(kwargs[name]).__name__}; drop it")
    if kwargs.pop("use_cache", None):
        raise ValueError("use_cache: expected False with fused_head, got True; it scores whole sequences")
    kwargs.pop("return_dict", None)


def _weighted_aux_loss(model: nn.Module, out: Any) -> Tensor | None:
    """The mixture-of-experts loss as the model adds it to its own loss."""
    aux = getattr(out, "aux_loss", None)
    if aux is None:
        return None
    if not isinstance(aux, Tensor):
        raise ValueError(
            f"output_router_logits: expected {type(model).__name__} to compute a tensor aux_loss, got {aux!r}: it "
            f"returns no router logits here; set output_router_logits=False"
        )
    for owner in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(getattr(owner, name, None), (int, float)):
                return getattr(owner, name) * aux
    raise ValueError(f"aux_loss: expected a coefficient in the config of {type(model).__name__}, found none")
