"""Call a transformers causal language model with your own function in place of its head's matrix product.

    attach_fused_head(model)  # before DDP, FSDP2, DeepSpeed or accelerate wrap it
    out = model(
        input_ids=ids, fused_head=lambda h, w, **head: linear_logprobs(h[:, :-1], w, ids[:, 1:], **head)
    )
    out.result.logprobs, out.aux_loss

The model's own forward runs, so all it does before the head is kept. When it calls the head, `function` gets the hidden
states and the weight inside the head module's own `__call__`: hooks of FSDP, ZeRO-3 and DDP run, the weight is
gathered, and its gradient is reduced. Instead of logits the model's forward gets a small placeholder.

What the model does to its logits afterwards (scale, softcap) is first read from its config. Configs can mislead: some
families ignore such a value, some multiply where others divide. So the first call measures it, by numbers in the
placeholder (`logit_transform.py`), and compares a few rows of the head's own output with `linear_logprobs`; both are
repeated after a change of the head, of its dtype or of the training mode. If the config was wrong, the pass is repeated
once with the measured transform; anything but a constant scale and softcap is refused. Later calls notice a change of
the transform and repeat the pass; on CUDA, where that would need a sync, the device asserts instead.

A checkpoint (torch.utils.checkpoint) may surround the model's call, not the head alone. With a model on several devices
hidden states are moved to the head's device, and the function has to move its targets.

To answer another library's keyword, wrap `model.forward` with a function that calls `model.forward(fused_head=...)`.

    patch_loss(model)  # Trainer, SFT scripts: a training forward with labels computes the loss without logits
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lad_kernels import linear_cross_entropy
from lad_kernels.frameworks.head_call import HeadCall, Leaves, active_call, current_call, original_class
from lad_kernels.frameworks.logit_transform import LogitTransform, logit_transform

REMEMBERED = 32  # states of a model whose head was checked: training mode, dtypes, adapters


class FusedHeadOutput(NamedTuple):
    """What a call with `fused_head` returns: a flat tuple, so that hooks of wrappers reach every tensor."""

    tensors: tuple
    leaves: Leaves

    @property
    def result(self) -> Any:
        """What the function returned, a pytree of tensors."""
        return self.leaves.join(self.tensors)[0]

    @property
    def aux_loss(self) -> Tensor | None:
        """The mixture-of-experts loss [] times its coefficient; None where there is none."""
        return self.leaves.join(self.tensors)[1]


def attach_fused_head(model: nn.Module) -> FusedHead:
    """Give `model` the keyword `fused_head`; without the keyword its forward is untouched.

    Copies keep the patch, with their own weights; pickles and checkpoints do not.

    Args:
        model: a transformers causal LM, a vision-language model with a language-model head, or a PeftModel around one.

    Returns:
        The FusedHead that removes it again; a second call returns the same one. The keyword's function is called as
        `function(hidden [B, T, D], weight [V, D], bias=, logit_scale=, softcap=)`, the names of `linear_logprobs`; with
        a head that transformers' tp_plan shards over ranks, with this rank's rows and `vocab_group=`.

    Raises:
        TypeError: `model` is wrapped already, or is no such model.
        ValueError: the model has no output embeddings, or a PEFT method that adds virtual tokens.
    """
    given = model
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
    if head is not None and not hasattr(head._patch, "fused"):  # unpickled: the patch is lost
        head.unhook()
        head = None
    head = head or FusedHead(model)
    head.watch(given)
    return head


def patch_loss(
    model: nn.Module,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backward: str = "auto",
    tail_mass: float | None = None,
    tail: str = "unbiased",
) -> FusedHead:
    """Let `model(labels=...)` compute its loss by `linear_cross_entropy` while it trains, as `Trainer` calls it.

    The loss is the model's own: labels are shifted inside (`shift_labels` are not), -100 is ignored, the sum is divided
    by `num_items_in_batch` where Trainer gives it, and a mixture of experts adds its auxiliary loss. What is returned
    has no logits, and is 0 where no label counts. In evaluation, and without labels, the forward is the model's own.

    Args:
        model: as for `attach_fused_head`, before anything wraps it.
        label_smoothing, z_loss, backward, tail_mass, tail: as for `linear_cross_entropy`; Trainer's own
            label_smoothing_factor needs logits, so leave it 0.

    Returns:
        The FusedHead; its `detach()` removes both.

    Raises:
        TypeError, ValueError: as `attach_fused_head`; a model with a loss of its own making.
    """
    head = attach_fused_head(model)
    name, own, source = type(head.model).__name__, getattr(head.model, "loss_function", None), ""
    with suppress(OSError):
        source = inspect.getsource(type(head.model).forward)
    if getattr(own, "__name__", None) != "ForCausalLMLoss" or "loss_function(" not in source:
        raise ValueError(
            f"model: expected {name} to compute its loss by transformers' ForCausalLMLoss, got one of its own making, "
            f"which linear_cross_entropy does not know; give the loss by fused_head"
        )
    head.loss = partial(
        linear_cross_entropy,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        backward=backward,
        tail_mass=tail_mass,
        tail=tail,
    )
    return head


class FusedHead:
    """The patch on one causal LM's `forward`; made by `attach_fused_head`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loss: Callable[..., Tensor] | None = None  # of `patch_loss`
        self._before = model.__dict__.get("forward")  # another library's patch; None for the class's own method
        self._checked: dict[tuple, LogitTransform] = {}  # by `HeadCall.describe`; replaced, never written to
        self._measured: dict[LogitTransform, LogitTransform] = {}  # by the transform that the config names
        accepted = inspect.signature(self._before or type(model).forward).parameters  # by name
        anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        options = {"use_cache": False, "return_dict": True}
        self._options = {name: value for name, value in options.items() if anything or name in accepted}
        self._patch = MethodType(_forward_of(type(model)), model)
        self._hooks: list[RemovableHandle] = []
        self.watch(model)
        model.forward = self._patch
        model._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, model)
        model._fused_head = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": {}}  # copies and pickles are measured again

    def detach(self) -> None:
        """Restore the forward that was there before.

        Raises:
            RuntimeError: another library patched `forward` later; remove that patch first.
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
        self.unhook()
        for module in self.model.modules():
            module.__class__ = original_class(module)
        del self.model._replicate_for_data_parallel, self.model._fused_head

    def watch(self, model: nn.Module) -> None:
        """Refuse the output of another forward than ours, from `model` or PEFT's wrapper, which skips its hooks."""
        if _refuse_another_forward not in model._forward_hooks.values():
            self._hooks.append(model.register_forward_hook(_refuse_another_forward, with_kwargs=True))

    def unhook(self) -> None:
        """Undo `watch`."""
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Measure again at the next call; call it after a change of the scale of logits that only shows on CUDA."""
        self._checked, self._measured = {}, {}

    def own_forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The unpatched forward of `model`, the attached model or a replica of it."""
        if self._before is None:
            return type(model).forward(model, *args, **kwargs)
        if model is not self.model and getattr(self._before, "__self__", None) is self.model:
            return self._before.__func__(model, *args, **kwargs)
        return self._before(*args, **kwargs)

    def supervised(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's output with the loss of `labels`, without logits."""
        from transformers.modeling_outputs import CausalLMOutput

        labels, targets = kwargs.pop("labels"), kwargs.pop("shift_labels", None)  # [B, T]
        count = kwargs.pop("num_items_in_batch", None)
        ignore_index = kwargs.pop("ignore_index", -100)
        if targets is None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)  # [B, T]

        def loss(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:  # [B, T, D], [V, D]
            ids, reduction = targets.to(hidden.device), "mean" if count is None else "sum"
            return self.loss(hidden, weight, ids, ignore_index=ignore_index, reduction=reduction, **head)

        out = self.run(model, loss, args, kwargs)
        total = out.result if count is None else out.result / torch.as_tensor(count).to(out.result.device).clamp(min=1)
        return CausalLMOutput(loss=total if out.aux_loss is None else total + out.aux_loss.to(total.device))

    @torch.compiler.disable(recursive=False)
    def run(
        self, model: nn.Module, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> FusedHeadOutput:
        """The model's forward with `function` in place of the head's product."""
        _check_call(function, kwargs)
        name = type(model).__name__
        guess, trial = logit_transform(model.config.get_text_config()), None
        first = self._measured.get(guess, guess)
        for _ in range(2):
            outer = model.get_output_embeddings()
            call = HeadCall(outer, function, first, (guess, model.training), self._checked, trial)
            with current_call(call):
                out = self.own_forward(model, *args, **kwargs, **self._options)
            if call.result is None:
                raise ValueError(
                    f"fused_head: expected {name} to call its output embeddings, it never did; this family's head "
                    f"cannot be replaced"
                )
            trial = call.observed_transform(getattr(out, "logits", None), name)
            if trial == call.transform:
                break
        else:
            raise ValueError(
                f"fused_head: expected {name} to treat its logits alike in every call, got {call.transform} and then "
                f"{trial}; this family is not supported"
            )
        if call.state is not None and not call.known:
            kept = list(self._checked.items())[1 - REMEMBERED :]
            self._checked = {**dict(kept), call.state: trial}
            self._measured = {**self._measured, guess: trial}
        tensors, tree = pytree.tree_flatten((call.result[0], _weighted_aux_loss(model, out)))
        return FusedHeadOutput(tuple(tensors), Leaves(tree, tuple(tensors)))


def _forward_of(cls: type) -> Callable[..., Any]:
    """A forward with the signature of `cls.forward`, which `generate` and trainers inspect."""

    def forward(self: nn.Module, *args: Any, fused_head: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if fused_head is not None:
            return self._fused_head.run(self, fused_head, args, kwargs)
        if self._fused_head.loss is not None and self.training and kwargs.get("labels") is not None:
            return self._fused_head.supervised(self, args, kwargs)
        if active_call() is not None:
            with current_call(None):
                return self._fused_head.own_forward(self, *args, **kwargs)
        return self._fused_head.own_forward(self, *args, **kwargs)

    forward.fused = True
    forward.__signature__ = inspect.signature(cls.forward)
    return forward


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """A replica of nn.DataParallel; what was bound to the model is bound to the replica."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name, x in self.__dict__.items():
        if isinstance(x, MethodType) and x.__self__ is self:
            replica.__dict__[name] = MethodType(x.__func__, replica)
    return replica


def _refuse_another_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Raises TypeError where another library replaced our forward, which would ignore our keyword."""
    if kwargs.get("fused_head") is not None and not isinstance(out, FusedHeadOutput):
        forward = (model.get_base_model() if hasattr(type(model), "get_base_model") else model).forward
        raise TypeError(
            f"fused_head: expected the forward of attach_fused_head to be called, got "
            f"{getattr(forward, '__module__', None)}.{getattr(forward, '__qualname__', forward)}, which somebody put "
            f"in its place; attach after that library has patched the model"
        )


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
