"""`python -m lad_kernels.frameworks.trl` from a YAML file: PEFT, streamed data, the trackers' files read back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed; its script with LAD goes untested")
pytest.importorskip("peft", reason="no peft; lost: the script with an adapter")

import run_logs
import trl
import yaml
from pages import ROOT
from trl_cases import ON_CPU, save_model

from lad_kernels.frameworks.trl_options import LADConfig, trl_has_fused_head

pytestmark = [
    ON_CPU,
    pytest.mark.skipif(not trl_has_fused_head, reason="TRL 1.14's script has other parts; lost: ours"),
]
CONFIG = """
model_name_or_path: {model}
dataset_name: {data}
dataset_streaming: true
reward_funcs: [rewards.digits]
eta: 0.5
divergence: hd
epsilon_high: 0.28
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
output_dir: {out}
report_to: {tracker}
push_to_hub: false
use_cpu: true
bf16: false
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 6
max_steps: 2
logging_steps: 1
save_strategy: "no"
gradient_checkpointing: false
disable_tqdm: true
"""


def run(tmp_path: Path, config: str, *flags: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess:
    (tmp_path / "lad.yaml").write_text(config)
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, **_):\n    return [float(sum(c in '2468' for c in text)) for text in completions]\n"
    )
    (tmp_path / "data").mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": f"{i}+{i * i}="}) for i in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    command = [sys.executable, *launcher, "-m", "lad_kernels.frameworks.trl", "--config", "lad.yaml", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("tracker", "package"), [("tensorboard", "tensorboardX"), ("wandb",) * 2, ("trackio",) * 2])
def test_a_run_from_a_file(tracker, package, tmp_path):
    pytest.importorskip(
        package, reason=f"no {package} (`make test-trl-script`); lost: reading back what a run logs there"
    )
    out = tmp_path / "run"
    config = CONFIG.format(model=save_model(tmp_path / "model"), data=tmp_path / "data", out=out, tracker=tracker)
    done = run(tmp_path, config, "--eta", "0.25")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "adapter_model.safetensors").exists()
    logged = getattr(run_logs, tracker)(tmp_path)
    names = {tag.removeprefix("train/") for tag in logged}
    assert {"loss", "reward", "lad/loss_above_start", "lad/clip_share", "entropy"} <= names
    assert len(logged["train/loss"]) == 2
    printed = re.findall(r"'loss': '?([-+.e\d]+)", done.stdout)
    assert logged["train/loss"] == pytest.approx([float(x) for x in printed], rel=1e-3)  # four digits are printed
    assert "0.28" in done.stdout + done.stderr  # the bound in effect is said when the trainer is built


@pytest.mark.parametrize(
    ("line", "message"),
    [("etta: 0.5", "etta"), ("divergence: jss", r"divergence: expected one of .*did you mean 'js'")],
)
def test_a_wrong_key_is_refused(line, message, tmp_path):
    """TRL's own script ignores keys of the file that it does not know."""
    config = CONFIG.format(model="nowhere", data=tmp_path, out=tmp_path, tracker="none").replace("divergence: hd", line)
    done = run(tmp_path, config)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-2000:]


RECIPES = [
    yaml.safe_load(x) for x in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/frameworks/trl.md").read_text(), re.S)
]
HUB, QLORA, VLLM, FSDP2 = range(4)
HERE = dict(
    use_cpu=True, bf16=False, report_to="none", max_steps=1, max_completion_length=6, gradient_checkpointing=False
)


def here(tmp_path: Path, *recipes: int) -> str:
    """Recipes, with a small model, a file of prompts and a reward of this folder in place of those of the Hub."""
    local = dict(model_name_or_path=save_model(tmp_path / "model"), dataset_name=str(tmp_path / "data"))
    local |= HERE | dict(reward_funcs=["rewards.digits"], output_dir=str(tmp_path / "out"))
    return yaml.safe_dump({k: v for i in recipes for k, v in RECIPES[i].items()} | local)


def test_the_pages_recipe_runs(tmp_path):
    done = run(tmp_path, here(tmp_path, HUB))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("recipe", "package"), [(QLORA, "bitsandbytes"), (VLLM, "vllm")])
def test_recipes_that_need_more_start(recipe, package, tmp_path):
    """Read without an unknown key; then the missing package is asked for, if it is missing. QLoRA runs on a CPU too."""
    if recipe == VLLM and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed; lost: nothing, the recipe needs a GPU to go on")
    done = run(tmp_path, here(tmp_path, HUB, recipe))
    if importlib.util.find_spec(package) is not None:
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
        return
    assert done.returncode != 0
    assert re.search(package, done.stderr.splitlines()[-1] + done.stderr[-500:], re.IGNORECASE), done.stderr[-2000:]


def test_recipes_have_the_keys_of_their_parsers(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    from trl.scripts import grpo

    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(RECIPES[FSDP2]))
    config = load_config_from_file(str(tmp_path / "fsdp2.yaml"))
    assert (config.num_processes, config.fsdp_config["fsdp_version"]) == (8, 2)
    kinds = (grpo.GRPOScriptArguments, LADConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    for recipes in ((HUB,), (HUB, QLORA), (HUB, VLLM)):
        (tmp_path / "lad.yaml").write_text(here(tmp_path, *recipes))
        _, args, model, _ = trl.TrlParser(kinds).parse_args_and_config(["--config", str(tmp_path / "lad.yaml")])
        assert args.eta == 0.25
        assert model.load_in_4bit == (QLORA in recipes)
        assert args.use_vllm == (VLLM in recipes)


def test_two_processes_by_accelerates_file(tmp_path):
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(RECIPES[FSDP2] | dict(mixed_precision="no")))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp2.yaml", "--num_processes", "2"]
    done = run(tmp_path, here(tmp_path, HUB), launcher=[*launcher, "--cpu", "--main_process_port", "0"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
