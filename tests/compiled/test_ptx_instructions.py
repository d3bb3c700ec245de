"""Single PTX instructions of the machine in tests/support/ptx, against numpy, exact fractions and the PTX manual."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.bulk import TensorMap
from ptx.counters import Counters
from ptx.instructions import translate
from ptx.machine import launch
from ptx.matrix import descriptor_bytes
from ptx.memory import Fault, GlobalMemory
from ptx.reader import read

F32, U32, S32, U16 = np.float32, np.uint32, np.int32, np.uint16
SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 1 + 2.0**-23, 2.0**-149, 0.1, 7e4]
WHOLE = [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678]
LEFT, RIGHT = (x.reshape(-1) for x in np.meshgrid(F32(SPECIAL), F32(SPECIAL)))  # every pair
A, B = (x.reshape(-1) for x in np.meshgrid(U32(WHOLE), U32(WHOLE)))
NAN = np.isnan(LEFT) | np.isnan(RIGHT)
KINDS = {1: ("h", 8), 2: ("h", 16), 4: ("r", 32), 8: ("rd", 64)}  # by bytes: letter of a register, bits


def execute(body: str, arguments: list, *, threads=32, shared=0, grid=(1, 1, 1), counters=None) -> None:
    """Run `body` with the addresses of arrays and tensor maps in %rd0, %rd1 ..., %tid.x in %r0, 4 %tid.x in %rd10."""
    names, moves, memory, parameters = [], "", GlobalMemory(), {}
    for i, x in enumerate(arguments):
        names.append(f".param .u64 .ptr .global k_param_{i}")
        if isinstance(x, TensorMap):
            parameters[f"k_param_{i}"], moves = x, moves + f"mov.b64 %rd{i}, k_param_{i};"
        else:
            parameters[f"k_param_{i}"], moves = x.ctypes.data, moves + f"ld.param.b64 %rd{i}, [k_param_{i}];"
            memory.register(f"array {i}", x.ctypes.data, x.nbytes)
    kernel = read(
        f""".visible .entry k({",".join(names)})\n.reqntid {threads}\n{{
        .reg .pred %p<9>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .b32 %f<60>; .reg .b64 %rd<40>;
        {moves} mov.u32 %r0, %tid.x; mul.wide.u32 %rd10, %r0, 4; {body} ret;\n}}"""
    )
    launch(kernel, translate(kernel), grid, parameters, memory, shared, counters=counters)


def compute(instruction: str, *operands: np.ndarray, result=F32) -> np.ndarray:
    """The instruction on each element [n]; in its text %x, %y and %z are the operands, %d is the result."""
    n = -(-len(operands[0]) // 32) * 32
    arrays, body = [np.resize(x, n) for x in operands] + [np.zeros(n, result)], ""
    for i, (name, x) in enumerate(zip([*"xyz"[: len(operands)], "d"], arrays)):
        letter, bits = KINDS[x.itemsize]
        register = f"%{letter}{20 + i}"
        instruction = instruction.replace(f"%{name}", register)
        body += f"mul.wide.u32 %rd{20 + i}, %r0, {x.itemsize}; add.s64 %rd{30 + i}, %rd{i}, %rd{20 + i};"
        body += f"ld.global.b{bits} {register}, [%rd{30 + i}];" if name != "d" else ""
    execute(f"{body} {instruction} st.global.b{bits} [%rd{30 + i}], {register};", arrays, threads=n)
    return arrays[-1][: len(operands[0])]


def same(got: np.ndarray, want: np.ndarray) -> bool:
    """Bitwise, with any NaN for a NaN."""
    nan = np.isnan(got) & np.isnan(want) if got.dtype.kind == "f" else False
    return bool(((got.view(f"u{got.itemsize}") == want.view(f"u{got.itemsize}")) | nan).all())


def larger(a, b) -> np.ndarray:
    """Of a NaN and a number the number; +0 is more than -0."""
    pairs = [[v for v in pair if v == v] for pair in zip(a, b)]
    return np.array([max(p, key=lambda v: (v, np.copysign(1, v)), default=np.nan) for p in pairs], F32)


def exact(x) -> Fraction:
    return Fraction(float(x))


def flush(x):
    return np.where(abs(x) < F32(1.1754944e-38), np.copysign(F32(0), x), x)


def power(x):
    return np.exp2(x.astype(np.float64)).astype(F32)


FLOATS = {
    "add.rn.f32 %d, %x, %y": np.add, "sub.f32 %d, %x, %y": np.subtract,
    "mul.f32 %d, %x, %y": np.multiply, "div.rn.f32 %d, %x, %y": np.divide, "max.f32 %d, %x, %y": larger,
    "min.f32 %d, %x, %y": lambda a, b: -larger(-a, -b),
    "neg.f32 %d, %x": lambda a, _: -a, "abs.f32 %d, %x": lambda a, _: abs(a),
    "max.NaN.f32 %d, %x, %y": lambda a, b: np.where(NAN, F32(np.nan), larger(a, b)),
    "add.ftz.f32 %d, %x, %y": lambda a, b: flush(flush(a) + flush(b)),
    "ex2.approx.f32 %d, %x": lambda a, _: power(a), "ex2.approx.ftz.f32 %d, %x": lambda a, _: flush(power(flush(a))),
    "sqrt.approx.ftz.f32 %d, %x": lambda a, _: np.sqrt(flush(a)),
    "cvt.rmi.ftz.f32.f32 %d, %x": lambda a, _: np.floor(flush(a)),
}  # fmt: skip
RELATIONS = {  # of two floats
    "lt": LEFT < RIGHT, "ge": LEFT >= RIGHT, "eq": LEFT == RIGHT, "ne": (LEFT != RIGHT) & ~NAN, "neu": LEFT != RIGHT,
    "gtu": (LEFT > RIGHT) | NAN, "nan": NAN, "num": ~NAN,
}  # fmt: skip


@pytest.mark.parametrize("instruction", FLOATS)
def test_floats(instruction):
    with np.errstate(all="ignore"):
        want = FLOATS[instruction](LEFT, RIGHT).astype(F32)
    assert same(compute(f"{instruction};", *[LEFT, RIGHT][: 1 + ("%y" in instruction)]), want)


@pytest.mark.parametrize("relation", RELATIONS)
def test_comparisons(relation):
    text = f"setp.{relation}.f32 %p1, %x, %y; selp.b32 %d, 1, 0, %p1;"
    assert same(compute(text, LEFT, RIGHT, result=U32), RELATIONS[relation].astype(U32))


def test_min_and_max_of_two_nan_is_the_canonical_nan():
    nan, one = U32([0xFFC00001]), F32([1]).view(U32)
    assert compute("max.f32 %d, %x, %x;", nan, result=U32)[0] == 0x7FFFFFFF
    assert compute("min.NaN.f32 %d, %x, %y;", nan, one, result=U32)[0] == 0x7FFFFFFF


def test_fma_rounds_once():
    """Against fractions, with sums next to the middle between two float32, where rounding twice is wrong."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(2000).astype(F32) for _ in range(3))
    a[:2], b[:2], c[:2] = 1 + 2.0**-12, 1 + 2.0**-12, [2.0**-60, -(2.0**-60)]  # the product is such a middle
    a[2:4], b[2:4], c[2:4] = 2.0**-75, [2.0**-75, 3 * 2.0**-75], [2.0**-149, 2.0**-149]  # subnormal
    found = compute("fma.rn.f32 %d, %x, %y, %z;", a, b, c)
    for x, y, z, got in zip(a, b, c, found):
        truth = exact(x) * exact(y) + exact(z)
        below, here, above = (
            abs(exact(v) - truth) for v in (np.nextafter(got, F32(-1e9)), got, np.nextafter(got, F32(1e9)))
        )
        assert here <= min(below, above)
        assert here not in (below, above) or int(got.view(U32)) % 2 == 0
    assert (found != (a.astype(np.float64) * b + c).astype(F32)).any()  # else the test would prove nothing


