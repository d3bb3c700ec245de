"""Planted bugs in the choice of a path and in what the backward multiplies: each must be caught."""

from __future__ import annotations

import itertools

import pytest
import test_cross_entropy
import test_dispatch
import test_far_logits
import test_path_choice
import test_paths
import torch
from test_mutants import mutate

from lad_kernels import step
from lad_kernels.head import memory, plan


def check_model(_) -> None:
    for work in test_dispatch.works():
        test_dispatch.test_the_cheapest_path_is_taken(work)


def check_looks(patch) -> None:
    test_path_choice.test_looking_tells_what_routing_keeps("torch", "drop", "cpu", patch)


def check_half(patch) -> None:
    test_path_choice.test_half_of_the_words_tell_nearly_the_same(1.0, "drop", patch)


def check_flops(_) -> None:
    for path, on_policy in itertools.product(("one_pass", "two_pass", "routed"), (False, True)):
        test_paths.test_flops_are_those_of_the_formula_and_of_torch(path, on_policy)


def check_offset(patch) -> None:
    patch.setattr(test_far_logits.pytorch, "TILE_BYTES", 4 * test_far_logits.SLAB * test_far_logits.N)
    test_far_logits.test_a_common_offset_of_some_tokens("two_pass")


def check_frozen(_) -> None:
    for frozen in ("hidden_states", "lm_head_weight"):
        test_path_choice.test_products_of_what_is_frozen_are_not_counted(frozen)


