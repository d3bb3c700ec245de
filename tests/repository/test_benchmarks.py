"""The benchmarks: a wrong kernel is never timed, missing peers are named, the report shows what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.harness import gate, predicted
from benchmarks.harness.data import make_batch
from benchmarks.harness.eager import EAGER, eager_logprobs
from benchmarks.harness.measure import Rounds, quartiles, ratio, ratio_interval, summary
from benchmarks.harness.provider import JOBS, Provider
from benchmarks.harness.providers import all_providers, split_available
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.shapes import SETS, TINY
from benchmarks.studies import since
from lad_kernels import reference
from lad_kernels.head import cost, dispatch, memory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small_batch():
    return gate.gate_batch("flat", torch.float32, "cpu")


def ours(job: str) -> Provider:
    return next(p for p in all_providers(job) if p.name == "lad_kernels (torch)")


@pytest.mark.parametrize("job", tuple(JOBS))
@pytest.mark.parametrize("data", ("flat", "peaked"))
def test_our_providers_pass_the_gate(job, data):
    verdict = gate.check(ours(job), gate.gate_batch(data, torch.float32, "cpu"))
    assert verdict.failed == []
    assert set(verdict.errors) == {"value", "dH", "dW target rows", "dW other rows"}


def without_hidden_gradient(batch):
    return eager_logprobs(dataclasses.replace(batch, hidden=batch.hidden.detach())) + 0 * batch.hidden.sum()


BUGS = {
    "a factor in the value": lambda b: eager_logprobs(b) * 1.0001,
    "no gradient of hidden": without_hidden_gradient,
    "a lost last word": lambda b: eager_logprobs(dataclasses.replace(b, weight=b.weight[:-1], targets=b.targets % 599)),
    "rounded logits": lambda b: (b.hidden.bfloat16() @ b.weight.bfloat16().T).float().log_softmax(-1)[:, 0],
}


@pytest.mark.parametrize("job", tuple(JOBS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_stops_a_small_factor_where_log_probs_nearly_vanish(job, dtype):
    def value(b):
        return (
            gate.specification(job, dataclasses.replace(b, hidden=b.hidden.float(), weight=b.weight.float())) * 1.0001
        )

    verdict = gate.measure(Provider("planted", job, value), gate.gate_batch("peaked", dtype, "cpu"))
    error, allowed = verdict.report["value"]
    assert 1.9 * allowed < error == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("job", ["head", "ce", "grpo"])
@pytest.mark.parametrize(("units", "fails"), [(2.5, False), (-2.5, False), (5.0, True), (-5.0, True)])
def test_gate_knows_what_rounding_leaves_of_a_log_prob(job, units, fails):
    """Errors that stand in a fixed ratio to lse, all of one sign; the GRPO loss has slopes of both signs."""

    def value(b):
        out = reference.linear_logprobs(b.hidden.double(), b.weight.double(), b.targets)
        logprobs = out.logprobs.requires_grad_()
        (slope,) = torch.autograd.grad(gate.from_logprobs(job, logprobs, b).sum(), logprobs, retain_graph=True)
        return gate.from_logprobs(job, logprobs + units * 2**-24 * (out.lse * slope.sign()).detach(), b)

    batch = gate.gate_batch("peaked", torch.float32, "cpu")
    assert ("value" in gate.measure(Provider("rounded", job, value), batch).failed) == fails


@pytest.mark.parametrize("bug", BUGS)
def test_gate_stops_a_planted_bug(bug, small_batch):
    wrong = Provider("planted", "head", BUGS[bug], ours=True)
    with pytest.raises(AssertionError, match="outside the tolerance"):
        gate.check(wrong, small_batch)


def test_gate_only_reports_a_peer(small_batch):
    verdict = gate.check(Provider("peer", "head", BUGS["a factor in the value"]), small_batch)
    assert "value" in verdict.failed
    assert verdict.errors["value"] == pytest.approx(1e-4, rel=0.01)


def test_every_missing_provider_says_why(small_batch):
    providers = all_providers()
    available, missing = split_available(providers, small_batch)
    assert {p.name for p in available} | set(missing) == {p.name for p in providers}
    assert missing
    for name, reason in missing.items():
        assert len(reason.split()) >= 4, f"{name}: {reason!r} is not a sentence"
    cuda_only = next(p for p in providers if p.name == "verl linear_cross_entropy")
    assert "not installed" in cuda_only.unavailable_reason(small_batch) or "CUDA" in cuda_only.unavailable_reason(
        small_batch
    )


def test_every_job_has_its_baseline_and_both_of_our_paths():
    for job in JOBS:
        names = [p.name for p in all_providers(job)]
        assert names[0] == EAGER
        assert {"lad_kernels (triton)", "lad_kernels (torch)"} <= set(names)
        assert len(set(names)) == len(names)


def test_shapes_have_reasons_and_unique_names():
    for shapes in SETS.values():
        assert len({s.name for s in shapes}) == len(shapes)
        assert all(len(s.reason.split()) >= 2 for s in shapes)


@pytest.mark.parametrize("data", ("flat", "peaked"))
def test_batches_are_what_they_say(data):
    batch = make_batch(TINY[0], data, torch.float32, "cpu")
    log_p = (batch.hidden @ batch.weight.T).log_softmax(-1)  # [N, V]
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert entropy == pytest.approx(0.4, abs=0.05) if data == "peaked" else entropy > 5
    assert (batch.old_logprobs <= 0).all()


def test_rounds_take_turns_and_survive_a_failing_peer(small_batch):
    order = []

    def provider(name: str, fails: bool = False, **flags) -> Provider:
        def forward(batch):
            order.append(name)
            if fails:
                raise RuntimeError("out of\nluck")
            return eager_logprobs(batch)

        return Provider(name, "head", forward, **flags)

    rounds = Rounds([provider("a"), provider("b"), provider("c", fails=True)], [small_batch])
    rounds.warm()
    rounds()
    assert sorted(order[:3]) == ["a", "b", "c"] and sorted(order[3:]) == ["a", "b"]
    for _ in range(8):
        rounds()
    assert {first for first, _ in zip(order[3::2], order[4::2])} == {"a", "b"}  # each follows the other at times
    assert rounds.failed == {"c": "failed: RuntimeError: luck"}
    assert all(len(samples) == 9 for samples in rounds.samples.values())
    with pytest.raises(RuntimeError, match="luck"):
        Rounds([provider("ours", fails=True, ours=True)], [small_batch])()


def test_statistics():
    fast, slow = [(1.0, 1.0), (2.0, 2.0), (1.0, 2.0)], [(2.0, 2.0), (4.0, 4.0), (2.0, 4.0)]
    assert ratio(fast, slow) == 0.5
    assert ratio_interval(fast, slow) == (0.5, 0.5, 0.5)
    assert summary(fast)["total_ms"] == [2500.0, 3000.0, 3500.0]
    assert quartiles([0.001]) == [1.0, 1.0, 1.0]


def example_results() -> Results:
    results = Results({"device": "a machine", "versions": {"torch": "2"}, "commit": "abc", "command": "pytest"})
    row = dict(job="head", shape="s N=1 D=2 V=3", data="flat", dtype="float32", note="", rounds=3, outside=[],
               errors={"value": 1e-7}, forward_ms=[1.0, 2.0, 3.0], backward_ms=[1.0, 2.0, 3.0])  # fmt: skip
    results.add("speed", **row, provider=EAGER, ours=False, total_ms=[3.0, 4.0, 5.0], vs_eager=1.0)
    results.add("speed", **row, provider="lad_kernels (torch)", ours=True, total_ms=[5.0, 6.0, 7.0], vs_eager=1.5)
    for name, peak in ((EAGER, 10.0), ("lad_kernels (torch)", 12.0)):
        results.add(
            "memory", job="head", shape="s", provider=name, ours=name != EAGER, peak_mib=peak, beyond_gradients_mib=peak
        )
    results.missing["some peer"] = "the package some_peer is not installed"
    return results


def test_report_shows_machine_missing_and_losing_rows(tmp_path):
    example_results().save(tmp_path / "results" / "box" / "small.json")
    text = report.write(tmp_path / "results", tmp_path / "RESULTS.md").read_text()
    for part in ("## box", "a machine", "torch 2", "commit abc", "`pytest`", "some peer: the package"):
        assert part in text
    assert "1.5 **slower**" in text
    assert "1.2 **more**" in text
    assert "6 [5, 7]" in text


def test_committed_results_are_rendered():
    """RESULTS.md is what the committed JSON files give."""
    if not RESULTS.exists():
        pytest.skip("no results are committed; lost: that RESULTS.md shows them as they are")
    assert report.TARGET.read_text() == report.document(RESULTS)


def test_predicted_memory_is_within_the_budget():
    """Beyond inputs, gradients and one float32 dW, or what has its room, at every shape of the table."""
    for shape in predicted.SHAPES:
        work = memory.Work(shape.tokens, shape.hidden_size, shape.vocab_size, 2, "sm_90")
        for path in dispatch.PATHS:
            for kept in predicted.KEPT:
                size, float32_dw = memory.peak_bytes(work, path, int(kept * work.tokens * work.blocks))
                room = 4 * work.vocab_size * work.hidden_size if path == "one_pass" and not float32_dw else 0
                assert 0 <= size <= memory.BUDGET + room


def test_predicted_times_lie_in_their_bands():
    """Which leave the cost model as it is; routed calls hang on more that was not measured."""
    for shape in predicted.SHAPES:
        work = memory.Work(shape.tokens, shape.hidden_size, shape.vocab_size, 2, predicted.CARD)
        before, times, bands = cost.SPEEDS[predicted.CARD, 2], predicted.over_products(work), predicted.bands(work)
        assert cost.SPEEDS[predicted.CARD, 2] is before
        assert all(low <= time <= high for time, (low, high) in zip(times, bands, strict=True))
        one, two, _, routed = (high / low for low, high in bands)
        assert 1 < two < 1.05
        assert 1 < one < 1.1 < routed < 1.3


def test_two_checkouts_are_called_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(since, "ROUNDS", (3, 3))
    path = tmp_path / "batch.pt"
    since.write(make_batch(TINY[0], "peaked", torch.float32, "cpu"), path)
    with since.Checkout(ROOT) as one, since.Checkout(ROOT) as other:
        for job in since.JOBS:
            found = since.pairs(one, other, (path, job, 0.0))
            assert len(found) == 3
            assert all(seconds > 0 for pair in found for seconds in pair)


def test_versions_that_disagree_are_not_timed():
    class Answers:
        def __init__(self, answer: list[float] | None):
            self.answer = answer

        def call(self, *case: object) -> list[float] | None:
            return self.answer

    one, other, older = Answers([1.0, 2.0, 3.0]), Answers([1.0, 2.0, 3.1]), Answers(None)
    with pytest.raises(SystemExit, match="expected gradients that agree"):
        since.pairs(one, other, ("batch.pt", "lad", 0.0))
    with pytest.raises(SystemExit, match="expected gradients that agree"):
        since.pairs(one, Answers([1.0, 2.0, float("nan")]), ("batch.pt", "lad", 0.0))
    assert since.pairs(older, one, ("batch.pt", "ce", 0.0)) is None