def signed(x):
    return x.view(S32).astype(np.int64)


INTEGERS = {  # results of any size, of which 32 bits count
    "add.s32 %d, %x, %y": lambda a, b: a + b, "mul.lo.s32 %d, %x, %y": lambda a, b: a * b,
    "shl.b32 %d, %x, %y": lambda a, b: [int(x) << int(min(y, 99)) for x, y in zip(a, b)],
    "shr.u32 %d, %x, %y": lambda a, b: [int(x) >> int(y) for x, y in zip(a, b)],
    "shr.s32 %d, %x, %y": lambda a, b: [int(x) >> int(y) for x, y in zip(signed(a), b)],
    "min.s32 %d, %x, %y": lambda a, b: np.minimum(signed(a), signed(b)), "and.b32 %d, %x, %y": lambda a, b: a & b,
    "bfe.u32 %d, %x, 4, 9": lambda a, _: a >> U32(4) & U32(0x1FF),
    "popc.b32 %d, %x": lambda a, _: [int(x).bit_count() for x in a],
    "bfe.s32 %d, %x, 31, 1": lambda a, _: -(a >> U32(31)).astype(np.int64),
    "div.s32 %d, %x, %y": lambda a, b: [int(Fraction(int(x), int(y))) for x, y in zip(signed(a), signed(b))],
}  # fmt: skip


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    defined = B != 0 if instruction.startswith("div") else B >= 0
    a, b = A[defined], B[defined]
    with np.errstate(all="ignore"):
        want = U32([int(x) & 0xFFFFFFFF for x in INTEGERS[instruction](a, b)])
    assert same(compute(f"{instruction};", *[a, b][: 1 + ("%y" in instruction)], result=U32), want)


