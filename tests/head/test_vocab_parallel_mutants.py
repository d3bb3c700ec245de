"""Planted bugs of the head over several ranks: each edits one line of real source and must be caught.

Two processes run all of them in turn, as a module of distributed_worker.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import distributed_vocabulary as cases
import pytest
import torch
import torch.distributed as dist
from test_distributed import run_world
from test_mutants import mutate

from lad_kernels import head

CHECKS = {
    "heads": lambda: [cases.check_head("every transform", torch.float64, bounds) for bounds in range(3)],
    "rounding": lambda: cases.check_head("every transform", torch.bfloat16, 0),
    "chunks": cases.heads_in_chunks,
    "common part": cases.a_common_part_of_all_logits_cancels,
    "refusals": cases.refusals,
    "disagreements": cases.disagreements,
}
BUGS = {  # bug: check that shows it, source, mutant
    "shards taken as equally long": (
        "heads",
        "return sum(self.rows[: self.rank])",
        "return self.rank * (sum(self.rows) // len(self.rows))",
    ),
    "owner of a shard's first row": ("heads", "ends, right=True", "ends, right=False"),
    "a rank without rows has mass": ("heads", "parts[0] = -torch.inf", "parts[0] = 0.0"),
    "log-prob of the owner's rows alone": ("heads", "gather(0, owner)[0] - beyond)", "gather(0, owner)[0])"),
    "log-prob from two large lse": (
        "common part",
        "gather(0, owner)[0] - beyond)",
        "gather(0, owner)[0] - (lse - lse_r.gather(0, owner)[0]))",
    ),
    "what rounding lost, in lse": ("common part", "= above.logsumexp(0)", "= (lse_r - top).logsumexp(0)"),
    "what rounding lost, in entropy": ("common part", "above - log_mass  #", "(lse_r - top) - log_mass  #"),
    "what rounding lost, in log-probs": ("common part", " + (rest_r - rest_r.gather(0, owner))", ""),
    "what rounding lost, in gradients": ("common part", "log_mass - (lse - top))", "0 * lse)"),
    "entropy of the choice of a rank": ("heads", "(parts[:, 3] - log_share)", "parts[:, 3]"),
    "one-hot on every rank": ("heads", "torch.where(inside, gradient.onehot, 0.0)", "gradient.onehot"),
    "one-hot of the next rank's first row": (
        "heads",
        "< self.shard.start + len(self.weight))",
        "<= self.shard.start + len(self.weight))",
    ),
    "parts of dH not added": (
        "heads",
        "dist.all_reduce(gradients.hidden,",
        "dist.all_reduce(gradients.hidden.clone(),",
    ),
    "parts of dH rounded before they are added": (
        "rounding",
        "dist.all_reduce(gradients.hidden,",
        "dist.all_reduce(gradients.hidden.copy_(gradients.hidden.bfloat16()),",
    ),
    "dH of the first tokens": ("heads", "dh[tokens if self.tokens is None else self.tokens[tokens]]", "dh[tokens]"),
    "lse of the first chunk": ("chunks", "lse[tokens], gradient", "lse[: tokens.stop - tokens.start], gradient"),
    "gradient of the first chunk": (
        "chunks",
        "gradient.select(tokens), needs",
        "gradient.select(slice(0, tokens.stop - tokens.start)), needs",
    ),
    "ids compared whatever their order": ("refusals", "(targets * position).sum()", "targets.sum()"),
    "values compared whatever their order": (
        "disagreements",
        "(rows * torch.arange(1, len(rows) + 1, device=x.device)).sum()",
        "rows.sum()",
    ),
    "values of masked tokens compared": (
        "disagreements",
        "packing.select(rows.view(packing.shape)) if by_token else rows",
        "rows",
    ),
    "settings compared by their type": ("disagreements", "else repr(x)", "else type(x).__name__"),
}


def caught(bug: str | None, check: str, folder: Path) -> bool:
    """Whether any rank's check fails; all ranks take part in the same exchanges."""
    _, old, new = BUGS[bug] if bug else (None, "", "")
    name = "lad_kernels.head.vocab_parallel"
    with pytest.MonkeyPatch.context() as patch:
        if bug:
            mutant = mutate("head/vocab_parallel.py", old, new, folder)
            patch.setitem(sys.modules, name, mutant)
            patch.setattr(head, "vocab_parallel", mutant)
            patch.setattr(cases, "vocab_parallel", mutant)
        failed = False
        try:
            CHECKS[check]()
        except (AssertionError, ValueError, pytest.fail.Exception):
            failed = True
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, failed)
    return any(ranks)


def every_mutant() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {bug: caught(bug, BUGS[bug][0], Path(folder)) for bug in BUGS}
        alarms = [check for check in CHECKS if caught(None, check, Path(folder))]
    print(f"{sum(results.values())} bugs caught, {len(CHECKS) - len(alarms)} checks pass without one")
    survivors = [bug for bug, found in results.items() if not found]
    assert not alarms, f"checks that fail without a bug: {alarms}"
    assert not survivors, f"bugs that no check shows: {survivors}"


CASES = [every_mutant]


def test_bugs_of_the_sharded_head_are_caught(tmp_path):
    said = run_world(2, tmp_path, "test_vocab_parallel_mutants")
    assert f"{len(BUGS)} bugs caught, {len(CHECKS)} checks pass without one" in said
