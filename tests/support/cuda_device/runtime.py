"""`install`: torch.cuda answers, factories make tensors of the device, backward passes get a thread of their own."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten

from cuda_device.log import LOG, Log
from cuda_device.tensor import CUDA, CudaTensor, host_to, run

TOTAL = 80 << 30  # bytes
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=TOTAL,
    L2_cache_size=50 << 20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    gcnArchName="",
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)


class Event:
    def __init__(self, *args, **kwargs) -> None:
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream=None) -> None: ...


class Stream:
    cuda_stream, device = 0, CUDA

    def __init__(self, *args, **kwargs) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    wait_event = wait_stream


def _reset_peak(device=None) -> None:
    LOG.peak = LOG.allocated


def _always(value: Any) -> Callable:
    return lambda *args, **kwargs: value


class Current(threading.local):
    """Index of the current device, which Triton launches on: another than the tensors' until it is chosen."""

    index = 1

    def exchange(self, index: int) -> int:
        before = self.index
        if index >= 0:
            self.index = index
        return before


CURRENT = Current()


TORCH_CUDA = {
    "is_available": _always(True),
    "is_initialized": _always(True),
    "device_count": _always(1),
    "current_device": _always(0),
    "get_device_properties": _always(PROPERTIES),
    "get_device_name": _always(PROPERTIES.name),
    "get_device_capability": _always((9, 0)),
    "is_bf16_supported": _always(True),
    "is_current_stream_capturing": _always(False),
    "memory_allocated": lambda device=None: LOG.allocated,
    "memory_reserved": lambda device=None: LOG.allocated,
    "max_memory_allocated": lambda device=None: LOG.peak,
    "max_memory_reserved": lambda device=None: LOG.peak,
    "reset_peak_memory_stats": _reset_peak,
    "mem_get_info": lambda device=None: (TOTAL - LOG.allocated, TOTAL),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "Event": Event,
    "Stream": Stream,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "get_rng_state_all": list,
    "_exchange_device": CURRENT.exchange,
    "_maybe_exchange_device": CURRENT.exchange,
}
for _name in ("_lazy_init", "synchronize", "empty_cache", "ipc_collect", "set_device"):
    TORCH_CUDA[_name] = _always(None)
for _name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"):
    TORCH_CUDA[_name] = _always(None)


class Factories(TorchDispatchMode):
    """Operations whose device is an argument, not a tensor's."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "lad_kernels":  # the operations that it is made of
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        device = kwargs.get("device")
        here = any(isinstance(x, CudaTensor) for x in tree_flatten((args, kwargs))[0])
        if here or (device is not None and torch.device(device).type == "cuda"):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """Of the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def _from_data(make: Callable) -> Callable:
    """torch.tensor and torch.as_tensor: made on the host, then copied."""

    def from_data(data, *args, device=None, requires_grad=False, **kwargs):
        if device is None:
            modes = reversed(torch.overrides._get_current_function_mode_stack())
            device = next((mode.device for mode in modes if isinstance(mode, DeviceContext)), "cpu")
        if isinstance(data, CudaTensor) or (isinstance(data, Tensor) and torch.device(device).type == "cuda"):
            return data.to(device, kwargs.get("dtype"))
        if isinstance(data, list):
            data = [x.item() if isinstance(x, CudaTensor) else x for x in data]
        with torch._C.DisableTorchFunction():
            found = make(data, *args, **kwargs)
        if torch.device(device).type == "cuda":
            LOG.copy()
            found = CudaTensor(found)
        return found.requires_grad_() if requires_grad else found

    return from_data


def _factories_in_every_thread() -> None:
    stock = threading.Thread.run

    def run_with_factories(self: threading.Thread) -> None:
        with Factories():
            stock(self)

    threading.Thread.run = run_with_factories


def _backward_in_a_thread() -> None:
    """Of a CUDA device: no context variables of the caller; autocast and the modes below autograd go along."""
    from torch.autograd import graph

    engine = graph._engine_run_backward

    def run_backward(outputs, *args, **kwargs):
        if not any(isinstance(x, CudaTensor) for x in outputs) or not torch._C._is_multithreading_enabled():
            return engine(outputs, *args, **kwargs)
        found: list[Any] = []
        modes = [mode for mode in _get_current_dispatch_mode_stack() if not isinstance(mode, Factories)]
        cast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"))

        def work() -> None:
            try:
                with contextlib.ExitStack() as stack:
                    for context in (*modes, cast):
                        stack.enter_context(context)
                    found.append(engine(outputs, *args, **kwargs))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    for module in (graph, torch.autograd):
        module._engine_run_backward = run_backward


def _interpret_values() -> None:
    """Kernels in Triton's interpreter get the values of the device's tensors; one of the host is refused."""
    import triton.runtime.interpreter as interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    call = interpreter.GridExecutor.__call__

    def values(x: Any, kernel: str) -> Any:
        if isinstance(x, TensorDescriptor):
            return TensorDescriptor(values(x.base, kernel), x.shape, x.strides, x.block_shape, x.padding)
        if isinstance(x, CudaTensor):
            return x.inner.detach()
        if isinstance(x, Tensor):
            raise ValueError(f"Pointer argument of {kernel} cannot be accessed from Triton (cpu tensor?)")
        return x

    def on_values(self, *args, **kwargs):
        kernel = self.fn.__name__
        if CURRENT.index != 0 and self.fn.__module__.startswith("lad_kernels."):
            raise RuntimeError(f"{kernel} was launched on the current device, which its tensors need not be on")
        LOG.launches[kernel] += 1
        args, kwargs = [values(x, kernel) for x in args], {k: values(v, kernel) for k, v in kwargs.items()}
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            return call(self, *args, **kwargs)

    def counted(access: Callable, mask: int) -> Callable:
        def on_pointers(self, ptrs, *rest, **options):
            LOG.moved += int(np.sum(rest[mask].data)) * (ptrs.get_element_ty().primitive_bitwidth // 8)
            return access(self, ptrs, *rest, **options)

        return on_pointers

    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = counted(builder.create_masked_load, 0)
    builder.create_masked_store = counted(builder.create_masked_store, 1)
    interpreter.GridExecutor.__call__ = on_values


_mode: Factories | None = None


def install(*, interpret: bool = True) -> Log:
    """Make this process one with the device; nothing the second time. Call it before `lad_kernels` is imported.

    Without `interpret` kernels are launched as they are compiled, by a driver that the caller has to set.
    """
    global _mode
    if _mode is not None:
        return LOG
    torch._C._set_only_lift_cpu_tensors(True)
    for name, value in TORCH_CUDA.items():
        setattr(torch.cuda, name, value)
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    Tensor.to = functools.wraps(Tensor.to)(host_to)
    Tensor.cuda = functools.wraps(Tensor.cuda)(lambda x, *args, **kwargs: host_to(x, CUDA))
    torch.Generator = Generator
    torch.tensor, torch.as_tensor = _from_data(torch.tensor), _from_data(torch.as_tensor)
    _factories_in_every_thread()
    _backward_in_a_thread()
    if interpret:
        _interpret_values()
    _mode = Factories()
    _mode.__enter__()
    return LOG