def test_wide_product():
    assert same(compute("mul.wide.u32 %d, %x, %y;", A, B, result=np.uint64), A.astype(np.uint64) * B)


def test_conversions():
    """bfloat16 as PyTorch rounds it, float16 as numpy does; two at once, the first in the upper half."""
    x = np.concatenate(
        [F32(SPECIAL), np.random.default_rng(0).standard_normal(500).astype(F32), F32([1.00390625, 1.01171875])]
    )
    number, brain = ~np.isnan(x), torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(U16)
    found = compute("cvt.rn.bf16.f32 %d, %x;", x, result=U16)
    assert (found == np.where(number, brain, 0x7FFF)).all()
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).view(U16)
    assert (compute("cvt.rn.f16.f32 %d, %x;", x, result=U16) == half)[number].all()
    pair = compute("cvt.rn.bf16x2.f32 %d, %x, %y;", x, x[::-1].copy(), result=U32)
    assert (pair == (found.astype(U32) << U32(16) | found[::-1])).all()
    assert same(compute("cvt.f32.bf16 %d, %x;", brain), (brain.astype(U32) << U32(16)).view(F32))


def test_lanes_of_a_warp():
    x = np.arange(32, dtype=U32)
    run = lambda text: compute(text, x, result=U32)  # noqa: E731
    assert (run("shfl.sync.bfly.b32 %d, %x, 5, 31, -1;") == x ^ U32(5)).all()
    assert (run("shfl.sync.idx.b32 %d, %x, 7, 31, -1;") == 7).all()
    assert (run("shfl.sync.up.b32 %d, %x, 3, 0, -1;") == np.where(x >= 3, x - U32(3), x)).all()
    assert (run("shfl.sync.down.b32 %d, %x, 3, 31, -1;") == np.where(x < 29, x + U32(3), x)).all()
    assert (run("redux.sync.add.s32 %d, %x, -1;") == 496).all()


