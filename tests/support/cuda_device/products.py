"""Matrix products whose result is wider than their factors, which CUDA alone has: ATen/native/cuda/Blas.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)


def check(a: Tensor, b: Tensor, out_dtype: torch.dtype, added: Tensor | None = None, out: Tensor | None = None) -> None:
    """Raise what `mm` [n, k] x [k, m] and `addmm` with `out_dtype` raise on CUDA; tensors hold the values."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({tuple(a.shape)} and {tuple(b.shape)})")
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    if out_dtype != a.dtype and not (out_dtype == torch.float32 and a.dtype in NARROW):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if added is not None and added.dtype not in (out_dtype, a.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    if out is not None and out.dtype != out_dtype:
        raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
    if out is not None and out.shape != (a.shape[0], b.shape[1]):
        raise RuntimeError(f"out has shape {tuple(out.shape)}, the product {(a.shape[0], b.shape[1])}")


def product(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] in float32: products of 16-bit factors are exact in it."""
    return a.float() @ b.float()


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    check(a, b, out_dtype)
    return product(a, b).to(out_dtype)


def mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    check(a, b, out_dtype, out=out)
    return out.copy_(product(a, b))


def addmm(added: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1) -> Tensor:
    check(a, b, out_dtype, added)
    return (beta * added.float() + alpha * product(a, b)).to(out_dtype)


def addmm_out(
    added: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    check(a, b, out_dtype, added, out)
    return out.copy_(beta * added.float() + alpha * product(a, b))


PRODUCTS = {
    torch.ops.aten.mm.dtype: mm,
    torch.ops.aten.mm.dtype_out: mm_out,
    torch.ops.aten.addmm.dtype: addmm,
    torch.ops.aten.addmm.dtype_out: addmm_out,
}
