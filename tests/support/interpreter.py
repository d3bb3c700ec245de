"""Triton's CPU interpreter, repaired where it is wrong, with errors where it would be silently wrong.

The interpreter stores bfloat16 as raw uint16 bits. Stock (triton 3.6 to 3.9) it multiplies those bits in `tl.dot`,
truncates float32 -> bfloat16 instead of rounding to nearest even, and does arithmetic on the bits; and triton 3.6 with
numpy >= 2.4 refuses a runtime scalar as a bound of range(). `install()`

- lets a runtime scalar bound a loop,
- rounds `tl.fma` once,
- makes `tl.dot` multiply values of bfloat16, sum in an order that is the same for every row (of float32 factors one fma
  after the other, as compiled code does), and casts to and from bfloat16 round as a GPU does,
- makes `tl.exp` of float32 what is compiled for an NVIDIA GPU: 2 to the rounded product of x and log2(e),
- turns every other operation on a bfloat16 value into an error that asks for a cast to float32,
- lets an autotuner take its first configuration (stock: "0 active drivers"),
- replaces the language's functions once a launch, not at every call of a device function (a third of a launch's time).

It does nothing in a process whose kernels are compiled, and nothing the second time.
"""

from __future__ import annotations

import functools

import numpy as np

_installed = False
_LOG2_E = np.float32(1.4426950408889634)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns (uint16), to nearest even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def install() -> bool:
    """Repair the interpreter; return whether this process interprets its kernels."""
    global _installed
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    if not _installed:
        import triton.language as tl
        import triton.runtime.interpreter as stock

        _repair_scalars(stock)
        _repair_casts(stock, tl)
        _refuse_bits(stock, tl)
        _first_configuration()
        _replace_once(stock, tl)
        _installed = True
    return True


def _is_bits(handle, tl) -> bool:
    dtype = getattr(handle, "dtype", None)
    return dtype is not None and dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _repair_scalars(stock) -> None:
    patch = stock._patch_lang_tensor

    def index(self):
        return int(self.handle.data.reshape(-1)[0])

    @functools.wraps(patch)
    def patched(tensor, *scope):  # triton >= 3.8 passes the scope that undoes its patches
        patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    stock._patch_lang_tensor = patched


def _repair_casts(stock, tl) -> None:
    builder, handle = stock.InterpreterBuilder, stock.TensorHandle
    cast, convert, fma, exp = builder.cast_impl, builder.create_fp_to_fp, builder.create_fma, builder.create_exp

    def create_dot(self, a, b, d, *rest):
        # In float64 a product of tiles is exact for 16-bit factors. A float32 BLAS sums in an order that depends on
        # the row's place in the tile, which would hide whether the kernels are bitwise independent of the batch.
        in_order = a.dtype.scalar == tl.float32
        a, b = ((to_float32(x.data) if _is_bits(x, tl) else x.data).astype(np.float64) for x in (a, b))
        if not in_order:
            return handle((a @ b).astype(d.data.dtype) + d.data, d.dtype.scalar)
        total = d.data
        for k in range(a.shape[-1]):
            total = (a[..., :, k, None] * b[..., None, k, :] + total).astype(np.float32)
        return handle(total, d.dtype.scalar)

    def create_exp(self, x):
        if x.data.dtype != np.float32:
            return exp(self, x)
        return handle(np.exp2((x.data * _LOG2_E).astype(np.float64)).astype(np.float32), x.dtype.scalar)

    def cast_impl(self, source, dtype):
        old, new = source.dtype.scalar, dtype.scalar
        if new == tl.bfloat16 and old != tl.bfloat16:
            return handle(to_bfloat16(source.data.astype(np.float32)).reshape(source.data.shape), new)
        if old == tl.bfloat16 and new != tl.bfloat16:
            return handle(to_float32(source.data).astype(stock._get_np_dtype(new)).reshape(source.data.shape), new)
        return cast(self, source, dtype)

    def create_fp_to_fp(self, source, dtype, rounding):
        if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
            return cast_impl(self, source, dtype)
        return convert(self, source, dtype, rounding)

    def create_fma(self, a, b, c):  # rounded once: float64 holds the product of two float32 exactly
        if a.data.dtype != np.float32:
            return fma(self, a, b, c)
        wide = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return handle(wide.astype(np.float32), c.dtype.scalar)

    builder.create_fma, builder.create_exp = create_fma, create_exp
    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    builder.get_bf16 = lambda self, value: handle(to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)


def _refuse_bits(stock, tl) -> None:
    def refuse(operation: str):
        raise NotImplementedError(
            f"{operation} on a bfloat16 value: the interpreter would compute with its raw bits; "
            "cast to tl.float32 first (x.to(tl.float32))"
        )

    def guarded(method):
        @functools.wraps(method)
        def call(self, *arguments):
            *operands, operation = arguments
            if operation is not np.where and any(_is_bits(x, tl) for x in operands):
                refuse(getattr(operation, "__name__", method.__name__))
            return method(self, *arguments)

        return call

    def guarded_reduction(method):
        @functools.wraps(method)
        def call(self, operands):
            if any(x.dtype.scalar == tl.bfloat16 for x in operands):
                refuse("a reduction or scan")
            return method(self, operands)

        return call

    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(stock.InterpreterBuilder, name, guarded(getattr(stock.InterpreterBuilder, name)))
    for operations in (stock.ReduceOps, stock.ScanOps):
        operations.apply_impl = guarded_reduction(operations.apply_impl)


def _first_configuration() -> None:
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    @functools.wraps(run)
    def run_first(self, *arguments, **options):
        self.configs = self.configs[:1]
        return run(self, *arguments, **options)

    Autotuner.run = run_first


def _replace_once(stock, tl) -> None:
    replace = stock._patch_lang

    @functools.wraps(replace)
    def replace_once(function):
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if not languages or any(tl.core.is_builtin(x.load) for x in languages):
            return replace(function)
        return stock._LangPatchScope() if hasattr(stock, "_LangPatchScope") else None  # nothing to undo

    stock._patch_lang = replace_once
