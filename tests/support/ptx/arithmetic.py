"""What each PTX instruction that only touches registers computes, on arrays of values.

`function(opcode)` and `conversion(opcode)` return a function of arrays of the instruction's type (bfloat16 and packed
types: of bits), which broadcast. float32 fma is rounded once; min and max treat NaN and signed zeros as PTX does;
`.approx` is computed in float64. Subnormals are kept unless the opcode says `.ftz`. What is missing is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}
SMALLEST_NORMAL = np.float32(1.17549435e-38)
CANONICAL_NAN = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}  # by bytes
MODIFIERS = {"rn", "rz", "ftz", "approx", "full", "lo", "wide", "NaN"}


def to_bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.bool_ else x.view(UNSIGNED[x.dtype.itemsize])


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even; NaN becomes the canonical NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(CANONICAL_NAN[2]), rounded)


def _fma(a, b, c):
    """Rounded once: a float64 that lies between two float32 is nudged to the side of what it lost itself."""
    if a.dtype != np.float32:
        return a * b + c
    product, c = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = np.ascontiguousarray(product + c)
    between = total.view(np.uint64) & np.uint64(0xFFFFFFF) == 0
    if between.any():
        part = total - product
        lost = (product - (total - part)) + (c - part)  # exactly total + lost = product + c
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(between & (lost != 0) & np.isfinite(lost), nudged, total)
    return total.astype(np.float32)


def _add_towards_zero(a, b):
    total = a.astype(np.float64) + b
    lost = (a - (total - b)) + (b - (total - (total - b)))  # exactly total + lost = a + b
    nearest = total.astype(np.float32)
    beyond = (np.abs(nearest) > np.abs(total)) | ((nearest == total) & (lost * total < 0))
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def _extreme(fewer: Callable, bits: Callable) -> Callable:
    """min or max: of a NaN and a number the number, of two NaN the canonical one; -0 is less than +0."""

    def extreme(a, b):
        if a.dtype.kind != "f":
            return fewer(a, b)
        a, b = np.broadcast_arrays(a, b)
        found = np.where(a == b, bits(to_bits(a), to_bits(b)).view(a.dtype), fewer(a, b))
        return _canonical(found)

    return extreme


def _canonical(x: np.ndarray) -> np.ndarray:
    nan = UNSIGNED[x.dtype.itemsize](CANONICAL_NAN[x.dtype.itemsize])
    return np.where(np.isnan(x), nan, to_bits(x)).view(x.dtype)


def _divide(a, b):
    """Integers: towards zero; a division by zero, which PTX leaves open, gives all ones."""
    if a.dtype.kind == "f":
        return a / b
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    x, y = a.astype(wide), b.astype(wide)
    safe = np.where(y == 0, wide(1), y)
    quotient = np.abs(x) // np.abs(safe) * np.sign(x) * np.sign(safe) if wide is np.int64 else x // safe
    return np.where(y == 0, ~wide(0), quotient).astype(a.dtype)


def _shift(f: Callable) -> Callable:
    """By more than the width: all zeros, or all signs."""

    def shift(a, by):
        bits, by = a.dtype.itemsize * 8, by.astype(np.int64)
        fill = a >> a.dtype.type(bits - 1) if f is np.right_shift and a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= bits, fill, f(a, np.minimum(by, bits - 1).astype(a.dtype))).astype(a.dtype)

    return shift


def _extract_bits(a, start, length):
    bits = a.dtype.itemsize * 8
    start, length = (x.astype(np.int64) & 0xFF for x in (start, length))
    left = np.clip(bits - start - length, 0, bits - 1).astype(a.dtype)
    right = np.clip(bits - length, 0, bits - 1).astype(a.dtype)
    return np.where(length == 0, a.dtype.type(0), (a << left) >> right).astype(a.dtype)


def _in_double(f: Callable) -> Callable:
    """Rounded once; numpy's float32 functions differ in the last bit from place to place in an array."""
    return lambda a: f(a.astype(np.float64)).astype(a.dtype)


