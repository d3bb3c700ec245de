"""How a pretrained model is asked and read, by both trainers, and what they say when it earns nothing."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: forms of prompts")
pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: forms of prompts")

from integration import policy, prompts, trainer
from integration.policy import build_policy
from integration.prompts import EqualRewards, Form, form_of
from integration.tasks import Task, build_task
from integration.train_config import TrainConfig
from lad_kernels.preflight import Refused

DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator; lost: what a CPU gets")


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("chain_sum", 30, 4, options=DIGITS)


def test_few_shot_prompts_have_other_problems_with_their_answers(task):
    form = Form("few_shot", 2, "first_line")
    first, second, third = task.train[:3]

    def line(entry, *answer) -> str:
        return " ".join([*entry["question"].split(), *answer])

    for entry, shots in (
        (task.held_out[0], (first, second)),
        (third, (first, second)),
        (first, (second, third)),
        (second, (first, third)),
    ):
        lines = [*(line(shot, shot["answer"]) for shot in shots), line(entry)]
        assert form.ask(task, entry, None) == "\n".join(lines)
    one = Form("few_shot", 1, "first_line").ask(task, first, None)
    assert one == f"{line(second, second['answer'])}\n{line(first)}"


def test_few_shots_need_solutions():
    task = Task("countdown", 20, 2)
    lines = Form("few_shot", 3, "first_line").ask(task, task.held_out[0], None).split("\n")
    assert len(lines) == 4
    assert lines[-1] == task.prompt(task.held_out[0])
    for text, entry in zip(lines[:-1], task.train):
        assert task.score(entry, text.removeprefix(task.prompt(entry))) == 1
    task.train[0]["answer"] = None
    with pytest.raises(ValueError, match="expected a data set with solutions"):
        Form("few_shot", 3, "first_line").ask(task, task.held_out[0], None)


def test_plain_and_chat_prompts(task):
    entry, chat = task.train[0], SimpleNamespace(chat_template="a template", apply_chat_template=lambda *_, **__: "")
    assert Form("plain", 2, "whole").ask(task, entry, chat) == task.prompt(entry)
    system, user = Form("chat", 2, "tag").ask(task, entry, chat)
    assert "<answer>" in system["content"]
    assert user == {"role": "user", "content": entry["question"]}
    system, _ = Form("chat", 2, "first_line").ask(task, entry, chat)
    assert system == {"role": "system", "content": prompts.DIRECT}


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("tag", "I say <answer> 7 </answer>", "7"),
        ("tag", " 7\n", ""),
        ("first_line", "\n 7 \n3 + 4 = 8", "7"),
        ("first_line", "", ""),
        ("whole", " 7\n8", " 7\n8"),
    ],
)
def test_answers_are_read(answer, text, expected):
    assert Form("chat", 2, answer).read(text) == expected


@pytest.mark.parametrize(
    ("given", "pretrained", "expected"),
    [
        ({}, True, ("chat", "tag")),
        ({}, False, ("plain", "whole")),
        ({"prompt": "few_shot"}, True, ("few_shot", "first_line")),
        ({"prompt": "plain"}, True, ("plain", "whole")),
        ({"prompt": "few_shot", "answer": "whole"}, True, ("few_shot", "whole")),
        ({"answer": "first_line"}, True, ("chat", "first_line")),
    ],
)
def test_defaults_follow_the_model_and_the_prompt(given, pretrained, expected):
    form = form_of(TrainConfig(**given), pretrained)
    assert (form.prompt, form.answer) == expected


def test_the_learning_rate_follows_the_model():
    assert TrainConfig().learning_rate == 3e-4
    assert TrainConfig(model="any").learning_rate == 4e-6
    assert TrainConfig(model="any", learning_rate=1e-5).learning_rate == 1e-5
    with pytest.raises(Refused, match="leave it out for 4e-06"):
        TrainConfig(model="any", learning_rate=-1.0)


def test_options_reach_the_data_set_or_are_refused():
    config = TrainConfig(task="chain_sum", train_size=6, held_out_size=2, task_options=DIGITS)
    assert all(len(entry["metadata"]["expression"].split()) == 3 for entry in build_task(config).train)
    assert build_task(config, 5).train != build_task(config).train
    for options, words in (({"min_termz": 1}, "unexpected keyword"), ({"min_terms": 9, "max_terms": 2}, "max_terms")):
        with pytest.raises(Refused, match=f"^task_options: expected options of 'chain_sum', got .*{words}"):
            build_task(replace(config, task_options=options))
    with pytest.raises(Refused, match=r"^task: expected problems to train on"):
        build_task(SimpleNamespace(task="none", train_size=1, held_out_size=1, task_options=None))


def test_rewards_that_are_all_equal_are_reported_once(caplog):
    watch = EqualRewards()
    for step in range(5):
        watch.see([0.0, 0.0], [f"first {step}", "a\nsecond"])
        assert len(caplog.records) == (step >= 2)
    assert caplog.records[0].levelno == logging.WARNING
    assert "first 3 steps has reward 0: nothing can be learnt" in caplog.text
    assert "\n  'first 2'\n  'a\\nsecond'" in caplog.text
    caplog.clear()
    for rewards in ([[0, 0], [0, 1]], [[1, 1]] * 2, [[0, 0], [0.01, 0.01]], [[0.01, 0]]):
        watch = EqualRewards()
        for step in [*rewards, [0, 0], [0, 0], [0, 0]]:
            watch.see(step, ["", ""])
        assert not caplog.records, rewards
    watch = EqualRewards(done=1)  # a resumed run
    for _ in range(4):
        watch.see([0, 0], ["", ""])
    assert not caplog.records


@pytest.fixture
def model(tmp_path) -> str:
    """A pretrained model that never writes a tag."""
    made = build_policy(None, "cpu", pretrained=False, hidden_size=16, layers=1)
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_trainer_asks_in_the_form_and_warns(model, tmp_path, task, caplog, capsys):
    flags = [f"--model={model}", f"--out={tmp_path / 'run'}", "--task=chain_sum", "--train-size=12", "--steps=3"]
    flags += ["--held-out-size=2", "--prompts-per-step=2", "--group-size=2", "--prompt=plain", "--answer=tag"]
    flags += ["--max-new-tokens=3", '--task-options={"min_terms": 2, "max_terms": 2}']
    assert trainer.main(flags) == 0
    assert "every completion of the first 3 steps has reward 0" in caplog.text
    precision = "bf16 autocast, float32 weights" if policy.fast_bf16() else "float32"
    assert f"{precision}; prompt plain, answer tag, learning rate 4e-06" in " ".join(capsys.readouterr().out.split())


def test_the_trl_example_asks_in_the_form_and_warns(model, tmp_path, caplog):
    pytest.importorskip("trl", reason="needs the trl extra: trl; lost: forms of prompts in the TRL example")
    from integration import train_trl

    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_generations": 2, "max_steps": 3}
    sizes |= {"max_completion_length": 2, "report_to": "none", "train_size": 12, "held_out_size": 2, "shots": 1}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--task=chain_sum", "--prompt=few_shot", "--answer=tag", f"--task_options={json.dumps(DIGITS)}"]
    done = train_trl.main([f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'trl'}", *flags])
    assert all(len(re.findall(r": -?\d [+-] -?\d =", p)) == 2 for p in done.train_dataset["prompt"])
    assert "every completion of the first 3 steps has reward 0" in caplog.text
    assert done.args.learning_rate == 4e-6


@NO_ACCELERATOR
@pytest.mark.parametrize(("found", "fast"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, False), ({}, False)])
def test_a_cpu_that_is_fast_in_bf16_trains_a_pretrained_model_in_it(model, monkeypatch, found, fast, task):
    from integration import train_trl

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **found}, raising=False)
    assert policy.fast_bf16() == fast
    assert train_trl.cpu_options() == {"use_cpu": True, "bf16": fast}
    assert isinstance(build_policy(None, "cpu", pretrained=False).autocast(), nullcontext)
    pretrained = build_policy(model, "cpu", pretrained=True)
    with pretrained.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    config = TrainConfig(model=model, prompt="plain", max_new_tokens=3, prompts_per_step=2, group_size=2)
    run = trainer.rollout(pretrained, task, task.train[:2], 2, config, torch.Generator().manual_seed(0))
    run = run._replace(scores=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    before = [p.detach().clone() for p in pretrained.model.parameters()]
    metrics = trainer.update(pretrained, torch.optim.AdamW(pretrained.model.parameters()), run, config)
    assert metrics["grad_norm"] > 0
    assert all(p.dtype == torch.float32 for p in pretrained.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, pretrained.model.parameters()))
