"""One call of a head module in which a function runs in place of the matrix product.

The state of a call is kept in a context variable, so that threads, nested calls and copies that share a module do not
share it. The module itself only gets a class that looks there: while no call is active for it, it behaves like its own
class, even if another library patched its `forward`.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lad_kernels import linear_logprobs
from lad_kernels.frameworks import logit_transform
from lad_kernels.frameworks.head_module import autocast_dtype, effective_head, head_layer, head_parts, without_dropout
from lad_kernels.frameworks.logit_transform import LogitTransform

CHECKED_ROWS = 8
# Error of a log-prob over (1 + max abs(logit)): logits are rounded to their dtype; float32 ones may come from tf32.
HEAD_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-10, torch.float64: 2**-30}

_call: ContextVar[HeadCall | None] = ContextVar("fused_head", default=None)
_lock, _running = threading.Lock(), 0
_any_running = False  # in any thread; torch.compile guards on it and traces plain forwards without looking further


@contextmanager
def current_call(call: HeadCall | None) -> Iterator[None]:
    """Make `call` the active one of this thread; None: modules behave as without a call."""
    _count(1)
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        _count(-1)


@torch.compiler.disable
def _count(change: int) -> None:
    global _running, _any_running
    with _lock:
        _running += change
        _any_running = _running > 0


def active_call() -> HeadCall | None:
    """The call that this thread is inside of, if any."""
    return _call.get() if _any_running else None


class Leaves:
    """Tensors before hooks of wrappers run on them, and the structure of their pytree."""

    def __init__(self, tree: Any, tensors: tuple) -> None:
        self.tree, self.tensors = tree, tensors

    def __iter__(self) -> Iterator:
        raise TypeError(
            "fused_head: expected a wrapper that keeps what the function returns, got nn.DataParallel, whose gather "
            "cannot; use DistributedDataParallel"
        )

    def join(self, returned: tuple) -> Any:
        """The pytree of what hooks returned; where a hook only cast a tensor (FSDP2 does), with the original."""
        kept = [old if old is not None and new.dtype != old.dtype else new for old, new in zip(self.tensors, returned)]
        return pytree.tree_unflatten(kept, self.tree)


class _Replaceable:
    """Mixed into the class of a head: `forward` and the output are the active call's, if there is one."""

    @property
    def forward(self) -> Callable[..., Any]:
        call = active_call()
        return call.forward if call is not None and call.layer is self else own_forward(self)

    @forward.setter
    def forward(self, value: Callable[..., Any]) -> None:
        self.__dict__["forward"] = value

    @forward.deleter
    def forward(self) -> None:
        del self.__dict__["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (call := active_call()) is None or call.outer is not self:
            return super().__call__(*args, **kwargs)
        return call.stand_in_for(super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickles and copies are of the original class."""
        reduced = super().__reduce_ex__(protocol)
        if reduced[:2] == (copyreg.__newobj__, (type(self),)):
            return (object.__new__, (original_class(self),), *reduced[2:])
        return reduced


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a head outside calls: its instance's, if that was patched, or else its class's."""
    if "forward" in module.__dict__:
        return module.__dict__["forward"]
    return super(_Replaceable, module).forward if isinstance(module, _Replaceable) else module.forward


@functools.cache
def _replaceable(cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_before_fused_head": cls}
    return type(cls.__name__, (_Replaceable, cls), names)


def original_class(module: nn.Module) -> type:
    """The module's class before ours; unchanged where a wrapper (FSDP2) derived its own from ours."""
    return type(module).__dict__.get("_before_fused_head", type(module))


class HeadCall:
    """`function` in place of the product of `outer`, the output embeddings of a model.

    Args:
        outer: the head module; its class is replaced once, for good.
        function: called as `attach_fused_head` says.
        guess: the transform to begin with where nothing was measured yet.
        context: what the model's treatment of its logits may depend on, besides the head itself.
        checked: transforms that were measured, by `describe`.
        trial: a transform to try and measure again; None: use what is known.
    """

    @torch.compiler.disable
    def __init__(
        self,
        outer: nn.Module,
        function: Callable[..., Any],
        guess: LogitTransform,
        context: tuple,
        checked: dict[tuple, LogitTransform],
        trial: LogitTransform | None,
    ) -> None:
        self.outer, self.layer, self.function = outer, head_layer(outer), function
        self.transform, self.context, self.checked, self.trial = trial or guess, context, checked, trial
        for module in (outer, self.layer):
            if not isinstance(module, _Replaceable):
                module.__class__ = _replaceable(type(module))
        self.state: tuple | None = None  # what decides how logits are computed
        self.known = False  # whether the transform was measured before
        self.numbers: Tensor | None = None  # [1, 1, V], or [1, 1, 2] where the transform is known
        self.leaves: Leaves | None = None
        self.result: tuple[Any] | None = None

    @torch.compiler.disable
    def forward(self, hidden: Tensor, **unknown: Any) -> tuple:
        """hidden [B, T, D] -> the leaves of what `function` returns."""
        if unknown:
            raise TypeError(f"fused_head: expected hidden states alone for the head, got {', '.join(unknown)} as well")
        if self.leaves is not None:
            raise ValueError("fused_head: expected a model that calls its head once, got a second call")
        with current_call(None):  # the function may call the model
            self.state = self.describe(hidden)
            if self.trial is None and self.state in self.checked:
                self.known, self.transform = True, self.checked[self.state]
                self.numbers = logit_transform.known_numbers(2, head_parts(self.layer)[0].weight.device)
            else:
                self.check_head(hidden.detach())
            head = effective_head(self.layer, hidden)
            result = self.function(head.hidden, head.weight, **head.options(), **self.transform._asdict())
        tensors, tree = pytree.tree_flatten(result)
        for i, x in enumerate(tensors):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"fused_head: expected a function that returns tensors, got {type(x).__name__}")
            if x is not None and x.requires_grad and x._is_view():
                tensors[i] = x.clone()  # writing to a view would lose the hooks of FSDP2
        self.leaves = Leaves(tree, tuple(tensors))
        self.versions = tuple(map(_version, tensors))
        return self.leaves.tensors

    def describe(self, hidden: Tensor) -> tuple:
        """Everything that the check of the head and of the transform depends on; not the values of weights."""
        base, adapters = head_parts(self.layer)
        weight = base.weight
        return (
            *self.context,
            _ref(self.layer),
            original_class(self.layer),
            _ref(self.layer.__dict__.get("forward")),
            _ref(base),
            original_class(base),
            adapters,
            tuple(module.training for module in self.layer.modules()),
            weight.dtype,
            weight.shape,
            weight.device,
            hidden.dtype,
            autocast_dtype(hidden.device.type),
        )

    @torch.compiler.disable
    def stand_in_for(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Numbers [1, 1, K] in place of logits, after all hooks ran on what `function` returned."""
        try:
            returned = run(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            if self.leaves is not None and self.result is None:
                raise self.refused_hooks() from error
            raise
        if self.leaves is None or self.result is not None:
            return returned
        as_many = isinstance(returned, tuple) and len(returned) == len(self.leaves.tensors)
        if not as_many or not all(map(_same_or_cast, self.leaves.tensors, self.versions, returned)):
            raise self.refused_hooks()
        self.result = (self.leaves.join(returned),)
        return self.numbers

    def refused_hooks(self) -> TypeError:
        modules = {id(m): m for m in (self.layer, self.outer)}.values()
        hooks = [hook for module in modules for hook in module._forward_hooks.values()]
        names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
        return TypeError(
            f"lm_head: expected forward hooks that leave the head's output as it is, got {names or 'another wrapper'}; "
            f"under fused_head there are no logits to change: remove the hook, or do the same in the model's forward"
        )

    @torch.compiler.disable
    def observed_transform(self, logits: Tensor | None, owner: str) -> LogitTransform:
        """What the model, `owner`, made of our numbers [1, 1, K]: the transform of this call, or the one to try."""
        logit_transform.check_logits(self.numbers, logits, owner)
        if not self.known:
            return logit_transform.measured(self.transform, self.numbers, logits, owner)
        if logit_transform.unchanged(self.transform, self.numbers, logits, owner):
            return self.transform
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"fused_head: expected {owner} to scale its logits as when it was measured, {self.transform}, got "
                f"{logit_transform.fitted(logits)}; a pass is not repeated on one of several ranks: call "
                f"attach_fused_head(model).forget() on all of them after a change"
            )
        return logit_transform.fitted(logits)

    @torch.no_grad()
    def check_head(self, hidden: Tensor) -> None:
        """Compare the layer's own output with `linear_logprobs` on a few rows [K, D], without an adapter's dropout."""
        rows = hidden.flatten(0, -2)
        count = min(CHECKED_ROWS, len(rows))
        rows = rows[torch.arange(count, device=rows.device) * (len(rows) - 1) // max(count - 1, 1)]
        layer, own = without_dropout(self.layer), own_forward(self.layer)
        if isinstance(own, MethodType) and own.__self__ is self.layer:
            own = MethodType(own.__func__, layer)
        raw = _logits(own, rows, self.layer)  # [K, V]
        head = effective_head(layer, rows)
        targets = torch.cat([raw.argmax(-1), raw.argmin(-1)])  # [2K]
        ours = linear_logprobs(head.hidden.repeat(2, 1), head.weight, targets, **head.options()).logprobs  # [2K]
        own = raw.to(ours.dtype).log_softmax(-1).repeat(2, 1).gather(-1, targets[:, None])[:, 0]  # [2K]
        self.numbers = logit_transform.known_numbers(raw.shape[-1], raw.device)
        known = own.isfinite()  # rows of padding may be NaN
        if not bool(known.any()):
            self.state = None  # to be checked again
            return
        error = (ours - own)[known].abs().max().item()
        allowed = HEAD_TOLERANCE[raw.dtype] * (1 + raw[known[: len(raw)]].abs().max().item())
        if not error <= allowed:
            mode = "training" if self.layer.training else "evaluation"
            raise ValueError(
                f"fused_head: expected the head, {type(self.layer).__name__}, to be hidden W^T + bias, but its "
                f"log-probs differ by {error:.3g} in {mode} mode (allowed {allowed:.3g}); this head is not supported"
            )


def _logits(own: Callable[..., Any], rows: Tensor, layer: nn.Module) -> Tensor:
    """The layer's own output [K, V] on rows [K, D]."""
    try:
        return own(rows)
    except RuntimeError as error:
        weight = head_parts(layer)[0].weight
        if weight.dtype == rows.dtype or autocast_dtype(rows.device.type) is not None:
            raise
        raise TypeError(
            f"fused_head: expected hidden states and lm_head.weight in one dtype, or a head that casts, got "
            f"{rows.dtype} and {weight.dtype}; call model.lm_head.to({rows.dtype}), or the model under torch.autocast"
        ) from error


def _ref(x: Any) -> Any:
    """A weak reference, by which to recognise an object without keeping it alive."""
    return None if x is None else weakref.ref(x)


def _version(x: Tensor | None) -> int | None:
    """A counter of writes to the tensor; inference tensors have none."""
    return None if x is None or x.is_inference() else x._version


def _same_or_cast(old: Tensor | None, version: int | None, new: Any) -> bool:
    """Whether a hook left a tensor alone, passed it on through a node of autograd (ZeRO-3), or only cast it (FSDP2)."""
    if old is None or not isinstance(new, Tensor):
        return old is new
    if _version(old) != version or new.shape != old.shape:
        return False
    return new.dtype != old.dtype or new is old or new.data_ptr() == old.data_ptr()
