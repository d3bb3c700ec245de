"""Which GPU experiments run, in which order, for how long at most, and what is lost if one is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

DEADLINE = {"A": 372, "B": 185, "C": 240}  # seconds of a part
GRACE = 3  # seconds between an experiment's own limit, at which it should stop, and its end
CLOSING = 8  # seconds of a part for merging and the table
SLOW = "no answer in time"  # a verdict of the smoke test


@dataclass(frozen=True)
class Experiment:
    name: str  # a function of experiments.py
    part: str
    seconds: int  # its own limit
    what: str
    lost: str  # what remains unknown if it is cut
    beside: bool = False  # times nothing: starts together with the one before


PLAN = (
    Experiment("smoke", "A", 36, "every path once, a process each, against impl='torch'; first-call time",
               "which path traps, so that the others can go on"),
    Experiment("ceilings", "A", 20, "library products and copy bandwidth, the denominators",
               "every ratio to the library, the cost model's constants"),
    Experiment("correctness", "A", 97, "the gate for every provider, runs twice bitwise, objectives, poisoned memory",
               "errors against float64, bitwise promises"),
    Experiment("test_suite", "A", 97, "the tests that touch kernels, compiled",
               "edges of tiles, layouts, features; the verdicts so far are kept", beside=True),
    Experiment("lad_against_grpo", "A", 20, "the ratio of LAD to GRPO in time and memory", "the paper's claim"),
    Experiment("head_shapes", "A", 55, "N = 8,192, D = 4,096, V = 151,936 and 128,256: ours, eager, peers",
               "the comparison with what others publish"),
    Experiment("one_pass", "A", 18, "one pass against two, rows of a chunk", "the choice between the two"),
    Experiment("routed", "A", 35, "every path end to end on low- and high-entropy data and a policy's, error and bound",
               "what routing saves"),
    Experiment("forward_tiles", "A", 25, "tile shapes of the forward, with and without entropy", "tuning"),
    Experiment("kernels", "A", 15, "time, registers, spills and shared memory of every kernel, three shapes",
               "where the time of a path goes"),
    Experiment("step_parts", "A", 13, "the parts of a routed call, time on the device and on the host",
               "what routing costs"),
    Experiment("peers", "B", 30, "time, memory and error of every provider that is installed, and on a policy's states",
               "tables by shape"),
    Experiment("trl_steps", "B", 40, "GRPO and LAD micro-batches of a 0.5B model in TRL, with its head and with ours",
               "the effect in a trainer"),
    Experiment("memcheck", "B", 70, "accesses out of bounds, on small shapes", "proof of none"),
    Experiment("racecheck", "B", 70, "races in shared memory, on small shapes", "proof of none", beside=True),
    Experiment("counters", "B", 25, "hardware counters, one launch of each kernel", "why a kernel is slow"),
    Experiment("slabs", "C", 30, "workspace of the two-pass backward", "tuning"),
    Experiment("single_pass", "C", 20, "one pass in library products and row operations", "a bound for one pass"),
    Experiment("routed_kernels", "C", 60, "the routed backward against planted shares, and its tiles", "tuning"),
    Experiment("slow_peers", "C", 110, "providers that compile for long", "torch.compile"),
)  # fmt: skip


def stages(plan: Sequence[Experiment]) -> list[list[Experiment]]:
    """The plan in the groups that run at once."""
    found: list[list[Experiment]] = []
    for experiment in plan:
        if experiment.beside and found:
            found[-1].append(experiment)
        else:
            found.append([experiment])
    return found


def longest(plan: Sequence[Experiment]) -> int:
    """Seconds that the plan takes if every experiment runs to its limit."""
    return sum(max(e.seconds for e in stage) + GRACE for stage in stages(plan)) + CLOSING


def filled(plan: Sequence[Experiment], deadline: int) -> list[Experiment]:
    """The plan with the seconds that `deadline` leaves over given to its longest stage."""
    groups = stages(plan)
    most = max(groups, key=lambda stage: max(e.seconds for e in stage))
    spare = max(deadline - longest(plan), 0)
    return [replace(e, seconds=e.seconds + spare) if e in most else e for e in plan]
