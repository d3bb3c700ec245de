"""A model's text is scored safely: no answer runs, hangs or fills the machine, and right answers stay right."""

from __future__ import annotations

import inspect
import random
import re
import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: scoring")
pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: scoring")

from hostile_text import BOMBS, escapes, task
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from integration import scoring, tasks
from integration.tasks import RIGHT, Task, normalize, tagged_answer

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(set(DATASETS) - set(scoring.REFUSED))
EVALUATE = sorted(set(scoring._FILTERS) - {"complex_arithmetic", "number_sorting"})
CALLS_EVERYTHING_RIGHT = {"game_of_life_halting"}
NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # none of their own


@pytest.fixture(scope="module", params=NAMES)
def one(request) -> Task:
    """Each in turn for all tests that ask, so that the worker builds it once."""
    return task(request.param)


@pytest.mark.parametrize("name", EVALUATE)
def test_the_scorers_themselves_run_a_completion(name, tmp_path):
    """Why all this: called directly, they create the file. If one no longer does, its filter may go."""
    task(name)._dataset.score_answer(escapes(tmp_path / "file")[0], task(name).train[0])
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("name", EVALUATE)
def test_no_completion_is_run(name, tmp_path):
    for number, text in enumerate(escapes(tmp_path / "file")):
        assert task(name).score(task(name).train[0], text) == 0
        assert not (tmp_path / "file").exists(), number


def test_right_and_wrong_answers_score_as_in_process(one):
    for entry in one.train + one.held_out:
        own = entry["answer"] or "nothing"
        for text in (own, own[:-1], own[::-1], own + "1"):
            if one.name == "countdown":
                text = normalize(text)
            expected = one._dataset.score_answer(text.strip(), entry)
            if text == own:
                assert expected == 1 or one.name in NO_ANSWER
            if text == own or scoring.admits(one.name, text.strip(), own):
                assert one.score(entry, text) == expected, text
            else:
                assert one.score(entry, text) == 0 <= expected < RIGHT
    assert not one.stopped


def test_hostile_text_is_harmless(one, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "CPU_SECONDS", 0.5)
    entry, started = one.train[0], time.perf_counter()
    texts = [*escapes(tmp_path / "file"), *BOMBS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        values = one.scores([entry] * len(texts), texts)
    assert list(tmp_path.iterdir()) == []
    assert time.perf_counter() - started < 60
    for text, value in zip(texts, values):
        assert 0 <= value < (RIGHT if one.name not in CALLS_EVERYTHING_RIGHT else 2), text[:80]
    one._scores.clear()
    right = entry["answer"] or ""
    assert one.score(entry, right) == one._dataset.score_answer(right, entry)


def test_stopped_answers_are_counted_said_and_remembered(monkeypatch):
    one, entry = Task("rubiks_cube", 2, 1), None
    entry = one.train[0]
    monkeypatch.setattr(scoring, "CPU_SECONDS", 0.3)
    with pytest.warns(RuntimeWarning, match=r"1 of 2 answers score 0 .* 1 after 5 CPU seconds; 1 since the start"):
        assert one.scores([entry] * 2, ["F9999999", "F"])[0] == 0
    assert one.stopped == {"cpu": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.score(entry, "F9999999") == 0  # the answer's own doing: known by now
    monkeypatch.setattr(scoring.worker, "_ask", lambda *_: ("died", 0.0, 0.0))
    monkeypatch.setattr(scoring.worker, "close", lambda: None)
    with pytest.warns(RuntimeWarning, match="killed, twice"):
        assert one.score(entry, "R") == 0
    monkeypatch.undo()
    assert one.score(entry, "R") > 0  # the machine's doing: scored again


def test_a_batch_has_a_budget(monkeypatch):
    one = Task("rubiks_cube", 2, 1)
    calls = []
    monkeypatch.setattr(scoring.worker, "score", lambda *a: calls.append(a) or scoring.Outcome(0.5, 50.0))
    with pytest.warns(RuntimeWarning, match="2 of 5 .* for the whole batch"):
        assert one.scores(one.train[:1] * 5, list("FRUBL")) == [0.5, 0.5, 0.5, 0, 0]
    assert one.scores(one.train[:1] * 2, list("BL")) == [0.5, 0.5]  # not remembered as 0
    assert len(calls) == 5


def test_long_text_reaches_no_scorer(monkeypatch):
    one, lengths = Task("chain_sum", 2, 1), []
    monkeypatch.setattr(scoring.worker, "score", lambda *a: lengths.append(len(a[2])) or scoring.Outcome(1.0, 0.0))
    longest = 4 * max(len(entry["answer"]) for entry in one.train + one.held_out) + 1024
    assert one.scores(one.train[:1] * 2, ["9" * longest, "9" * (longest + 1)]) == [1, 0]
    assert lengths == [longest]


def test_memory_of_scores_is_bounded(monkeypatch):
    monkeypatch.setattr(tasks, "REMEMBERED", 10)
    one = Task("gcd", 2, 1)
    one.scores(one.train[:1] * 100, [str(n) for n in range(100)])
    assert len(one._scores) <= 10


@pytest.mark.parametrize(
    ("name", "message"), [("composite", "scores by other data sets"), ("brand_new", "whose scorer is known")]
)
def test_refused_by_name(name, message):
    with pytest.raises(ValueError, match=rf"task: expected .*{message}|task: expected .*{name}.*{message}"):
        Task(name)


def test_every_data_set_of_reasoning_gym_is_judged():
    """A newer reasoning-gym fails here: read the new scorers, and those that evaluate text."""
    assert set(DATASETS) == scoring.KNOWN | set(scoring.REFUSED)
    evaluates = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval)\(")
    found = {n for n, (kind, _) in DATASETS.items() if evaluates.search(Path(inspect.getfile(kind)).read_text())}
    own_text = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting"}  # problems, never answers
    own_parser = {"propositional_logic"}
    assert found - own_text - own_parser == set(EVALUATE)


def test_without_process_limits(monkeypatch):
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scoring.worker, "score", None)
    for name in ("gcd", "countdown", "puzzle24", "string_insertion"):
        one = Task(name, 2, 1)
        assert one.score(one.train[0], one.train[0]["answer"]) == 1
        assert one.score(one.train[0], "__import__('os').getpid()") == 0
    with pytest.raises(ValueError, match=r"task: expected .* without process limits.*got 'rubiks_cube'; run on Linux"):
        Task("rubiks_cube", 2, 1)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("x**2/2 + 3.5*x**10 + C", True),
        ("-(1 - 9*x**2)**(3/2)/27 + E**(2*x) + E**x**2", True),
        ("X*asin(3*X) + sqrt(1 - 9*X**2)/3 + log(x, 2) + atan(x) + pi*cosh(x)", True),
        ("Integral(x, x)", False),
        ("x.diff(x)", False),
        ("(1).real", False),
        ("1..real", False),
        ("9**9**9", False),
        ("9 ** (9** 9)", False),
        ("9**999", False),
        ("9" * 16, False),
        ("S(1)", False),
        ("N(x)", False),
        ("factorial(9)", False),
        ("9!", False),
        ("lambda x: x", False),
        ("__x__", False),
        ("'x'", False),
        ("x[0]", False),
        ("٣", False),
        ("x\n+1", False),
    ],
)
def test_algebra_admits(text, fine):
    assert scoring.admits("simple_integration", text, "x**2 + C") is fine
    assert scoring.admits("polynomial_multiplication", text, "x**2") is fine


