"""What the head's kernels share: the order of tiles, the product of one tile, and product -> logits.

    raw = h W^T + b,  x = scale * raw,  z = c tanh(x / c) / T        (without a softcap c: z = x / T)

Exact here: products of 16-bit inputs are exact in fp32 and are accumulated in fp32; raw and z are never rounded to 16
bits. Precision is lost only to the order of that accumulation and to a few roundings in z, about 1e-7 relative each.
Out-of-range rows and columns of a tile read the last valid row (pointers) or zeros (TMA): finite values that the
caller masks when it stores or sums. Beyond D, both read zeros.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
_FOUR = tl.constexpr(9)  # bits in which four columns of a thread differ


@triton.jit
def tile_order(tile, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """Tile number -> (token tile, vocabulary tile); GROUP_N token tiles pass over W together and share it in L2."""
    group = tile // (GROUP_N * tiles_v)
    first = group * GROUP_N
    size = tl.minimum(tiles_n - first, GROUP_N)
    inside = tile - group * GROUP_N * tiles_v
    return first + inside % size, inside // size


@triton.jit
def biases(bias, columns, inside, softcap):
    """Biases [C] of some columns in fp32. -inf, which excludes an entry, becomes a number as good: 0 * -inf is NaN.

    A softcap makes a number of it by itself, and leaves no registers for more.
    """
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if softcap is None:
        b = tl.where(b < -1e30, -1e30, b)
    return b


@triton.jit
def tanh_and_slope(x):
    """tanh(x) to a few fp32 roundings, and 1 - tanh(x)^2 to what one rounding of x itself costs it.

    That is 2 |x| + 4 roundings, 1.9e-6 at |x| = 20.

    With e = exp(-2 |x|): tanh = (1 - e) / (1 + e) and slope = 4 e / (1 + e)^2. The first cancels near zero, where an
    odd polynomial takes over (Cephes tanhf, |x| < 0.625); the second never does, while 1 - tanh^2 would at large |x|.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    r = 1.0 / (1.0 + e)
    far = (1.0 - e) * r
    s = x * x
    p = tl.fma(s, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, s, -5.37397155531e-2)
    p = tl.fma(p, s, 1.33314422036e-1)
    p = tl.fma(p, s, -3.33332819422e-1)
    t = tl.where(size < 0.625, tl.fma(x * s, p, x), tl.where(x < 0, -far, far))
    return t, 4.0 * e * r * r


@triton.jit
def one_minus_exp(x):
    """1 - e^x of x <= 0 to a few roundings: -2 e^(x / 2) sinh(x / 2) near zero, with the series of sinh."""
    y = 0.5 * x
    s = y * y
    sinh = y * (1.0 + s * (1 / 6) * (1.0 + s * (1 / 20) * (1.0 + s * (1 / 42) * (1.0 + s * (1 / 72)))))
    return tl.where(x > -1.0, -2.0 * tl.exp(y) * sinh, 1.0 - tl.exp(x))


@triton.jit
def is_largest(z, largest):
    """Whether no logit is larger by more than four float32 roundings."""
    return z >= largest - 4.8e-7 * tl.maximum(tl.abs(largest), 1.0)


@triton.jit
def exponents(raw, scale, softcap, inv_temperature):
    """Products plus bias -> (x, factor, dz / draw) with z = x * factor, the form that `levels` takes."""
    if softcap is not None:
        t, slope = tanh_and_slope(raw * (scale / softcap))
        return t, softcap * inv_temperature, slope * scale * inv_temperature
    else:
        factor = scale * inv_temperature
        return raw, factor, factor


@triton.jit
def levels(start, f):
    """(level, r) of each row, for exponentials e^((x - start) factor) = 2^(x f - level - r), f = factor log2 e.

    `fma(x, f, -level)` then is one instruction an element, rounded once. r is what rounding did to `level`, the same in
    a whole row: code that sums or stores takes it back there. So only the difference x - start is rounded, not x.
    """
    level = start * f
    return level, tl.where(tl.abs(level) < float("inf"), tl.fma(start, f, -level), 0.0)


