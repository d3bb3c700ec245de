"""Tensors that say `cuda:0` and hold their values on the CPU, and what an operation on them obeys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from cuda_device import autocast
from cuda_device.lists import FLOATING, MIXED, NONDETERMINISTIC, SYNCS
from cuda_device.log import LOG
from cuda_device.products import PRODUCTS

CUDA = torch.device("cuda", 0)


class CudaTensor(Tensor):
    """Says cuda:0, holds `inner` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        x = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
            requires_grad=False,
        )
        x.inner = inner
        return x

    def __init__(self, inner: Tensor) -> None:
        LOG.hold(self, inner.untyped_storage())

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            kwargs = kwargs or {}
            if torch.is_autocast_enabled("cuda"):
                args, kwargs = autocast.cast(function, args, kwargs)
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def to(self, *args, **kwargs) -> Tensor:
        device, dtype = wanted(args, kwargs)
        if device is None or device.type == "cuda":
            return self if dtype in (None, self.dtype) and not kwargs.get("copy") else _stock_to(self, dtype)
        return _ToHost.apply(self, dtype or self.dtype)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args, **kwargs) -> Tensor:
        return self

    def new_tensor(self, data: Any, *, dtype=None, device=None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def tolist(self) -> Any:
        LOG.sync("tolist")
        return self.inner.tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"CudaTensor({self.inner!r})"

    def __deepcopy__(self, memo):
        memo[id(self)] = _rebuild(self.inner.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.inner.detach(), self.requires_grad)


def _rebuild(inner: Tensor, requires_grad: bool) -> CudaTensor:
    return CudaTensor(inner).requires_grad_(requires_grad)


_stock_to = Tensor.to


def wanted(args: tuple, kwargs: dict) -> tuple[torch.device | None, torch.dtype | None]:
    """(device, dtype) that arguments of `Tensor.to` ask for."""
    like = next((x for x in (*args, kwargs.get("other")) if isinstance(x, Tensor)), None)
    if like is not None:
        return like.device, like.dtype
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    return device, dtype


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        LOG.sync("copy to the host")
        return x.inner.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx, g):
        return CudaTensor(g.to(ctx.dtype)), None


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        LOG.copy()
        return CudaTensor(x.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx, g):
        return g.inner.to(ctx.dtype), None


def host_to(x: Tensor, *args, **kwargs) -> Tensor:
    """`Tensor.to` of a tensor on the host."""
    device, dtype = wanted(args, kwargs)
    if device is None or device.type != "cuda" or isinstance(x, CudaTensor):
        return _stock_to(x, *args, **kwargs)
    return _ToDevice.apply(x, dtype or x.dtype)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def unwrap(x: object) -> object:
    return x.inner if isinstance(x, CudaTensor) else x


def wrap(x: object) -> object:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


def run(func, args: tuple, kwargs: dict) -> Any:
    """One operation of ATen, unseen by modes above autograd."""
    before = LOG.operations.total()
    with torch._C.DisableTorchFunction():
        out = _run(func, args, kwargs)
        if LOG.operations.total() > before:
            touched = {id(x): x.inner for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, CudaTensor)}
            LOG.moved += sum(x.nbytes for x in touched.values())
    return out


def _run(func, args: tuple, kwargs: dict) -> Any:
    """On values, after the checks and counts of a CUDA build."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, CudaTensor)]
    if there:
        _check_determinism(name, func, args, kwargs)
        _count_syncs(name, args, kwargs)
        _check_devices(name, tensors, args)
    if name == "_local_scalar_dense" and there:
        return there[0].inner.item()
    device = kwargs.get("device")
    on_device = bool(there) if device is None else torch.device(device).type == "cuda"
    if on_device and not _only_names(func):
        LOG.operations[name] += 1
    if name == "copy_":
        return _copy(args[0], args[1])
    if name == "_to_copy":
        return _to_copy(args[0], kwargs)
    plain_args, plain_kwargs = tree_map(unwrap, (args, kwargs))
    if func in PRODUCTS:
        out = PRODUCTS[func](*plain_args, **plain_kwargs)
        return kwargs["out"] if "out" in kwargs else CudaTensor(out)
    if device is not None:
        plain_kwargs["device"] = torch.device("cpu")
    if "pin_memory" in plain_kwargs:
        plain_kwargs["pin_memory"] = False
    out = func(*plain_args, **plain_kwargs)
    if not on_device:
        return out
    known = {id(x.inner): x for x in there}
    out = tree_map(lambda x: known[id(x)] if id(x) in known else wrap(x), out)
    if args and isinstance(args[0], CudaTensor) and _aliases(func):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def _only_names(func) -> bool:
    """Whether `func` makes a view or takes memory: nothing is launched for it."""
    arguments, returns = func._schema.arguments, func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    written = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    return (view and not written) or "empty" in func._schema.name


def _aliases(func) -> bool:
    """Whether `func` writes to an argument or returns a view of one."""
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return written or any(r.alias_info is not None for r in func._schema.returns)


def _check_determinism(name: str, func, args: tuple, kwargs: dict) -> None:
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        return
    named = name in NONDETERMINISTIC or (name == "median" and func._overloadname == "dim")
    if name == "bincount":
        named = len(args) > 1 and args[1] is not None
    if named and (name not in FLOATING or (kwargs.get("dtype") or args[0].dtype).is_floating_point):
        raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA")


def _count_syncs(name: str, args: tuple, kwargs: dict) -> None:
    mask = name == "index" and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in SYNCS or mask or repeats:
        LOG.sync(name)


def _check_devices(name: str, tensors: list[Tensor], args: tuple) -> None:
    strangers = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim() > 0]
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        strangers = [x for x in args[2:3] if not isinstance(x, CudaTensor) and x.dim() > 0]
    elif name in MIXED:
        return
    if in_backward():  # formulas in C++ make zeros with the options of a gradient
        strangers = [x for x in strangers if x.count_nonzero()]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got cuda:0 and {strangers[0].device} for a "
            f"tensor of shape {tuple(strangers[0].shape)}"
        )


def _copy(target: Tensor, source: Tensor) -> Tensor:
    if isinstance(source, CudaTensor) and not isinstance(target, CudaTensor):
        LOG.sync("copy to the host")
    if isinstance(target, CudaTensor) and not isinstance(source, CudaTensor):
        LOG.copy()
    unwrap(target).copy_(unwrap(source))
    return target


def _to_copy(x: Tensor, kwargs: dict) -> Tensor:
    device = kwargs.get("device")
    here = isinstance(x, CudaTensor)
    there = here if device is None else torch.device(device).type == "cuda"
    there |= here and in_backward()  # C++ takes the device of the wrapper for the CPU
    if here and not there:
        LOG.sync("copy to the host")
    if there and not here:
        LOG.copy()
    options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    out = torch.ops.aten._to_copy.default(unwrap(x), **options)
    return CudaTensor(out) if there else out