def test_integral_is_admitted_where_the_own_answer_has_it():
    assert scoring.admits("intermediate_integration", "Integral(x*exp(x), x) + C", "Integral(2*x, x) + C")


def test_filters_are_linear():
    for name in scoring._FILTERS:
        started = time.process_time()
        for text in ("1" * 10**4 + "!", "a" * 10**4 + "!", "**" * 10**4, "(" * 10**4, "1 " * 10**4 + "!"):
            scoring.admits(name, text, "x")
        assert time.process_time() - started < 1


PIECES = st.lists(st.sampled_from(["<answer>", "</answer>", "<", "a", " ", "\n", "/answer>"]), max_size=30)


@settings(deadline=None, max_examples=100)
@given(PIECES.map("".join))
def test_tagged_answer_is_that_of_reasoning_gym(text):
    assert tagged_answer(text) == (extract_answer(text) or "")


def test_tagged_answer_is_linear():
    started = time.process_time()
    assert tagged_answer("<answer>" * 200_000) == ""
    assert time.process_time() - started < 1


def test_a_data_set_without_solutions_says_so():
    with pytest.raises(ValueError, match="solutions to imitate, got 'boxnet'"):
        task("boxnet").solution(task("boxnet").train[0], random.Random(0))


def broken_promises(source: str) -> list[str]:
    """What SECURITY.md says that the package does not do."""
    code = re.sub(r"weights_only=True", "", re.sub(r"torch\.load\([^\n]*weights_only=True", "", source))
    return re.findall(r"torch\.load\(|pickle\.loads?\(|trust_remote_code|weights_only|(?<![\w.])(?:eval|exec)\(", code)


def test_promises_of_security_md_hold():
    files = [p for folder in ("lad_kernels", "integration") for p in (ROOT / folder).rglob("*.py")]
    broken = {p.name: found for p in files if (found := broken_promises(p.read_text()))}
    assert set(broken) <= {"scoring_worker.py"}  # what its trainer sends
    assert broken["scoring_worker.py"] == ["pickle.loads(", "pickle.load("]


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(f)", "trust_remote_code=True", "eval(x)"],
)
def test_promises_can_be_broken(source):
    assert broken_promises(source)