@triton.jit
def row_levels(shift, factor, f):
    """`levels` for a start that is given as a logit: shift / factor, whose rounding r takes back too."""
    start = shift / factor
    level, r = levels(start, f)
    rest = tl.fma(-start, factor, shift)
    return level, r + tl.where(tl.abs(level) < float("inf"), rest * LOG2_E, 0.0)


@triton.jit
def inverse_temperatures(inv_temperature, rows, N, PER_TOKEN: tl.constexpr):
    """1 / T of each row [R]: read from a tensor [N] when PER_TOKEN, else one number for all."""
    if PER_TOKEN:
        return tl.load(inv_temperature + rows, mask=rows < N, other=1.0)
    else:
        return tl.zeros_like(rows).to(tl.float32) + inv_temperature


@triton.jit
def below(count, COLUMNS: tl.constexpr, THREAD: tl.constexpr):
    """Which of a tile's columns [1, COLUMNS] are among its first `count`, for numbers in registers; see add_at.

    A mask of loads and stores says `columns < V`: from that the compiler knows how wide they may be.
    """
    at = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    return (at & ~THREAD) < count - (at & THREAD)


@triton.jit
def add_at(g, y, term, COLUMNS: tl.constexpr, THREAD: tl.constexpr):
    """g [R, COLUMNS] with term [R, 1] added in column y [R, 1] of each row, if it has that.

    A thread's columns differ in all bits but THREAD (tile_table.thread_bits). With those on the other side, constants
    are compared with numbers of the thread, four columns at once, and no register holds a column. Whatever THREAD is,
    the result is the same.
    """
    at = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    own = tl.where((y & _FOUR) == (at & _FOUR), term, 0.0)  # [R, COLUMNS], four numbers a row
    return tl.where(((y & ~_FOUR) ^ (at & ~_FOUR & THREAD)) == (at & ~_FOUR & ~THREAD), g + own, g)


@triton.jit
def logit_tile(
    h,  # [N, D], pointer or descriptor
    w,  # [V, D], pointer or descriptor
    bias,  # [V] or None
    inv_temperature,  # [N] or a number
    row,
    column,
    N,
    V,
    D,
    h_stride,
    w_stride,
    scale,
    softcap,
    zero,  # 0 as a number that the compiler does not know, or None: see tile_table.zero
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """The tile of h W^T at (row, column) as (x, factor, slope) of `exponents`: with it every kernel begins.

    x is [BLOCK_N, BLOCK_V], factor [BLOCK_N, 1], slope like either of them. Products are summed in fp32.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)  # [BLOCK_N, BLOCK_V]
    if zero is not None:
        acc += zero
    if TMA:
        for k in range(0, D, BLOCK_K):
            acc = tl.dot(h.load([row, k]), w.load([column, k]).T, acc, input_precision="ieee")
    else:
        # One 64-bit base per operand that moves along D, and 32-bit offsets inside the tile: half the address
        # registers of a tile of 64-bit pointers, which is what makes unaligned operands fit.
        h += row.to(tl.int64) * h_stride
        w += column.to(tl.int64) * w_stride
        ks = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - row)  # [BLOCK_N]
        columns = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - column)  # [BLOCK_V]
        h_offsets = rows[:, None] * h_stride + ks[None, :]  # [BLOCK_N, BLOCK_K]
        w_offsets = columns[None, :] * w_stride + ks[:, None]  # [BLOCK_K, BLOCK_V]
        for k in range(0, D, BLOCK_K):
            if EVEN_K:
                a = tl.load(h + k + h_offsets)  # [BLOCK_N, BLOCK_K]
                b = tl.load(w + k + w_offsets)  # [BLOCK_K, BLOCK_V]
            else:
                a = tl.load(h + k + h_offsets, mask=ks[None, :] < D - k, other=0.0)
                b = tl.load(w + k + w_offsets, mask=ks[:, None] < D - k, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    rows = row + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = column + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    in_n, in_v = rows < N, columns < V  # [BLOCK_N], [BLOCK_V]
    if bias is not None:
        acc += biases(bias, columns, in_v, softcap)[None, :]
    inv_t = inverse_temperatures(inv_temperature, rows, N, PER_TOKEN)  # [BLOCK_N]
    x, factor, slope = exponents(acc, scale, softcap, inv_t[:, None])
    return x, factor, slope, rows, columns, in_n, in_v
