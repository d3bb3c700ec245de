"""What each PTX instruction that only touches registers computes, on arrays of values.

`function(opcode)` returns a function of arrays of the instruction's type (bfloat16: of bits), which broadcast. float32
fma is rounded once; min and max treat NaN and signed zeros as PTX does; `.approx` is computed in float64. Subnormals
are kept unless the opcode says `.ftz`. What is not in MODELLED is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
WIDER = {"s32": np.int64, "u32": np.uint64}
SMALLEST_NORMAL = np.float32(1.17549435e-38)
MODELLED = (  # patterns of whole opcodes
    r"(add|sub|mul|fma)(\.rn)?(\.ftz)?\.f32|div\.(full|rn)\.f32|(neg|abs)\.f32|(min|max)(\.NaN)?\.f32",
    r"(ex2|sqrt)\.approx(\.ftz)?\.f32",
    r"(add|sub|min|max|div|rem|neg)\.[su](32|64)|(mul|mad)\.(lo\.[su](32|64)|wide\.[su]32)",
    r"(and|or|xor|not)\.(pred|b(16|32|64))|sh[lr]\.[bsu](16|32|64)|bfe\.[su](32|64)|popc\.b32",
    r"setp\.(eq|ne|lt|le|gt|ge|nan|num|(eq|ne|lt|le|gt|ge)u)\.f32|setp\.(eq|ne|lt|le|gt|ge)\.[bsu](16|32|64)",
    r"selp\.[bsuf](16|32|64)",
    r"cvt\.(rn\.f32\.[su](32|64)|[su](16|32|64)\.[su](16|32|64)|f32\.b?f16|rn\.b?f16(x2)?\.f32|rmi(\.ftz)?\.f32\.f32)",
)


def to_bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.bool_ else x.view(UNSIGNED[x.dtype.itemsize])


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even; NaN becomes the canonical NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _fma(a, b, c):
    """Rounded once: a float64 that lies between two float32 is nudged to the side of what it lost itself."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = np.ascontiguousarray(product + c)
    between = total.view(np.uint64) & np.uint64(0xFFFFFFF) == 0
    if between.any():
        part = total - product
        lost = (product - (total - part)) + (c - part)  # exactly total + lost = product + c
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(between & (lost != 0) & np.isfinite(lost), nudged, total)
    return total.astype(np.float32)


def _extreme(fewer: Callable, bits: Callable) -> Callable:
    """min or max: of a NaN and a number the number, of two NaN the canonical one; -0 is less than +0."""

    def extreme(a, b):
        if a.dtype.kind != "f":
            return fewer(a, b)
        a, b = np.broadcast_arrays(a, b)
        return _canonical(np.where(a == b, bits(to_bits(a), to_bits(b)).view(a.dtype), fewer(a, b)))

    return extreme


def _canonical(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), to_bits(x)).view(np.float32)


def _divide(a, b):
    """Integers: towards zero; a division by zero, which PTX leaves open, gives all ones."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~b.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def _shift(f: Callable) -> Callable:
    """By more than the width: all zeros, or all signs."""

    def shift(a, by):
        bits = a.dtype.itemsize * 8
        fill = a >> a.dtype.type(bits - 1) if f is np.right_shift and a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= bits, fill, f(a, np.minimum(by, bits - 1).astype(a.dtype)))

    return shift


def _extract_bits(a, start, length):
    bits = np.uint32(a.dtype.itemsize * 8)
    return _shift(np.right_shift)(_shift(np.left_shift)(a, bits - start - length), bits - length)


def _in_double(f: Callable) -> Callable:
    """Rounded once; numpy's float32 functions differ in the last bit from place to place in an array."""
    return lambda a: f(a.astype(np.float64)).astype(a.dtype)


FUNCTIONS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "fma": _fma,
    "mad": lambda a, b, c: a * b + c, "min": _extreme(np.fmin, np.bitwise_or), "max": _extreme(np.fmax, np.bitwise_and),
    "neg": np.negative, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "shl": _shift(np.left_shift), "shr": _shift(np.right_shift), "bfe": _extract_bits,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32), "sqrt": np.sqrt, "ex2": _in_double(np.exp2),
    "selp": lambda a, b, condition: np.where(condition, a, b),
}  # fmt: skip
RELATIONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _relation(name: str, dtype: str) -> Callable:
    """setp's comparison; of floats one with `u` holds if either is NaN, any other does not."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u"):
        return lambda a, b: RELATIONS[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    if (name, dtype) == ("ne", "f32"):
        return lambda a, b: (a < b) | (a > b)
    return RELATIONS[name]


def _conversion(to: str, source: str, floor: bool) -> Callable:
    if to.endswith("x2"):
        half = _conversion(to[:-2], source, False)
        return lambda a, b: to_bits(half(a)).astype(np.uint32) << np.uint32(16) | to_bits(half(b))  # the upper first
    convert = f32_to_bf16 if to == "bf16" else lambda x: x.astype(TYPES[to])
    if source == "bf16":
        return bf16_to_f32
    return lambda x: convert(np.floor(x) if floor else x)


def function(opcode: tuple[str, ...]) -> Callable:
    """What an instruction of MODELLED computes."""
    name, modifiers, dtype = opcode[0], {*opcode[1:-1]}, opcode[-1]
    if name == "setp":
        return _relation(opcode[1], dtype)
    f = _conversion(*opcode[-2:], "rmi" in modifiers) if name == "cvt" else FUNCTIONS[name]

    def modified(*x):
        if "wide" in modifiers:
            x = [y.astype(WIDER[dtype]) for y in x]
        if "ftz" in modifiers:
            x = [_flush(y) for y in x]
        found = f(*x)
        if "NaN" in modifiers:
            found = _canonical(np.where(np.isnan(x[0]) | np.isnan(x[1]), np.float32(np.nan), found))
        return _flush(found) if "ftz" in modifiers else found

    return modified if modifiers & {"wide", "ftz", "NaN"} else f


def _flush(x):
    """Subnormal float32 become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)
