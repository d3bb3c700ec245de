"""The task with many right answers, its exact measures, and the runs of the demo, on a small random model."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: the demo's task and runs")

from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.states import prompts_of
from integration import diversity, many_answers
from integration.diversity import FROZEN, Learner, Run, at_accuracy, train
from integration.many_answers import (
    HELD_OUT,
    Problem,
    TokenTree,
    make_problems,
    measures,
    paths_of,
    right_probabilities,
    sample,
    score,
)
from lad_kernels import GRPOConfig, LADConfig

VOCABULARY, NEWLINE = 13, 10  # ten digits, newline, two more
LAD, GRPO = LADConfig(), GRPOConfig()


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Truth is float32; a CPU with bf16 units would take bf16 autocast."""
    monkeypatch.setattr(many_answers, "fast_bf16", lambda: False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, bos_token_id=None, eos_token_id=11, pad_token_id=12, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    right = [(1, 2, NEWLINE), (1, 3, NEWLINE), (4, NEWLINE)]
    return [Problem((0, 1), [5, 6, 7], right), Problem((0, 2), [5, 6, 8, 9], right[1:])]


def alone(model, prompt: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of the tokens of one answer [T], from a plain forward of its sequence."""
    ids = torch.tensor([prompt + list(answer)])  # [1, P + T]
    logprobs = model(ids).logits[0].log_softmax(-1)  # [P + T, V]
    return torch.stack([logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)])


def test_a_tree_scores_as_separate_sequences(model, problems):
    answers = [problem.right for problem in problems]
    paths = paths_of(problems, answers, torch.device("cpu"))
    logprobs, entropy = score(model, paths, return_entropy=True)  # [5, 3], [5, 3]
    expected = [alone(model, p.prompt, answer) for p in problems for answer in p.right]
    for row, mask, truth in zip(logprobs, paths.mask, expected):
        torch.testing.assert_close(row[mask], truth, rtol=0, atol=2e-5)
        assert (row[~mask] == 0).all()
    assert len(paths.tree) == 12  # 5 6 | 7 1 2 3 4 | 8 9 1 3 4, no newline: nothing follows it
    weights = torch.randn_like(logprobs)  # [5, 3]
    ours = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
    total = sum((truth * w[: len(truth)]).sum() for truth, w in zip(expected, weights))
    for mine, theirs in zip(ours, torch.autograd.grad(total, list(model.parameters()))):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    first = model(torch.tensor([problems[0].prompt])).logits[0, -1].log_softmax(-1)  # [V]
    torch.testing.assert_close(entropy[0, 0], -(first.exp() * first).sum(), rtol=1e-5, atol=1e-5)


def test_probabilities_of_right_answers_sum_what_sampling_finds(model, problems):
    p = right_probabilities(model, problems)
    assert [len(x) for x in p] == [3, 2]
    draws = sample(model, problems, 4000, NEWLINE, torch.Generator().manual_seed(0))
    for problem, exact, group in zip(problems, p, draws):
        for answer, chance in zip(problem.right, exact.tolist()):
            spread = math.sqrt(chance * (1 - chance) / len(group))
            assert abs(group.count(answer) / len(group) - chance) < 5 * spread + 1e-4
        assert all(len(a) <= 3 and (len(a) == 3 or a[-1] in (NEWLINE, 11)) for a in group)
        assert all(token not in (NEWLINE, 11) for a in group for token in a[:-1])


def test_measures_of_known_distributions():
    start = [torch.tensor([0.1, 0.1, 0.2], dtype=torch.float64)]
    got = measures([torch.tensor([0.4, 0.4, 0.0], dtype=torch.float64)], start)
    assert got["accuracy"] == pytest.approx(0.8)
    assert got["pass@8"] == pytest.approx(1 - 0.2**8)
    assert got["distinct"] == pytest.approx(2 * (1 - 0.6**64))
    assert got["entropy"] == pytest.approx(math.log(2))
    assert got["tv_to_start"] == pytest.approx(0.5)


def test_a_common_beginning_is_one_node():
    tree = TokenTree()
    end = tree.add([1, 2, 3])
    assert tree.add([1, 2, 4]) == 3 and tree.add([5], end) == 4 and tree.add([1, 2, 3]) == end
    inputs = tree.inputs(torch.device("cpu"), first=2)
    assert inputs["position_ids"].tolist() == [[2, 2, 3]]
    assert inputs["attention_mask"][0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]


class Characters:
    """A tokenizer with a token a character; `joins` gives one that joins the space before a number to it."""

    def __init__(self, joins: bool = False):
        self.joins = joins

    def __call__(self, text: str, **_):
        text = text.replace(": 4", ":_") if self.joins else text
        return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]


def test_problems_do_not_overlap_and_list_every_number():
    split = make_problems(Characters())
    held_out = {problem.bounds for problem in split.held_out}
    assert len(held_out) == HELD_OUT and len(split.train) == len(many_answers.BOUNDS) - HELD_OUT
    assert held_out.isdisjoint(problem.bounds for problem in split.train) and split.newline == ord("\n")
    for low, high in held_out:
        problem = next(p for p in split.held_out if p.bounds == (low, high))
        numbers = [int("".join(map(chr, answer))) for answer in problem.right]
        assert numbers == list(range(low + 1, high))


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused():
    with pytest.raises(ValueError, match="model: expected a tokenizer that splits"):
        make_problems(Characters(joins=True))


@pytest.fixture
def learner(model, problems, monkeypatch):
    """`Learner` of a run on the small model, where three digits are right if the first is below 5."""
    right = [(a, b, c) for a in range(5) for b in range(10) for c in range(10)]
    easy = [Problem(p.bounds, p.prompt, right) for p in problems]
    monkeypatch.setattr(diversity, "PROMPTS", 2)
    monkeypatch.setattr(diversity, "GROUP", 32)
    monkeypatch.setattr(diversity, "LEARNING_RATE", 1e-3)
    monkeypatch.setattr(diversity, "AutoTokenizer", type("None", (), {"from_pretrained": lambda _: None}))
    monkeypatch.setattr(diversity, "make_problems", lambda _: many_answers.Split(easy, easy, NEWLINE))

    def load(_, **how):
        fresh = AutoModelForCausalLM.from_config(model.config)
        fresh.load_state_dict(model.state_dict())
        return fresh

    monkeypatch.setattr(diversity, "AutoModelForCausalLM", type("Auto", (), {"from_pretrained": load}))
    return lambda run: Learner("", run, 0, "cpu")


@pytest.mark.parametrize("batches", [1, 2, FROZEN])
@pytest.mark.parametrize("config", [LAD, GRPO, GRPOConfig(kl_coef=0.1, entropy_coef=0.01)], ids=["lad", "grpo", "more"])
def test_when_the_ratio_leaves_one(learner, config, batches):
    """On-policy never; otherwise from a rollout's second update on, and after a new rollout it is 1 again."""
    records = []
    train(learner(Run("", config, batches, 4)), math.inf, records.append, every=2)
    assert [r["update"] for r in records] == [0, 1, 2, 3, 4] and records[0]["updates"] == 4
    assert [r["update"] for r in records if "held_out" in r] == [0, 2, 4]
    moved = [abs(r["approx_kl_k1"]) > 1e-6 for r in records[1:]]
    assert moved == {1: [False] * 4, 2: [False, True] * 2, FROZEN: [False, True, True, True]}[batches]
    assert all(math.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in records[1:])
    assert ("kl_ref" in records[1]) == (config.kl_coef != 0)


def test_the_reference_is_the_start(learner):
    """pi_old of the second rollout is not the start, the reference still is."""
    one = learner(Run("", GRPOConfig(kl_coef=0.1), 1, 4))
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.mul_(1.1)
    batch = one.draw()
    start = learner(Run("", GRPO, 1, 4)).model
    torch.testing.assert_close(batch.ref_logprobs, score(start, batch.paths).logprobs)
    assert (batch.ref_logprobs - score(one.model, batch.paths).logprobs).abs().max() > 1e-2


def test_what_was_trained_is_saved_with_its_prompts(learner, tmp_path):
    """As the benchmarks' states take them: `pytest benchmarks --policy FOLDER`."""
    tokenizer = Characters(joins=False)
    tokenizer.decode, tokenizer.save_pretrained = str, lambda folder: None
    one = learner(Run("", LAD, 1, 4))
    diversity.save_model(one, tokenizer, tmp_path)
    asked = prompts_of(tmp_path)
    assert asked.texts == [str(p.prompt) for p in one.split.train + one.split.held_out]
    assert (asked.length, asked.chat) == (3, False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), one.model.parameters()))


