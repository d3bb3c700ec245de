"""Wrong flags: one line on stderr with flag, value and cure, status 2, no traceback, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: wrong flags of the programs")
pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: wrong flags of the programs")
pytest.importorskip("jsonargparse", reason="needs the train extra: jsonargparse; lost: wrong flags of the programs")

from integration import demo, train_trl, trainer
from integration.train_config import TrainConfig
from lad_kernels import cli
from lad_kernels.preflight import Refused

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without CUDA; lost: three lines")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to run in: a file, a damaged model, a folder without a model."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    Path("nothing").mkdir()
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 64, "hidden_size": 32}))
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder: Path, capsys, run, program: str, flags: str, *words: str) -> None:
    """The program ends with status 2 and one line with these words, and leaves the folder as it was."""
    before = listing(folder)
    try:
        status = run(flags.split())
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2, said
    assert said.err.startswith(f"{program}: error: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert all(word in said.err for word in words), said.err
    assert "Traceback" not in said.err + said.out
    assert said.out == ""
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model ./ghost", ("--model: ", "'./ghost'", "does not exist; check it")),
        ("--model nothing", ("--model: ", "'nothing'", "check the path")),
        ("--model /ghost --device cpu", ("--model: ", "'/ghost'", "check it")),
        ("--resume ghost", ("--resume: ", "'ghost'", "name the folder of a run")),
        ("--resume nothing", ("--resume: ", "'nothing'", "start again")),
        ("--task countdwn", ("--task: ", "'countdwn'", "did you mean 'countdown'?")),
        ("--device gpu", ("--device: ", "'gpu'", "cpu")),
        ("--device meta", ("--device: ", "'meta'", "cpu")),
        ("--device cuda:99", ("--device: ", "'cuda:99'", "cpu")),
        ("--warm-steps 0", ("--warm_steps: ", "got 0", "warm it up, or give --model")),
        ("--warm-steps -1", ("--warm_steps: ", "got -1")),
        ("--held-out-size 0", ("--held_out_size: ", "got 0", "give 1 or more")),
        ("--train-size 0", ("--train_size: ", "got 0", "give 1 or more")),
        ("--learning-rate=-1e-4", ("--learning_rate: ", "got -0.0001", "leave it out for 0.0003")),
        ("--learning-rate 0", ("--learning_rate: ", "got 0")),
        ("--learning-rate -0.5", ("--learning_rate: ", "got -0.5")),
        ("--learning-rate nan", ("learning_rate", "nan")),
        ("--warm-learning-rate -1", ("--warm_learning_rate: ", "got -1")),
        ("--max-grad-norm 0", ("--max_grad_norm: ", "got 0")),
        ("--learning-rate-warmup -1", ("--learning_rate_warmup: ", "got -1", "give 0 or more")),
        ("--steps 0", ("--steps: ", "got 0", "give 1 or more")),
        ("--steps -5", ("--steps: ", "got -5", "give 1 or more")),
        ("--save-every -1", ("--save_every: ", "got -1")),
        ("--max-new-tokens -1", ("--max_new_tokens: ", "got -1")),
        ("--group-size 1", ("--group_size: ", "got 1", "at least 2")),
        ("--updates-per-rollout 3", ("--updates_per_rollout: ", "divisor of the 128", "got 3", "take 1")),
        ("--updates-per-rollout 48", ("--updates_per_rollout: ", "got 48", "take 16")),
        ("--hidden-size 36", ("--hidden_size: ", "got 36", "take 32")),
        ("--layers 0", ("--layers: ", "got 0")),
        ("--out file", ("--out: ", "'file'", "name another")),
        ("--out file/run", ("--out: ", "'file/run'", "name another")),
        ("--out /proc/run", ("--out: ", "'/proc/run'", "name another")),
        ("--out model", ("--out: ", "'model'", "config.json", "--resume model", "--overwrite")),
        ("--steps many", ("steps", "many", "--help")),
        ("--prompt few-shot", ("--prompt: ", "'chat' or 'plain' or 'few_shot'", "got 'few-shot'")),
        ("--answer last", ("--answer: ", "'tag' or 'first_line' or 'whole'", "got 'last'")),
        ("--shots 0", ("--shots: ", "got 0", "give 1 or more")),
        ("--task-options [1]", ("task_options", "--help")),
        ("--stepz 1", ("--stepz", "--help")),
        ("--steps", ("--steps", "--help")),
        ("--config ghost.yaml", ("ghost.yaml", "--help")),
    ],
)
def test_training(folder, capsys, flags, words):
    refused(folder, capsys, trainer.main, "lad-kernels train", flags, *words)


@NO_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:9", "xpu"])
def test_a_device_that_is_not_here(folder, capsys, device):
    words = ("--device: ", f"got '{device}'", "expected cpu")
    refused(folder, capsys, trainer.main, "lad-kernels train", f"--device {device}", *words)


def test_the_command_line_passes_the_status_on(folder, capfd):
    assert cli.main(["train", "--task", "ghost"]) == 2
    assert "--task: " in capfd.readouterr().err


def test_a_model_that_does_not_load(folder, capsys):
    """Its configuration is there, its tokenizer and weights are not."""
    assert trainer.main(["--model", "model", "--out", "run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--model: expected a causal language model to train, got 'model'" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model ./ghost --prompts file", ("--model: ", "'./ghost'")),
        ("--model model --prompts file", ("--model: ", "expected a causal language model", "'model'")),
        ("--prompts file --model=null", ("--model: ", "got none", "name the policy")),
        ("--model model", ("--ids: ", "got neither")),
        ("--model model --ids file --prompts file", ("--ids: ", "got both")),
        ("--model model --ids ghost.pt", ("--ids: ", "'ghost.pt'", "check the path")),
        ("--model model --prompts ghost.txt", ("--prompts: ", "'ghost.txt'", "check the path")),
        ("--model model --prompts file --device cuda:99", ("--device: ", "'cuda:99'")),
        ("--model model --prompts file --completions 0", ("--completions: ", "got 0", "give 1 or more")),
        ("--model model --prompts file --max-new-tokens 0", ("--max_new_tokens: ", "got 0")),
        ("--model model --prompts file --temperature 0", ("--temperature: ", "got 0")),
        ("--model model --prompts file --tail-mass -1", ("--tail_mass: ", "got -1")),
        ("--model model --prompts file --out file/plot.png", ("--out: ", "'file'", "name another")),
    ],
)
def test_profile(folder, capsys, flags, words):
    refused(folder, capsys, cli.main, "lad-kernels profile", f"profile {flags}", *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task ghost", ("--task: ", "'ghost'")),
        ("--device cuda:99", ("--device: ", "'cuda:99'")),
        ("--steps 0", ("--steps: ", "got 0")),
        ("--seeds 0", ("--seeds: ", "got 0", "give 1 or more")),
        ("--seconds 0", ("--seconds: ", "got 0", "400 is the default")),
        ("--seconds nan", ("--seconds: ", "got nan", "400 is the default")),
        ("--model ./ghost", ("--model: ", "'./ghost'")),
        ("--tiny --out model", ("--out: ", "'model'", "config.json", "name another folder")),
    ],
)
def test_demo(folder, capsys, flags, words):
    refused(folder, capsys, demo.main, "integration.demo", flags, *words)


def test_the_trl_example_replaces_no_former_run(folder):
    pytest.importorskip("trl", reason="needs the trl extra: trl; lost: wrong flags of the TRL example")
    Path("model/model.safetensors").write_text("weights")
    for flags, words in (
        ("--output_dir model", r"output_dir: .* got 'model', which holds model\.safetensors; .*--overwrite true"),
        ("--output_dir new --task ghost", "task: .* got 'ghost'; did you mean"),
        ("--output_dir file", "output_dir: .* got 'file' .*; name another"),
        ("--output_dir new --task_options {", "task_options: expected JSON, got '{'"),
        ("--output_dir new --prompt few", "prompt: expected 'chat' or 'plain' or 'few_shot', got 'few'"),
        ("--output_dir new --warm_steps 0", "warm_steps: expected at least 1, got 0"),
    ):
        before = listing(folder)
        with pytest.raises((Refused, ValueError), match=f"^{words}"):
            train_trl.main([*flags.split(), "--use_cpu", "--per_device_eval_batch_size", "8"])
        assert listing(folder) == before


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_any_number_of_warm_up_steps_trains(steps):
    """torch's one-cycle schedule divides by zero at 10 steps when a tenth of them ramp up."""
    from integration.state import load_policy
    from integration.tasks import Task

    config = TrainConfig(warm_steps=steps, warm_batch=2, hidden_size=8, layers=1)
    policy = load_policy(config)
    losses = trainer.warm_start(policy, Task("countdown", 20, 2), config)
    assert len(losses) == steps
    assert all(p.grad is None for p in policy.model.parameters())  # none is left for the first step of what follows
    assert all(torch.isfinite(torch.tensor(losses)))
