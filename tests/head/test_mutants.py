"""Planted bugs, to show that the tests can fail: each edits one line of real source and must be caught."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import test_memory
import test_paths
import test_route_kernels
import test_routed_kernels
import torch

from lad_kernels import checks, linear_logprobs, reference
from lad_kernels.head import head, memory, pytorch
from lad_kernels.head.kernels import dense, forward
from lad_kernels.head.kernels.routed import runs, work
from lad_kernels.testing import check_head, make_inputs

PACKAGE = Path(pytorch.__file__).parent.parent
_serial = itertools.count()


def mutate(source_file: str, old: str, new: str, tmp_path: Path):
    """Import `source_file` of the package with one occurrence of `old` replaced; the line must exist exactly once."""
    source = (PACKAGE / source_file).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {source_file}"
    path = tmp_path / f"mutant_{next(_serial)}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(impl: str, dtype: torch.dtype, device: str, softcap: float | None = 30.0) -> None:
    """One input on which every head mutant shows: tiles crossed, bias, transforms, masked rows, entropy gradient."""
    transform = dict(logit_scale=0.8, softcap=softcap, temperature=0.7)
    inputs = make_inputs(90, 80, 2 * 256 + 40, dtype=dtype, device=device, bias=True, **transform)
    upstream = torch.randn(90, generator=torch.Generator().manual_seed(1)).to(device)
    head = lambda *a, **k: linear_logprobs(*a, **k, impl=impl)  # noqa: E731
    check_head(head, inputs, entropy_upstream=upstream)
    if impl == "torch":  # one token's logits overflow what exponentials are relative to; its neighbours' rise a little
        steep = make_inputs(30, 16, 3 * 128, dtype=dtype, device=device, masked=0.0)
        steep.weight[:, 0] = torch.arange(3, device=device).repeat_interleave(128)
        steep.hidden[:, 0] = torch.where(torch.arange(30, device=device) == 0, 95.0, 1.5)
        check_log_probs(steep)


def check_log_probs(inputs) -> None:
    """Log-probs and entropy alone, where gradients off the last slab are too small to compare."""
    torch_head = functools.partial(linear_logprobs, impl="torch")
    found, truth = (
        head(x.hidden, x.weight, x.targets, bias=x.bias, loss_mask=x.loss_mask, return_entropy=True)
        for head, x in ((torch_head, inputs), (reference.linear_logprobs, inputs.cast(torch.float64)))
    )
    torch.testing.assert_close(found.logprobs.double(), truth.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=0, atol=1e-4)


TORCH_HEAD = {
    "bias forgotten": ("self.bias[columns].to(self.dtype)", "torch.zeros_like(self.bias[columns].to(self.dtype))"),
    "scale forgotten": ("z.mul_(self.transform.scale)", "z"),
    "softcap slope forgotten": ("dz.mul_(1 - tanh.square())", "dz"),
    "temperature in the wrong direction": ("z.mul_(inverse)", "z.div_(inverse)"),
    "temperature missing in backward": ("dz.mul_(inverse * self.transform.scale)", "dz.mul_(self.transform.scale)"),
    "first slab only": ("for columns in self.slabs:", "for columns in self.slabs[:1]:"),
    "lse not rescaled": ("mass[few] * decay + sums.sum(1)", "mass[few] + sums.sum(1)"),
    "entropy moment not rescaled": ("decay * (moment[few] + shift * mass[few])", "decay * moment[few]"),
    "one-hot off by one": ("torch.where(inside, column, 0)", "torch.where(inside, column - 1, 0).clamp(min=0)"),
    "one-hot missing": ("torch.where(inside, gradient.onehot, 0.0)", "torch.zeros_like(gradient.onehot)"),
    "softmax term missing": (
        "log_p.mul_(-gradient.entropy[few, None]).add_(gradient.prob[few, None]).mul_(p)",
        "log_p.mul_(-gradient.entropy[few, None]).mul_(p)",
    ),
    "dW of the last chunk only": ("beta=int(written)", "beta=0"),
    "dH of the last slab only": ("dh[rows].addmm_(dz,", "dh[rows].zero_().addmm_(dz,"),
    "dbias not written": ("db[columns] = db_slab", "pass"),
    "sums of a chunk's first rows": ("rows.start + i.start, rows.start + i.stop", "i.start, i.stop"),
}


@pytest.mark.parametrize("bug", TORCH_HEAD)
def test_bug_in_the_chunked_head_is_caught(bug, monkeypatch, tmp_path, device):
    mutant = mutate("head/pytorch.py", *TORCH_HEAD[bug], tmp_path)
    mutant.TILE_BYTES, mutant.MAX_CHUNK, mutant.CACHE_BYTES = 4 * 40 * 100, 40, 4 * 128 * 7
    monkeypatch.setattr(head, "pytorch", mutant)
    monkeypatch.setattr(checks, "use_triton", lambda impl, *_: impl != "torch")  # "auto" is Triton, as on a GPU
    with pytest.raises((AssertionError, RuntimeError)):
        check("torch", torch.float32, device)


def test_the_chunked_head_without_a_bug_passes(monkeypatch, tmp_path, device):
    mutant = mutate("head/pytorch.py", "TILE_BYTES = 16 << 20", "TILE_BYTES = 16000", tmp_path)
    mutant.MAX_CHUNK, mutant.CACHE_BYTES = 40, 4 * 128 * 7
    monkeypatch.setattr(head, "pytorch", mutant)
    check("torch", torch.float32, device)


TRITON_HEAD = {
    "forward: bias forgotten": ("forward.py", "h, w, bias, inv_temperature, row,",
                                "h, w, None, inv_temperature, row,"),
    "forward: columns beyond V counted": ("forward.py", "tl.where(below(V - column,",
                                          "tl.where(below(V,"),
    "forward: block maximum forgotten": ("forward.py", "LN_2, top * factor)", "LN_2, 0.0 * top)"),
    "forward: another target's product": ("forward.py", "own = tl.arange(0, TOKENS)[:, None] ==",
                                          "own = (tl.arange(0, TOKENS) ^ 1)[:, None] =="),
    "forward: natural and binary logarithms mixed": ("forward.py", "tl.fma(log_total - r, LN_2,",
                                                     "tl.fma(log_total - r, 1.0,"),
    "forward: last blocks skipped": ("forward.py", "mass += e\n", "mass += e * (at[:, None] < blocks - 1)\n"),
    "forward: no entropy inside blocks": ("forward.py", "tl.load(block_entropy + offsets, mask, other=0.0) - below",
                                          "0.0 - below"),
    "forward: target of the wrong row": ("forward.py", "y = tl.where(known, y, 0)", "y = tl.where(known, y - 1, 0)"),
    "dense: one-hot missing": ("dense.py", "y[:, None], at_target,", "y[:, None], 0.0 * at_target,"),
    "dense: one-hot off by one": ("dense.py", "y[:, None], at_target,", "y[:, None] + 1, at_target,"),
    "dense: one-hot of the slab's first tile": ("dense.py", ".to(tl.int32) - column", ".to(tl.int32)"),
    "dense: slab offset forgotten": ("dense.py", "other=-1) - column0)", "other=-1) - 0)"),
    "dense: a row's slope forgotten": ("dense.py", "slope if softcap is None else tl.full(", "tl.full("),
    "dense: a softcap's slope forgotten": ("dense.py", "g *= slope", "g *= 1.0"),
    "dense: the target without the row's slope": (
        "dense.py", "tl.load(onehot + rows, mask=in_n, other=0.0)[:, None] * by_row",
        "tl.load(onehot + rows, mask=in_n, other=0.0)[:, None]"),
    "dense: entropy term missing": ("dense.py", "tl.fma(r - d, g_entropy,", "tl.fma(r - d, 0.0 * g_entropy,"),
    "dense: rows' own scaling forgotten": ("dense.py", "by_row * tl.exp2(-r)", "by_row * tl.exp2(-r - 1)"),
    "dense: dH of the last slab": ("dense.py", "accumulate(dh[run], tile, part.weight, first=v0 == 0)",
                                   "accumulate(dh[run], tile, part.weight, first=True)"),
    "dense: bias of the wrong slab": ("dense.py", "None if self.bias is None else self.bias[columns]",
                                      "None if self.bias is None else self.bias[: columns.stop - columns.start]"),
}  # fmt: skip


def check_triton(device: str) -> None:
    for softcap in (30.0, None):  # the slope of an element, and of a row
        check("triton", torch.float32, device, softcap)


def plant_in_triton(monkeypatch, mutant) -> None:
    if hasattr(mutant, "forward"):
        monkeypatch.setattr(forward, "forward", mutant.forward)
    else:  # three slabs of 256 columns
        monkeypatch.setattr(memory.Work, "token_chunk", lambda _, tokens, **listed: (tokens, 256 * (90 * 4 + 4 * 80)))
        monkeypatch.setattr(mutant, "_MIN_COLUMNS", 128)
        monkeypatch.setattr(dense, "backward", mutant.backward)


@pytest.mark.parametrize("bug", TRITON_HEAD)
def test_bug_in_the_triton_head_is_caught(bug, monkeypatch, tmp_path, device):
    name, old, new = TRITON_HEAD[bug]
    plant_in_triton(monkeypatch, mutate(f"head/kernels/{name}", old, new, tmp_path))
    with pytest.raises(AssertionError):
        check_triton(device)


@pytest.mark.parametrize("name", ("forward.py", "dense.py"))
def test_the_triton_head_without_a_bug_passes(name, monkeypatch, tmp_path, device):
    plant_in_triton(
        monkeypatch, mutate(f"head/kernels/{name}", "import annotations", "import annotations  #", tmp_path)
    )
    check_triton(device)


ROUTING = {
    "pairs of the wrong block": ("blocks, rows = (x.contiguous() for x in keep.nonzero().unbind(1))",
                                 "rows, blocks = (x.contiguous() for x in keep.T.nonzero().unbind(1))"),
    "target's piece judged by its mass": ("_norm(others, prob, entropy) + own",
                                          "_norm(others, prob, entropy)"),
    "confidence forgotten": ("- onehot * torch.expm1(logprobs)", "- onehot * 0"),
    "entropy's piece forgotten": ("norm = norm + entropy.abs() * mass * spread", "norm = norm * 1.0"),
    "rows of W taken as short": ("torch.mv(norm.T, longest[part])", "norm.sum(0) * longest.min() * 0.1"),
    "bound on dW of the last blocks": ("by_block[part] = torch.mv(norm, reach)",
                                       "by_block[:] = torch.mv(norm, reach).mean() * 0.01"),
    "random pairs not bounded": ("(threshold - norm).clamp_(min=0.0)", "0.0 * norm"),
}  # fmt: skip


def certify_all(route) -> None:
    """The error bound on every adversary, exact and dropping."""
    for name, theta, unbiased, entropy in itertools.product(
        test_paths.ADVERSARIES, (0.0, 3e-3, 0.2), (False, True), (False, True)
    ):
        test_paths.certify(name, theta, unbiased=unbiased, entropy_gradient=entropy, route=route)


@pytest.mark.parametrize("bug", ROUTING)
def test_bug_in_the_routing_is_caught(bug, tmp_path):
    mutant = mutate("head/routing.py", *ROUTING[bug], tmp_path)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        certify_all(mutant.route)


def test_a_forgotten_scale_is_caught(monkeypatch, tmp_path):
    mutant = mutate("head/pytorch.py", "dz.mul_(run.scale[:, None])", "dz", tmp_path)
    monkeypatch.setattr(head, "pytorch", mutant)
    with pytest.raises(AssertionError):
        test_paths.test_unbiased_tail_has_the_exact_mean()


PIECES = {
    "dW of the last piece": ("kernels/dense.py", "first=n0 == 0 and (staged or not add)", "first=n0 == 0"),
    "float16 pieces scaled twice": ("kernels/dense.py", "(add and down is not None)", "False"),
    "routing not renumbered": ("records.py", "self.rows[inside] - tokens.start", "self.rows[inside]"),
    "dense tokens of every piece": ("records.py", "(self.dense < tokens.stop)", "(self.dense < tokens.stop + 3)"),
    "dH to the first rows": ("head.py", "self.tokens[chunk]] = grad", "slice(0, chunk.stop - chunk.start)] = grad"),
}


@pytest.mark.parametrize("bug", [None, *PIECES])
def test_bug_in_the_pieces_is_caught(bug, monkeypatch, tmp_path, device):
    name, old, new = PIECES[bug or "dH to the first rows"]
    mutant = mutate(f"head/{name}", old, new if bug else old, tmp_path)
    if name == "records.py":
        monkeypatch.setattr(head.Routing, "part", mutant.Routing.part)
    elif name == "head.py":
        monkeypatch.setattr(head.Head, "backward", mutant.Head.backward)
    else:
        monkeypatch.setattr(dense, "backward", mutant.backward)

    def check_all() -> None:
        for path, dtype in itertools.product(test_memory.PIECED, ("float32", "float16")):
            test_memory.check_pieces(path, dtype, device, monkeypatch)

    if bug is None:
        check_all()
        return
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_all()


ROUTED_KERNELS = {
    "a lost pair": ("kernels.py", "in_n, entries = places < count, ", "in_n, entries = places < count - 1, "),
    "the wrong tokens": ("kernels.py", "rows = tl.load(tokens + pairs)  # [BLOCK_N]\n\n    w +=",
                         "rows = tl.load(tokens + first + 0 * pairs)\n\n    w +="),
    "pair scale forgotten": ("kernels.py", "by_row *= tl.load(pair_scale + pairs)[:, None]", "by_row *= 1.0"),
    "a row's slope forgotten": ("kernels.py", "slope if softcap is None else tl.full(", "tl.full("),
    "a softcap's slope forgotten": ("kernels.py", "g *= slope", "g *= 1.0"),
    "rows' own scaling forgotten": ("kernels.py", "by_row *= tl.exp2(-r)", "by_row *= tl.exp2(-r - 1)"),
    "the target without scale and slope": ("kernels.py", "other=0.0)[:, None] * by_row", "other=0.0)[:, None]"),
    "places beyond an item in db": ("kernels.py", "-tl.where(in_n[:, None], level, 1e30)", "-level"),
    "a target beyond an item in db": ("kernels.py", "onehot + rows, mask=in_n, other=0.0)", "onehot + rows)"),
    "the bias of another word": ("kernels.py", "biases(bias + column, entries,", "biases(bias + column, entries ^ 1,"),
    "dW of the wrong tokens": ("kernels.py", "start = tl.maximum(tl.load(offsets + block).to(tl.int32), pair0)",
                               "start = tl.maximum(tl.load(offsets + block).to(tl.int32), pair0) + 1"),
    "db of another block's items": ("kernels.py", "first = block0 + block + pair // BLOCK_N", "first = block0 + block"),
    "an item left out of db": ("kernels.py", "first + tl.cdiv(pairs, BLOCK_N)", "first + pairs // BLOCK_N"),
    "a token's first pair left out": ("kernels.py", "for position in range(start, stop, _READ):",
                                       "for position in range(start + 1, stop, _READ):"),
    "a token's last pair left out": ("kernels.py", "there = position + i < stop", "there = position + i < stop - 1"),
    "zeros left out": ("kernels.py", "if (start < stop) | ALONE:", "if start < stop:"),
    "a tile's power of two": ("kernels.py", "((exponent - 14) << 23)", "((exponent - 13) << 23)"),
    "one power of two a row": ("kernels.py", "* all_tiles + tiles,", "* all_tiles + 0 * tiles,"),
    "an item short": ("kernels.py", "tl.minimum(stop - pair, BLOCK_N)", "tl.minimum(stop - pair - 1, BLOCK_N)"),
    "a whole token left out of dW": ("kernels.py", "for row in range(0, wholes, BLOCK_N):",
                                     "for row in range(1, wholes, BLOCK_N):"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *ROUTED_KERNELS])
def test_bug_in_the_routed_kernels_is_caught(bug, monkeypatch, tmp_path, device):
    def check_all() -> None:
        for features in (("bias", "scale", "temperature"), ("bias", "softcap")):  # the slope of a row, of an element
            inputs = test_routed_kernels.inputs_of(device, features=features)
            routing = test_routed_kernels.route(inputs, keep=0.4, dense=0.2, scaled=True)
            test_routed_kernels.check(inputs, routing)
        packed = test_routed_kernels.inputs_of(device, "bfloat16", d=144)  # two tiles, of unlike sizes
        weight = packed.weight * torch.where(torch.arange(144, device=device) < 128, 64.0, 1.0).bfloat16()
        packed = dataclasses.replace(packed, weight=weight, hidden=packed.hidden / 64)
        test_routed_kernels.check(packed, test_routed_kernels.route(packed, keep=0.6))

    if bug is None:
        check_all()
        return
    source, old, new = ROUTED_KERNELS[bug]
    mutant = mutate(f"head/kernels/routed/{source}", old, new, tmp_path)
    for name in [n for n in vars(mutant) if n.endswith("_kernel")]:
        module = work if name == "items_kernel" else runs
        monkeypatch.setattr(module, name, getattr(mutant, name))
    with pytest.raises(AssertionError):
        check_all()


ROUTE_KERNELS = {
    "NaN dropped": ("keep = ((norm <= limit) == 0) & valid", "keep = (norm > limit) & valid"),
    "one draw for all blocks": ("(blocks.to(tl.uint32) * 0x27D4EB2F + 0x165667B1)", "(blocks.to(tl.uint32) * 0)"),
    "target's piece judged by its mass": ("(y >= 0), own, norm)", "(y >= 0), norm, norm)"),
    "entropy's piece forgotten": ("norm += tl.abs(tl.load(entropy", "norm += 0.0 * tl.abs(tl.load(entropy"),
    "pairs of dense tokens": ("(pair & (many == 0))", "pair"),
    "expected pairs of the last blocks": ("total += tl.load(expected", "total = tl.load(expected"),
    "lists in the wrong order": (
        "+ tl.cumsum(one, axis=1)",
        "+ tl.sum(one, axis=1)[:, None] + 1 - tl.cumsum(one, axis=1)",
    ),
    "scale forgotten": ("tl.div_rn(tl.load(threshold), norm)", "0.0 * norm"),
    "rows of W taken as short": ("tl.sum(e * w[:, None], axis=0)", "tl.sum(e, axis=0)"),
    "random pairs not bounded": (
        "tl.maximum(tl.load(threshold) - norm, 0.0, propagate_nan=_ALL), dropped)",
        "0.0, dropped)",
    ),
    "dense tokens in the bound": ("(active & (many == 0))[None, :]", "active[None, :]"),
    "pairs without a gradient": ("valid = there & active[None, :]", "valid = there"),
    "all tokens in the bound of too many pairs": ("dense.fill_(1)", "dense.fill_(0)"),
    "sums without a gradient": ("(active & (many == 0))[None, :]", "(inside & (many == 0))[None, :]"),
    "lengths without a gradient": (
        "tl.load(reach + tokens, active, other=0.0)",
        "tl.load(reach + tokens, inside, other=0.0)",
    ),
}


def check_choice(path, device: str) -> None:
    """Inputs on which every mutant shows."""
    x = test_route_kernels.case(70, 66, device, entropy=True)
    x.block_lse[5, 65] = torch.nan
    test_route_kernels.check(x, path, dense_share=0.12)
    test_route_kernels.check(x, path, dense_share=2.0, unbiased=False)
    test_route_kernels.check(test_route_kernels.case(3, 33 * 64 + 1, device), path, dense_share=0.005)
    test_route_kernels.check(x, path, dense_share=2.0, most_pairs=3)
    test_route_kernels.test_tokens_without_a_gradient_are_as_good_as_left_out(False, path, device)


@pytest.mark.parametrize("bug", [None, *ROUTE_KERNELS])
def test_bug_in_the_choice_of_pairs_is_caught(bug, tmp_path, device):
    if bug is None:
        check_choice(test_route_kernels.kernels, device)
        return
    mutant = mutate("head/kernels/routed/route.py", *ROUTE_KERNELS[bug], tmp_path)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_choice(mutant, device)