def fragment(x: np.ndarray) -> np.ndarray:
    """float16 [rows, columns] as registers [R, 32], by the PTX manual: groups of 8 rows, then of 8 columns."""
    lane = np.arange(32)
    two = lambda r, c, k: x[8 * r + lane // 4, 8 * c + 2 * (lane % 4) + k].view(U16).astype(U32)  # noqa: E731
    places = [(r, c) for c in range(x.shape[1] // 8) for r in range(x.shape[0] // 8)]
    return np.stack([two(*place, 0) | two(*place, 1) << U32(16) for place in places])


def test_mma():
    """Of integers, so that every order of the sum gives the same."""
    a, b = np.random.default_rng(0).integers(-9, 9, (2, 16, 16)).astype(np.float16)
    out, lane, b = np.zeros((4, 32), F32), np.arange(32), b[:, :8]
    loads = "".join(f"ld.global.b32 %r{i + 1}, [%rd3+{128 * i}];" for i in range(6))
    stores = "".join(f"st.global.b32 [%rd4+{128 * i}], %f{i};" for i in range(4))
    twos = "".join(f"mov.b32 %f{i}, 0f40000000;" for i in range(4))
    execute(
        f"""add.s64 %rd3, %rd0, %rd10; add.s64 %rd4, %rd1, %rd10; {loads} {twos}
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f0, %f1, %f2, %f3}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}},
        {{%f0, %f1, %f2, %f3}}; {stores}""",
        [np.concatenate([fragment(a), fragment(b.T.copy())]), out],
    )
    want = a.astype(F32) @ b.astype(F32) + 2  # [16, 8]
    for j in range(4):
        assert (out[j] == want[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    x, out, lane = np.arange(64, dtype=U16).reshape(8, 8), np.zeros(32, U32), np.arange(32)
    execute(
        f"""add.s64 %rd3, %rd0, %rd10; ld.global.b32 %r1, [%rd3]; mov.b32 %r3, global_smem; shl.b32 %r4, %r0, 2;
        add.s32 %r5, %r3, %r4; st.shared.b32 [%r5], %r1; bar.sync 0; and.b32 %r6, %r0, 7; shl.b32 %r6, %r6, 4;
        add.s32 %r7, %r3, %r6; ldmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 {{%r8}}, [%r7];
        add.s64 %rd4, %rd1, %rd10; st.global.b32 [%rd4], %r8;""",
        [x, out],
        shared=128,
    )
    two = [(x.T if transposed else x)[lane // 4, 2 * (lane % 4) + k].astype(U32) for k in (0, 1)]
    assert (out == two[0] | two[1] << U32(16)).all()


def test_bulk_copy():
    """A box over two edges of a tensor, which gives zeros there; a 32-byte swizzle swaps the halves of rows 4 to 7."""
    tensor, out = np.arange(1, 121, dtype=U16).reshape(5, 24), np.zeros((8, 16), U16)
    view = TensorMap(tensor.ctypes.data, (5, 24), 24, 2, (8, 16), 1)
    execute(
        f"""{OWN} {LEADER} mov.b32 %r8, 16; mov.b32 %r9, 1; add.s32 %r10, %r3, 256;
        @%p1 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;
        @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd2, {{%r8, %r9}}],
        [%r10];
        mbarrier.wait.parity.shared.b64 [%r10], 0; add.s64 %rd3, %rd1, %rd10;
        ld.shared.b32 %r11, [%r5]; st.global.b32 [%rd3], %r11;
        ld.shared.b32 %r12, [%r5+128]; st.global.b32 [%rd3+128], %r12;""",
        [tensor, out, view],
        shared=264,
    )
    want = np.zeros((8, 16), U16)
    want[:4, :8] = tensor[1:, 16:]
    want[4:] = np.roll(want[4:], 8, 1)
    assert (out == want).all()


def test_bulk_store():
    """A box over two edges of a tensor, which takes what is inside; the halves of rows 4 to 7 are swapped in memory."""
    source, tensor = np.arange(1, 129, dtype=U16).reshape(8, 16), np.zeros((5, 24), U16)
    view = TensorMap(tensor.ctypes.data, (5, 24), 24, 2, (8, 16), 1)
    code = f"""{OWN} {LEADER} mov.b32 %r8, 16; mov.b32 %r9, -3; add.s64 %rd3, %rd1, %rd10;
        ld.global.b32 %r11, [%rd3]; st.shared.b32 [%r5], %r11; ld.global.b32 %r12, [%rd3+128];
        st.shared.b32 [%r5+128], %r12; fence.proxy.async.shared::cta; bar.sync 0;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r8, %r9}}], [%r3];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; bar.sync 0; st.shared.b32 [%r5], %r11;"""
    execute(code, [tensor, source, view], shared=256)
    assert (tensor[:, 16:] == np.concatenate([source[3:4, :8], source[4:, 8:]])).all() and not tensor[:, :16].any()
    end = code[code.index("cp.async.bulk.wait_group") :]
    for lost, found in (
        ("fence.proxy.async.shared::cta;", "a bulk copy reads what was written without a fence"),
        (end.split(" bar")[0], "writes shared memory that a bulk copy reads"),
        (end, "ends while a bulk copy reads"),
    ):
        with pytest.raises(Fault, match=found):
            execute(code.replace(lost, ""), [tensor, source, view], shared=256)


@pytest.mark.parametrize(("mode", "layout"), [(3, 1), (2, 2), (1, 3)])
def test_matrix_descriptors(mode, layout):
    """The manual's swizzles of 128, 64 and 32 bytes: which 16 bytes of a row of the atom hold which columns."""
    span = 16 << mode
    stride = 8 * span  # from 8 rows to the next
    descriptor = np.array([layout << 62 | (stride >> 4) << 32 | 4096 >> 4], np.uint64).view(np.int64)
    found = descriptor_bytes(descriptor, 16, 0)[0]  # [rows, 16]
    for row, column in ((0, 0), (1, 0), (3, 9), (5, 8), (7, 15), (12, 3)):
        piece = column // 8 ^ row * span // 128 % (1 << mode)
        assert found[row, column] == 4096 + row * span + 16 * piece + column % 8 * 2


def test_threads_that_diverge_meet_again():
    out = np.zeros(32, U32)
    execute(
        """setp.lt.u32 %p1, %r0, 10; mov.b32 %r2, 7; @%p1 bra $LESS; add.s32 %r2, %r2, 100; bra $MEET;
        $LESS: setp.lt.u32 %p2, %r0, 5; @%p2 bra $MEET; add.s32 %r2, %r2, 1;
        $MEET: bar.sync 0; add.s64 %rd3, %rd0, %rd10; st.global.b32 [%rd3], %r2;""",
        [out],
    )
    assert out.tolist() == [7] * 5 + [8] * 5 + [107] * 22


def test_a_half_that_nothing_was_written_to_is_poison():
    """Whoever takes the other half alone does not see it."""
    out = np.zeros((2, 32), U32)
    join = "mov.b16 %h1, 5; mov.b32 %r2, {%h1, %h2}; mov.b32 {%h3, _}, %r2; cvt.u32.u16 %r3, %h3;"
    execute(join + "add.s64 %rd3, %rd0, %rd10; st.global.b32 [%rd3], %r3; st.global.b32 [%rd3+128], %r2;", [out])
    assert (out[0] == 5).all() and (out[1] == 0xFFFF0005).all()


def test_two_scopes_may_declare_the_same_register():
    out = np.zeros(32, U32)
    execute(
        """{ .reg .b32 one; mov.b32 one, 1; } { .reg .b32 one, two; mov.b32 one, 3; mov.b32 two, 4;
        add.s32 %r2, one, two; } add.s64 %rd3, %rd0, %rd10; st.global.b32 [%rd3], %r2;""",
        [out],
    )
    assert (out == 7).all()


# %r3: where shared memory begins, %r5: the thread's place in it
OWN = "mov.b32 %r3, global_smem; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4;"
SHARED = f"{OWN} xor.b32 %r6, %r4, 128; add.s32 %r7, %r3, %r6;"  # %r7: that of a thread of the other warp
COPY = "add.s64 %rd3, %rd0, %rd10; cp.async.ca.shared.global [%r5], [%rd3], 4; cp.async.commit_group;"
FIRST = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;"  # %p1: the first program
LEADER = "setp.eq.u32 %p1, %r0, 0;"  # %p1: one thread of a program
FAULTS = {
    "before anything is written": "add.s32 %r1, %r2, %r2;",
    "out of bounds": "add.s64 %rd3, %rd0, %rd10; ld.global.b32 %r1, [%rd3+132];",
    "not a multiple of 8": "add.s64 %rd3, %rd0, %rd10; ld.global.b64 %rd4, [%rd3];",
    "never written": f"{SHARED} ld.shared.b32 %r1, [%r5];",
    "of 256 bytes of shared memory": f"{SHARED} st.shared.b32 [%r5+256], %r4;",
    "wrote since the last barrier": f"{SHARED} st.shared.b32 [%r5], %r4; ld.shared.b32 %r1, [%r7];",
    "read since the last barrier": f"{SHARED} st.shared.b32 [%r5], %r4; bar.sync 0; ld.shared.b32 %r1, [%r7];"
    " st.shared.b32 [%r5], %r1;",
    "before its copy was awaited": f"{SHARED} {COPY} bar.sync 0; ld.shared.b32 %r1, [%r5];",
    "a copy is under way": f"{SHARED} {COPY} st.shared.b32 [%r5], %r4;",
    "not all 64 threads": "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;",
    "not all 32 threads": "setp.lt.u32 %p1, %r0, 9; @%p1 shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1;",
    "store different values": f"{FIRST} @%p1 st.global.b32 [%rd1], %r0;",
    "reads what program": "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3;"
    " st.global.b32 [%rd4], %r1; ld.global.b32 %r2, [%rd1];",
    "overwrites what program": "st.global.b32 [%rd1], 5;",
    "an atomic wrote": "red.global.add.f32 [%rd1], 0f3F800000; ld.global.b32 %r2, [%rd1];",
    "without a barrier, what another warp": f"{FIRST} xor.b32 %r4, %r0, 32; mul.wide.u32 %rd5, %r4, 4;"
    " add.s64 %rd3, %rd1, %rd10; @%p1 st.global.b32 [%rd3], %r0; add.s64 %rd6, %rd1, %rd5;"
    " @%p1 ld.global.b32 %r2, [%rd6];",
    "was not initialised": f"{OWN} {LEADER} @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 8;",
    "more arrivals": f"{OWN} {LEADER} @%p1 mbarrier.init.shared.b64 [%r3], 0;"
    " @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 0;",
    "forever": f"{OWN} {LEADER} @%p1 mbarrier.init.shared.b64 [%r3], 1; mbarrier.wait.parity.shared.b64 [%r3], 0;",
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults(what):
    """Two programs of two warps; the arrays have an element a thread."""
    with pytest.raises(Fault, match=what):
        execute(FAULTS[what], [np.zeros(64, U32), np.zeros(64, U32)], threads=64, shared=256, grid=(2, 1, 1))


def test_what_is_right_is_no_fault():
    """The same accesses with what the faults lack."""
    out = np.zeros(64, U32)
    execute(
        f"""{SHARED} {COPY} cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r1, [%r7]; bar.sync 0;
        st.shared.b32 [%r5], %r1; add.s64 %rd4, %rd1, %rd10; st.global.b32 [%rd4], %r1;""",
        [np.arange(64, dtype=U32), out],
        threads=64,
        shared=256,
    )
    assert (out == np.arange(64) ^ 32).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rp.f32 %f1, %f1, %f1;", "vote.sync.any.pred %p1, %p2, -1;", "ld.volatile.global.b32 %r1, [%rd0];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0}, {%r1}, {%r5}, {%f0};", "mov.u32 %r1, %clock;",
        "atom.global.add.u32 %r1, [%rd0], 1;", "bar.sync 1, 64;", "cvt.rz.f32.f64 %f1, %rd1;",
        "shfl.sync.bfly.b32 %r1|%p1, %r0, 5, 31, -1;", "setp.lt.u32 %p1|%p2, %r0, 5;", "add.f16x2 %r1, %r1, %r1;",
        "cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1, %r1}], [%r2];",
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_refused(instruction):
    with pytest.raises(NotImplementedError, match="PTX"):
        execute(instruction, [np.zeros(64, U32)])


def test_counters():
    """A warp's coalesced load asks for 4 sectors, one every 32 bytes for 32; 32 words in a bank take 32 passes."""
    counters, memory = Counters(), np.zeros(264, U32)
    aligned = memory[-(memory.ctypes.data % 32) // 4 % 8 :][:256]  # to a sector
    execute(
        """add.s64 %rd3, %rd0, %rd10; ld.global.b32 %r1, [%rd3]; mul.wide.u32 %rd4, %r0, 32; add.s64 %rd5, %rd0, %rd4;
        st.global.b32 [%rd5], %r0; mov.b32 %r3, global_smem; shl.b32 %r4, %r0, 7; add.s32 %r5, %r3, %r4;
        st.shared.b32 [%r5], %r0; bar.sync 0;""",
        [aligned],
        shared=4096,
        counters=counters,
    )
    assert (counters.sectors, counters.sectors_needed) == ({"load": 4, "store": 32}, {"load": 4, "store": 4})
    assert (counters.passes, counters.passes_needed, counters.barriers) == ({"store": 32}, {"store": 1}, 1)
    assert (counters.instructions["global"], counters.instructions["shared"]) == (2, 1)
