"""Planted bugs of the one pass in Triton: each edits one line of real source and must be caught."""

from __future__ import annotations

import pytest
import test_one_pass_kernels as tests
from test_mutants import mutate
from test_one_pass_kernels import Tiles, check, make

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: NaN of a bug
CHUNKS = (slice(0, 16), slice(16, 21))


def check_features(device, dtype, features="all", **options) -> None:
    check(make(device, dtype, features, n=21), chunks=CHUNKS, **options)


def check_peaked(device, dtype) -> None:
    check(make(device, dtype, "bias", n=21, d=80, v=600, entropy=0.4), chunks=CHUNKS)


def check_whole_blocks(device) -> None:
    """Three blocks in tiles of two, so that the last block of the last tile lies beyond V."""
    check(make(device, "bfloat16", n=17, d=33, v=384), tiles=Tiles(16, 256, 32, 2, 4, 2), chunks=[slice(0, 17)])


CHECKS = {
    "float32": lambda device, _: check_features(device, "float32"),
    "bfloat16": lambda device, _: check_features(device, "bfloat16"),
    "no softcap": lambda device, _: check_features(device, "bfloat16", "scale"),
    "no prior": lambda device, _: check_features(device, "bfloat16", "plain", prior=None),
    "peaked": lambda device, _: check_peaked(device, "float32"),
    "whole blocks": lambda device, _: check_whole_blocks(device),
    "many tiles": tests.test_more_tiles_than_are_added_at_once,
    "some tokens": lambda device, _: tests.test_some_tokens_of_the_hidden_states(device),
    "common part": lambda device, _: tests.test_a_common_part_of_all_logits_cancels(device),
    "range": lambda device, _: tests.test_out_of_range(device, "bfloat16"),
    "absent target": lambda device, _: tests.test_absent_target(device, "softcap"),
    "NaN": lambda device, _: tests.test_a_nan_is_left_to_two_passes(device),
    "no part of p": lambda device, _: tests.test_a_gradient_whose_part_of_p_is_its_own(device, "float32"),
    "smoothed": lambda device, _: tests.test_a_gradient_whose_part_of_p_is_its_own(device, "bfloat16"),
    "accuracy": lambda device, _: [tests.test_the_likeliest_word(device, v) for v in (384, 65 * 128 + 9)],
    "chunks": lambda device, _: tests.test_a_token_does_not_depend_on_its_chunk(device, "bfloat16"),
}
KERNELS = {  # bug: check that shows it, source, mutant
    "bias forgotten": ("float32", "h, w, bias, inv_temperature, row,", "h, w, None, inv_temperature, row,"),
    "columns beyond V counted": ("no prior", "d = tl.where(below(V - column, BLOCK_V, THREAD), d, -1e30)", "d = d"),
    "blocks beyond V counted": ("whole blocks", "* _BLOCK < V  # [parts]", "* _BLOCK < 2 * V  # [parts]"),
    "rounding of the level forgotten": (
        "common part",
        "log_total = tl.log(total) - rounding",
        "log_total = tl.log(total)",
    ),
    "rounding of the level in the wrong logarithm": ("common part", "other=0.0) * LN_2  # [TOKENS]", "other=0.0)"),
    "rounding of the level in the entropy": ("common part", "/ total * LN_2 - rounding)", "/ total * LN_2)"),
    "slope of an element forgotten": ("float32", "e *= slope", "e *= 1.0"),
    "natural and binary logarithms mixed": ("float32", "/ total * LN_2 -", "/ total -"),
    "last tile left out": ("no prior", "(at[:, None] < tiles) & inside", "(at[:, None] < tiles - 1) & inside"),
    "sums of the last tiles alone": ("many tiles", "total += tl.load(sums", "total = tl.load(sums"),
    "entropy of the last tiles alone": ("many tiles", "moment += tl.load(moments", "moment = tl.load(moments"),
    "likeliest word beyond V": ("accuracy", "x, -1e30 if LARGEST else 0.0)", "x, 1e30 if LARGEST else 0.0)"),
    "likeliest word of the last tiles": ("accuracy", "top = tl.maximum(top, tl.load(tops", "top = (tl.load(tops"),
    "likeliest word without the shift": ("accuracy", "is_largest(z_y, s + (", "is_largest(z_y, ("),
    "entropy's sign": ("no prior", "spread = log_total - (", "spread = log_total + ("),
    "shift missing in lse": ("no prior", "tl.store(lse + rows, s + log_total", "tl.store(lse + rows, log_total"),
}
HOST = {
    "prior of the first chunk": ("range", "prior[rows].float()", "prior[: rows.stop - rows.start].float()"),
    "temperature of the first chunk": (
        "float32",
        "part.transform.select(rows)",
        "part.transform.select(slice(0, rows.stop - rows.start))",
    ),
    "targets of the first chunk": ("no prior", "weight, targets[rows], bias", "weight, targets[: len(states)], bias"),
    "coefficients one chunk late": (
        "no prior",
        "given = gradient(rows, outputs)",
        "given = gradient(slice(0, len(f)), outputs)",
    ),
    "coefficients from log-probs that move": (
        "chunks",
        "given = gradient(rows, outputs)",
        "given = gradient(rows, HeadForward(*(None if x is None else x[rows] for x in outputs)))",
    ),
    "sum of exponentials forgotten": (
        "no prior",
        "r = prob / sums if capped else prob / sums * slope",
        "r = prob * slope",
    ),
    "slope of a row forgotten": ("no softcap", "else prob / sums * slope", "else prob / sums"),
    "slope of a row twice at the target": ("no softcap", "sums * slope if capped else sums,", "sums * slope,"),
    "p without a part at the target": (
        "no part of p",
        "torch.where(given.prob == 0, given.onehot * 2.0**-24, given.prob)",
        "given.prob",
    ),
    "one part for all of p": (
        "no part of p",
        "ratio = torch.where(prob == 0, -1.0, onehot / prob)",
        "ratio = -1.0",
    ),
    "one part for all of p, 16 bits": (
        "smoothed",
        "LogitGradient(ratio, torch",
        "LogitGradient(-ratio.sign().abs(), torch",
    ),
    "dW of the last chunk": ("no prior", "scaled, first=rows.start == 0", "scaled, first=True"),
    "dbias of the last chunk": ("float32", "pair, first=False", "pair, first=True"),
    "dbias from coefficients of 8 bits": ("bfloat16", "(r - high).to(f.dtype)]", "0 * high]"),
    "dH not scaled": ("no prior", "dh_chunk.mul_(r[:, None])", "dh_chunk"),
    "hidden states of the first tokens": ("some tokens", "at = rows if tokens is None else tokens[rows]", "at = rows"),
    "confidence forgotten": (
        "no prior",
        "targets, logprobs, sums, LogitGradient",
        "targets, 0 * logprobs - 99, sums, LogitGradient",
    ),
    "slope forgotten at the target, 16 bits": (
        "bfloat16",
        "sums * slope if capped else sums,",
        "sums,",
    ),
    "slope forgotten at the target": (
        "float32",
        "sums * slope if capped else sums,",
        "sums,",
    ),
    "one-hot added": ("float32", "f.scatter_(1, column,", "f.scatter_add_(1, column,"),
    "too large sums accepted": ("range", " & (row_sums <= _LARGEST_SUM)", ""),
    "NaN accepted": (
        "NaN",
        "& (row_sums <= _LARGEST_SUM)).all()",
        "& ~(row_sums > _LARGEST_SUM) | row_sums.isnan()).all()",
    ),
    "too small sums accepted": ("range", "(row_sums >= 1 / _LARGEST_SUM) & ", ""),
}
TARGETS = {  # in forward.py
    "an element's slope at the target": (
        "float32",
        "x, factor, slope = exponents(raw, scale, softcap, inv_t)",
        "x, factor, _ = exponents(raw, scale, softcap, inv_t); slope = factor",
    ),
    "absent target": ("absent target", 'tl.where(known, x * factor, -float("inf"))', "x * factor"),
    "prior forgotten": ("range", "z if prior is None else z - tl.load(prior + rows, mask=inside, other=0.0)", "z"),
    "level of another temperature": (
        "float32",
        "row_levels(shift, factor, factor *",
        "row_levels(shift, factor, scale *",
    ),
    "rounding in the place of the level": (
        "no prior",
        "tl.store(out + 2 * N + rows, level",
        "tl.store(out + 2 * N + rows, rounding",
    ),
}


@pytest.mark.parametrize("bug", [*KERNELS, *HOST])
def test_bug_in_the_one_pass_is_caught(bug, monkeypatch, tmp_path, device):
    name, old, new = (KERNELS | HOST)[bug]
    monkeypatch.setattr(tests, "one_pass", mutate("head/kernels/one_pass.py", old, new, tmp_path))
    with pytest.raises((AssertionError, TypeError)):
        CHECKS[name](device, monkeypatch)


@pytest.mark.parametrize("bug", TARGETS)
def test_bug_at_the_targets_is_caught(bug, monkeypatch, tmp_path, device):
    name, old, new = TARGETS[bug]
    mutant = mutate("head/kernels/forward.py", old, new, tmp_path)
    monkeypatch.setattr(tests.one_pass, "target_logits", mutant.target_logits)
    with pytest.raises((AssertionError, TypeError)):
        CHECKS[name](device, monkeypatch)


@pytest.mark.parametrize("name", CHECKS)
def test_the_one_pass_without_a_bug_passes(name, device, monkeypatch):
    CHECKS[name](device, monkeypatch)
