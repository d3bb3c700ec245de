r"""Train a causal language model with LAD on reasoning-gym problems, by TRL.

    python -m integration.train_trl                        # a small model from scratch, a minute of one CPU core
    python -m integration.train_trl --config my.yaml --eta 0.5
    accelerate launch --config_file fsdp2.yaml -m integration.train_trl --model_name_or_path Qwen/Qwen3-0.6B \
        --task chain_sum --max_completion_length 512 --output_dir runs/qwen --report_to trackio

Every option of `LADConfig`, and so of `trl.GRPOConfig` and `transformers.TrainingArguments`, is a flag or a key of the
YAML file; so are those of `trl.ModelConfig` (dtype, LoRA, quantisation). Without a model a small decoder is built, with
its tokenizer, and taught the answer's format by a few supervised steps; the defaults in SMALL are for that model. The
defaults of a pretrained model are TRL's, but for a learning rate of 4e-6; without an accelerator it runs on the CPU, in
bf16 where that is fast.
"""

# /// script
# dependencies = ["lad_kernels[trl]"]
# ///

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: makes `integration` importable, and files next to this one shadow no package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from integration.train_config import PRETRAINED_RATE

SMALL = {
    "output_dir": "runs/trl",
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 5,
    "max_completion_length": 12,
    "max_steps": 150,
    "num_generations": 8,
    "per_device_eval_batch_size": 200,
    "per_device_train_batch_size": 128,
    "report_to": "none",
    "save_strategy": "no",
}
WRITTEN = ("start", "*.safetensors", "checkpoint-*")  # by which a run's folder is recognised


@dataclass
class TaskArguments:
    """Which problems to train on."""

    task: str = field(default="countdown", metadata={"help": "A reasoning-gym dataset."})
    train_size: int = field(default=3000, metadata={"help": "Problems generated for training."})
    held_out_size: int = field(default=200, metadata={"help": "Problems generated for evaluation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in `output_dir`."})
    task_options: str | None = field(default=None, metadata={"help": "Options of the dataset, as JSON."})
    prompt: str | None = field(
        default=None, metadata={"help": "chat, plain or few_shot; none: chat, or plain for the small decoder."}
    )
    shots: int = field(default=2, metadata={"help": "Solved problems in a few-shot prompt."})
    answer: str | None = field(
        default=None,
        metadata={"help": "tag, first_line or whole; none: tag for chat, first_line for few_shot, whole for plain."},
    )
    warm_steps: int = field(default=150, metadata={"help": "Supervised steps of the small decoder before LAD."})


def cpu_options() -> dict[str, bool]:
    """What transformers wants to be told where there is no accelerator: to use the CPU, in bf16 if that is fast."""
    import torch

    from integration.policy import fast_bf16

    return {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": fast_bf16()}


def parse(arguments: list[str] | None) -> tuple[TaskArguments, Any, Any]:
    """Flags and YAML; defaults are those of the small decoder, or of a pretrained model where one is named."""
    from trl import ModelConfig, TrlParser

    from lad_kernels.frameworks.trl import LADConfig

    for defaults in (SMALL, {"learning_rate": PRETRAINED_RATE, **cpu_options()}):
        parser = TrlParser((TaskArguments, LADConfig, ModelConfig))
        parser.set_defaults_with_config(**defaults)
        given = parser.parse_args_and_config(arguments)
        if given[-1].model_name_or_path is None:
            break
    return given


def build_small_model(folder: Path, task: Any, config: Any) -> None:
    """Save a small decoder that imitates generated solutions, and its tokenizer, in `folder`."""
    from integration.policy import build_policy
    from integration.trainer import warm_start

    policy = build_policy(None, "cpu", pretrained=False, seed=config.seed)
    warm_start(policy, task, config)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def settle(chosen: TaskArguments, args: Any, model: str | None) -> Any:
    """The trainer's configuration of task and warm start; refuses impossible options and folders with another run."""
    from integration.train_config import TrainConfig, check_task
    from lad_kernels.preflight import Refused, claim_folder

    group, batch = args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size * args.world_size
    if batch % group:
        raise Refused(
            f"per_device_eval_batch_size: expected a multiple of {group} completions over all ranks, got {batch}; take "
            f"{args.per_device_eval_batch_size * group} a rank"
        )
    try:
        options = json.loads(chosen.task_options or "null")
    except ValueError as error:
        raise Refused(f"task_options: expected JSON, got {chosen.task_options!r} ({error}); quote it") from error
    config = TrainConfig(model=model, seed=args.seed, **vars(chosen) | {"task_options": options})
    check_task(config.task)
    if args.process_index == 0:
        former = [p.name for mark in WRITTEN for p in Path(args.output_dir).glob(mark)]
        if former and not (args.resume_from_checkpoint or chosen.overwrite):
            raise Refused(
                f"output_dir: expected a folder without a run, got {args.output_dir!r}, which holds {former[0]}; name "
                f"another, or give --overwrite true to replace it, --resume_from_checkpoint true to go on with it"
            )
        claim_folder(args.output_dir, used=True, flag="output_dir")
    return config


def main(arguments: list[str] | None = None) -> Any:
    """Parse flags and YAML, train, save; returns the trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from integration.prompts import EqualRewards, form_of
    from integration.tasks import build_task
    from lad_kernels.frameworks.trl import LADTrainer
    from lad_kernels.pretrained import model_folder

    chosen, args, model_args = parse(arguments)
    small = model_args.model_name_or_path is None
    path = None if small else model_folder(model_args.model_name_or_path, flag="model_name_or_path")
    config = settle(chosen, args, path)
    task, form, rewards = build_task(config, args.seed), form_of(config, not small), EqualRewards()
    path = path or str(Path(args.output_dir) / "start")
    with args.main_process_first():
        if small and args.process_index == 0:
            build_small_model(Path(path), task, config)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", revision=model_args.model_revision)

    def dataset(entries: list[dict]) -> Dataset:
        rows = [{"prompt": form.ask(task, entry, tokenizer), "number": i} for i, entry in enumerate(entries)]
        return Dataset.from_list(rows)

    def score(completions: list[Any], number: list[int], trainer_state: Any, **_: Any) -> list[float]:
        """The dataset's own score of each completion: text, or the messages that answer messages."""
        entries = task.train if trainer.model.training else task.held_out
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        scores = task.scores([entries[i] for i in number], list(map(form.read, texts)))
        if trainer.model.training:
            rewards.see(scores, texts)
        return scores

    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = LADTrainer(
        model=path,
        reward_funcs=score,
        args=args,
        train_dataset=dataset(task.train),
        eval_dataset=dataset(task.held_out),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.log_metrics("eval", trainer.evaluate())
    return trainer


if __name__ == "__main__":
    from lad_kernels.preflight import Refused, complain

    try:
        main()
    except Refused as error:
        raise SystemExit(complain("integration.train_trl", f"--{error}", 2)) from error