def test_updates_follow_from_the_time_that_the_first_one_takes(learner, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(diversity.time, "perf_counter", lambda: float(next(clock)))  # a call takes a second
    records = []
    train(learner(Run("", LAD, 1, 50)), 10.0, records.append, every=4)
    assert 1 <= records[0]["updates"] < 50 and records[-1]["update"] == records[0]["updates"]
    assert records[0]["planned"] == 50


def test_value_where_an_accuracy_is_reached():
    looks = [{"accuracy": a, "distinct": d} for a, d in ((0.2, 9.0), (0.7, 11.0), (0.9, 7.0), (0.6, 1.0), (0.95, 2.0))]
    assert at_accuracy(looks, "distinct", 0.8) == pytest.approx(9.0)
    assert at_accuracy(looks, "distinct", 0.99) is None


def look(accuracy: float, distinct: float) -> dict[str, float]:
    return {"accuracy": accuracy, "distinct": distinct, "entropy": 1.0, "pass@8": 1.0, "tv_to_start": 0.0}


def lines(run: Run, ends: list[dict[str, float]], updates: int) -> list[dict]:
    return [
        {"update": i * updates, "updates": updates, "planned": run.updates, "seconds": 1.0, "held_out": end}
        for i, end in enumerate(ends)
    ]


def test_a_sheet_says_what_was_cut_and_what_was_never_reached(tmp_path):
    runs = [Run("LAD", LAD, FROZEN, 24), Run("GRPO, clip 0.2", GRPO, FROZEN, 24)]
    results = [lines(runs[0], [look(0.2, 9), look(0.9, 7)], 24), lines(runs[1], [look(0.2, 9), look(0.4, 8)], 12)]
    sheet = diversity.runs_sheet(runs, results)
    assert sheet.rows[1][-1] == "7.3" and sheet.rows[2][-1] == "never" and sheet.rows[0][0] == "start"
    assert "GRPO, clip 0.2, pi_old fixed 12 of 24" in diversity.cut_short(runs, results, 60)
    assert "LAD" not in diversity.cut_short(runs, results, 60) and diversity.cut_short(runs[:1], results[:1], 60) == ""
    assert diversity.run_checks(runs, results) == {}  # a run that was cut proves nothing
    full = [results[0], lines(runs[1], [look(0.2, 9), look(0.4, 8)], 24)]
    assert list(diversity.run_checks(runs, full).values()) == [True]
    assert list(
        diversity.run_checks(runs, [results[0], lines(runs[1], [look(0.2, 9), look(0.95, 8)], 24)]).values()
    ) == [False]
    diversity.plot_runs(runs, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_lines_of_a_run_that_is_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"update": 0}) + '\n{"upd')
    assert diversity.read_records(tmp_path) == [{"update": 0}]


def test_every_run_ends_side_by_side(tmp_path, monkeypatch):
    """Two processes; a stand-in for the model's run writes what a run writes."""
    runs = [Run("LAD", LAD, 1, 2), Run("GRPO", GRPO, 1, 3)]
    monkeypatch.setattr(diversity, "run_once", stand_in)
    results = diversity.run_all("", runs, 10.0, "cpu", tmp_path, Console(quiet=True))
    assert [r[-1]["update"] for r in results] == [2, 3]
    assert [r[-1]["allowed"] for r in results] == pytest.approx([8.0, 12.0])  # 10 s of two cores, by planned updates


def stand_in(folder, run, seconds, device, out, keep_model):
    out.mkdir(parents=True)
    last = {"update": run.updates, "updates": run.updates, "seconds_left": 0.0, "seconds": 1.0, "allowed": seconds}
    (out / "metrics.jsonl").write_text(json.dumps({**last, "held_out": look(0.5, 3)}) + "\n")