FUNCTIONS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": lambda a, b: a - _divide(a, b) * b,
    "min": _extreme(np.fmin, np.bitwise_or), "max": _extreme(np.fmax, np.bitwise_and), "neg": np.negative,
    "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "fma": _fma, "mad": lambda a, b, c: a * b + c, "bfe": _extract_bits,
    "shl": _shift(np.left_shift), "shr": _shift(np.right_shift),
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32), "sqrt": np.sqrt,
    "ex2": _in_double(np.exp2), "lg2": _in_double(np.log2),
}  # fmt: skip
RELATIONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def relation(name: str, dtype: str) -> Callable:
    """setp's comparison; of floats one with `u` holds if either is NaN, any other does not."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if TYPES[dtype] not in (np.float16, np.float32, np.float64):
        return RELATIONS[name]
    if len(name) == 3:
        return lambda a, b: RELATIONS[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: RELATIONS[name](a, b) & ~np.isnan(a) & ~np.isnan(b)


def function(opcode: tuple[str, ...]) -> Callable:
    """What an instruction of FUNCTIONS computes."""
    name, modifiers, dtype = opcode[0], opcode[1:-1], opcode[-1]
    rounding = "rz" in modifiers and (name, dtype) != ("add", "f32")
    if set(modifiers) - MODIFIERS or rounding or dtype not in TYPES:
        raise NotImplementedError(f"PTX instruction {'.'.join(opcode)}")
    f = _add_towards_zero if "rz" in modifiers else FUNCTIONS[name]
    if "wide" in modifiers:
        f = _widened(f, WIDER[TYPES[dtype]])
    if "NaN" in modifiers:
        f = _with_nan(f)
    if dtype in ("bf16", "bf16x2", "f16x2", "f16") and not (dtype == "f16" and name in ("neg", "abs", "min", "max")):
        f = _through_f32(f, dtype)
    return _flushed(f) if "ftz" in modifiers else f


def _widened(f: Callable, wide: type) -> Callable:
    return lambda a, b, *c: f(a.astype(wide), b.astype(wide), *c)


def _with_nan(f: Callable) -> Callable:
    return lambda a, b: _canonical(np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), f(a, b)))


def _flushed(f: Callable) -> Callable:
    """Subnormal float32 operands and results become zeros of their sign."""

    return lambda *x: _flush(f(*(_flush(y) for y in x)))


def _flush(x):
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _through_f32(f: Callable, dtype: str) -> Callable:
    """16-bit floats, one or two in a register, by way of float32."""
    brain = dtype.startswith("bf")

    def run(*operands):
        operands = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*operands)]
        halves = [x.view(np.uint16).reshape(*x.shape, -1) for x in operands]
        found = f(*(bf16_to_f32(x) if brain else x.view(np.float16).astype(np.float32) for x in halves))
        bits = f32_to_bf16(found) if brain else found.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(bits).view(TYPES[dtype])[..., 0]

    return run


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rn": lambda x: x}


def conversion(opcode: tuple[str, ...]) -> Callable:
    """cvt: from arrays of the source type (bfloat16: of bits) to bits of the destination type."""
    modifiers, to, source = opcode[1:-2], opcode[-2], opcode[-1]
    if set(modifiers) - {*ROUNDINGS, "ftz"} or to not in TYPES or source not in TYPES or source[-2:] == "x2":
        raise NotImplementedError(f"PTX instruction {'.'.join(opcode)}")
    if to in ("bf16x2", "f16x2"):
        half = f32_to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return lambda a, b: half(a).astype(np.uint32) << np.uint32(16) | half(b)  # the first in the upper half
    dtype = np.dtype(TYPES[to])

    def run(x):
        x = bf16_to_f32(x) if source == "bf16" else _flush(x) if "ftz" in modifiers else x
        for mode in modifiers:
            x = ROUNDINGS[mode](x) if mode in ROUNDINGS and x.dtype.kind == "f" else x
        if to == "bf16":
            return f32_to_bf16(x.astype(np.float32))
        if x.dtype.kind == "f" and dtype.kind in "iu":
            return to_bits(_to_integer(x, dtype))
        return to_bits(x.astype(dtype))

    return run


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A rounded float; beyond the range its end, NaN 0."""
    bounds, x = np.iinfo(dtype), x.astype(np.float64)
    inside = (x >= bounds.min) & (x < bounds.max)
    ends = np.where(x > 0, dtype.type(bounds.max), np.where(np.isnan(x), dtype.type(0), dtype.type(bounds.min)))
    return np.where(inside, np.where(inside, x, 0).astype(dtype), ends)