def check(name: str, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        if name in SMALL_CHUNKS:
            patch.setattr(memory.Work, "chunk_rows", lambda self: 30)  # as `fresh` of test_paths.py
        CHECKS[name](patch)


CHECKS = {
    "exact": lambda _: test_paths.test_exact_paths_equal_the_specification("clipped", False, "two_pass"),
    "bound": lambda patch: test_paths.test_a_policy_is_routed_within_its_bound(torch.float32, "cpu", patch),
    "twice": lambda _: test_paths.test_a_second_backward_gives_the_same_gradient("one_pass"),
    "twice, two passes": lambda _: test_paths.test_a_second_backward_gives_the_same_gradient("two_pass"),
    "flops": check_flops,
    "final": lambda _: test_paths.test_metrics_are_final_when_they_are_returned("one_pass", "torch", "cpu"),
    "offset": check_offset,
    "looks": check_looks,
    "half": check_half,
    "sample": test_path_choice.test_the_sample_is_spread_over_the_tokens,
    "smoothed": lambda _: test_cross_entropy.test_float64("smoothing 0.1, z 0.01, weights", "sum", "routed"),
    "sequences": lambda _: test_path_choice.test_chunks_of_whole_sequences(),
    "frozen": check_frozen,
    "model": check_model,
    "worth": lambda _: test_dispatch.test_the_call_looks_where_it_matters_and_costs_little(),
    "whole tokens": lambda _: test_dispatch.test_whole_tokens_cost_what_they_cost_in_the_dense_backward(),
    "asked": lambda _: test_dispatch.test_what_is_asked_for_is_done(),
    "room": lambda _: test_dispatch.test_masses_and_pairs_that_do_not_fit_are_not_kept(),
    "tail mass": lambda _: test_dispatch.test_default_tail_mass(),
    "why": lambda _: test_dispatch.test_why_names_the_path_and_its_cost(),
}
SMALL_CHUNKS = ("exact", "bound", "twice", "twice, two passes", "flops", "final", "sample", "sequences", "frozen")
PLAN = {  # bug: check that shows it, source, mutant
    "compaction forgotten in the backward": ("exact", "part = head.select(self.active)", "part = head"),
    "coefficients' first tokens": ("bound", "= blocks[:, active]", "= blocks[:, : len(active)]"),
    "log-probs of the first tokens": (
        "bound",
        "HeadForward(out.logprobs[active]",
        "HeadForward(out.logprobs[: len(active)]",
    ),
    "lse of the first tokens": ("exact", "out.lse[active], select", "out.lse[: len(active)], select"),
    "rest of lse of the first tokens": (
        "offset",
        "select(out.lse_rest, active)",
        "select(out.lse_rest, slice(len(active)))",
    ),
    "mean logit's part forgotten": ("smoothed", "if self.mean_logit is not None:", "if False:"),
    "mean logit's upstream gradient": ("smoothed", "self.mean_logit * upstream)", "self.mean_logit)"),
    "rest of lse forgotten": ("offset", "gradient.with_rest(out.lse_rest)", "gradient"),
    "upstream gradient forgotten": ("twice, two passes", "self.gradient.scaled(upstream)", "self.gradient"),
    "share of tokens with a gradient": ("looks", "of_few.is_active().to(kept.dtype)", "torch.ones_like(of_few.onehot)"),
    "density of a dropped tail": ("looks", "kept]).tolist()", "kept * 0]).tolist()"),
    "a sample of the first tokens": ("sample", " * work.tokens // size  # [S]", "  # [S]"),
    "tokens whose target is not among the words": ("half", "of_few.where(known)", "of_few"),
    "masses of half the words taken for those of all": ("half", "threshold * step**0.5,", "threshold,"),
    "chunks longer than memory": ("sequences", "if bound - start > rows:", "if bound - last > rows:"),
    "a sequence longer than memory": ("sequences", "if bound - last > rows:", "if False:"),
    "padding left out": ("sequences", "[*range(bounds[-1] + rows, tokens, rows), tokens]", "[]"),
    "padding longer than memory": ("sequences", "[*range(bounds[-1] + rows, tokens, rows), tokens]", "[tokens]"),
    "a sequence passed twice": ("sequences", "start = last", "start = chunks[-1].start"),
    "error bound forgotten": ("bound", "routing, bound = chosen, error_bound", "routing = chosen"),
    "largest dropped mass": (
        "bound",
        '"dropped_mass_max": bound.dropped_mass_max',
        '"dropped_mass_max": bound.dropped_mass_mean',
    ),
    "kept share of active tokens alone": (
        "flops",
        "/ max(work.tokens * work.blocks, 1)",
        "/ max(tokens * work.blocks, 1)",
    ),
    "kept share of all tokens": ("flops", "(tokens, tokens * work.blocks", "(tokens, work.tokens * work.blocks"),
    "flops of a whole last block": ("flops", "+ last * columns", "+ last * BLOCK"),
    "flops of frozen parts": ("frozen", "(1 + needs.hidden + needs.weight)", "3"),
    "flops of one pass counted twice": ("final", "0 if ready is not None else _flops", "_flops"),
}
DISPATCH = {
    "the forward costs nothing": (
        "model",
        "cost.one_pass(work, active) < cost.score(work) + after",
        "cost.one_pass(work, active) < after",
    ),
    "dearer of two backwards": ("model", "after = min(after,", "after = max(after,"),
    "dead tokens counted": ("model", "active = work.tokens * shares.active", "active = work.tokens"),
    "density assumed, not seen": ("model", "(shares.density - shares.dense)", "(DENSITY - shares.dense)"),
    "whole tokens of a sample as pairs": (
        "whole tokens",
        "pairs, round(active * shares.dense), active",
        "pairs + active * shares.dense * work.blocks, 0, active",
    ),
    "whole tokens as pairs": ("whole tokens", "pairs - dense * work.blocks, dense, active)", "pairs, 0, active)"),
    "a sample that is too dear": (
        "worth",
        "return cost.sample(work, sample_step(work)) <= SAMPLE_COST * cost.one_pass(work)",
        "return True",
    ),
    "a sample where nothing depends on it": (
        "worth",
        "and (all_active or not work.triton)",
        "and all_active",
    ),
    "one pass whatever is forced": ("asked", '_forced.get() == "one_pass"', '_forced.get() != "two_pass"'),
    "force does not end": ("asked", "_forced.reset(token)", "pass"),
    "block masses without room": ("room", " and memory.most_pairs(work) > 0", ""),
    "float32 is not exact": ("tail mass", "dtype.itemsize == 2 else", "dtype.itemsize <= 4 else"),
    "why forgets dead tokens": ("why", "2 + 6 * active * density", "2 + 6 * density"),
}
MODULES = (test_dispatch, test_far_logits, test_path_choice, test_paths)


@pytest.mark.parametrize("bug", [*PLAN, *DISPATCH])
def test_bug_in_the_choice_of_a_path_is_caught(bug, monkeypatch, tmp_path):
    name, old, new = (PLAN | DISPATCH)[bug]
    mutant = mutate("head/plan.py" if bug in PLAN else "head/dispatch.py", old, new, tmp_path)
    if bug in PLAN:
        monkeypatch.setattr(test_path_choice, "plan", mutant)
        for x in ("forward_for_backward", "one_pass_chunks", "plan_backward", "select_active", "takes_one_pass"):
            monkeypatch.setattr(step, x, getattr(mutant, x))
    else:
        for module in (plan, *MODULES):
            monkeypatch.setattr(module, "dispatch", mutant)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(name, monkeypatch)


@pytest.mark.parametrize("name", CHECKS)
def test_the_choice_of_a_path_without_a_bug_passes(name, monkeypatch):
    check(name, monkeypatch)
