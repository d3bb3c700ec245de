"""The configuration of a training run: flags, their allowed values, and checks of the machine."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from integration import checkpoint
from lad_kernels import LADConfig
from lad_kernels.preflight import Refused, check_device, check_model
from lad_kernels.pretrained import model_folder

CONFIG = "trainer_config.json"  # in a checkpoint
LEAST = {
    "train_size": 1, "held_out_size": 1, "steps": 1, "prompts_per_step": 1, "updates_per_rollout": 1,
    "micro_batch": 1, "max_new_tokens": 0, "learning_rate_warmup": 0, "warm_batch": 1, "layers": 1, "save_every": 0,
    "shots": 1,
}  # fmt: skip
POSITIVE = ("temperature", "learning_rate", "max_grad_norm", "warm_learning_rate")
CHOICES = {
    "algorithm": ("lad", "grpo"),
    "level": ("token", "sequence", "sequence_sum"),
    "prompt": ("chat", "plain", "few_shot", None),
    "answer": ("tag", "first_line", "whole", None),
}
RATE, PRETRAINED_RATE = 3e-4, 4e-6  # of the small decoder, of a pretrained model: 2e-5 took its entropy away


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; every field is a command-line flag.

    Raises:
        Refused, ValueError: a value that cannot be trained with; the message begins with its name.
    """

    algorithm: str = "lad"  # lad or grpo
    task: str = "countdown"  # any reasoning-gym dataset
    train_size: int = 3000  # problems generated for training
    held_out_size: int = 200  # problems generated for evaluation
    task_options: dict[str, Any] | None = None  # options of the dataset, as JSON; none takes ours, or its own defaults
    prompt: str | None = None  # chat, plain or few_shot; none: chat for a pretrained model, plain for the small decoder
    shots: int = 2  # solved problems in a few-shot prompt
    answer: str | None = None  # tag, first_line or whole; none: tag for chat, first_line for few_shot, whole for plain
    model: str | None = None  # path, hub id or known name (smollm2, gemma3-270m); none builds a small decoder
    device: str = "cpu"
    seed: int = 0  # of sampling and of the order of problems
    steps: int = 200  # rollouts
    prompts_per_step: int = 16
    group_size: int = 8  # completions per prompt
    updates_per_rollout: int = 2  # optimiser steps per rollout; from the second one on the ratio is not 1
    micro_batch: int = 128  # completions per forward and backward
    max_new_tokens: int = 0  # 0: as long as the longest training answer, or 512 where the answer is in a tag
    temperature: float = 1.0
    learning_rate: float | None = None  # none: 4e-6 for a pretrained model, 3e-4 for the small decoder
    learning_rate_warmup: int = 10  # steps; Adam's first steps are as long as later ones but estimated from far less
    max_grad_norm: float = 1.0
    divergence: str = "js"  # LAD
    eta: float = 0.25  # LAD
    level: str = "token"  # LAD: token, sequence or sequence_sum
    warm_steps: int = 150  # supervised steps of a small decoder before reinforcement learning
    warm_batch: int = 64
    warm_learning_rate: float = 3e-3
    hidden_size: int = 128  # small decoder
    layers: int = 2  # small decoder
    save_every: int = 25  # steps between checkpoints; 0: at the start and the end only
    out: str | None = None  # folder of the run; none makes a new one under runs/
    overwrite: bool = False  # replace the run in `out`
    resume: str | None = None  # folder of a run, or a checkpoint

    def __post_init__(self) -> None:
        usual = RATE if self.model is None else PRETRAINED_RATE
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", usual)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed if choice)
                raise Refused(f"{name}: expected {choices}, got {getattr(self, name)!r}; name one of them")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise Refused(f"{name}: expected at least {least}, got {getattr(self, name)!r}; give {least} or more")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise Refused(
                    f"{name}: expected a finite number > 0, got {getattr(self, name)!r}; leave it out for "
                    f"{type(self).__dataclass_fields__[name].default or usual:g}"
                )
        if self.group_size < 2:
            raise Refused(f"group_size: expected at least 2, got {self.group_size}; alone, an answer has no advantage")
        if self.model is None and self.warm_steps < 1:
            raise Refused(
                f"warm_steps: expected at least 1, got {self.warm_steps}; a small decoder with random weights finds no "
                f"right answer to learn from: warm it up, or give --model"
            )
        if self.model is None and (self.hidden_size < 8 or self.hidden_size % 8):
            raise Refused(
                f"hidden_size: expected a multiple of 8, for 4 heads of even size, got {self.hidden_size}; take "
                f"{max(8, self.hidden_size // 8 * 8)}"
            )
        rows = self.prompts_per_step * self.group_size
        if rows % self.updates_per_rollout:
            raise Refused(
                f"updates_per_rollout: expected a divisor of the {rows} completions of a step (prompts_per_step times "
                f"group_size), got {self.updates_per_rollout}; take {math.gcd(rows, self.updates_per_rollout)}"
            )
        LADConfig(self.divergence, eta=self.eta)  # refuses these two itself


def parse_config(arguments: list[str] | None = None, description: str | None = None) -> TrainConfig:
    """Flags are the fields of `TrainConfig`; with `--resume` the saved values are the defaults.

    A resumed run continues in its own folder, even if that was moved, unless `--out` names another.

    Raises:
        SystemExit: status 2, a wrong flag.
        Refused: nothing to resume from, or a damaged file.
    """
    from lad_kernels.flags import parse_flags

    bare = {"overwrite": {"action": "store_true", "help": "replace the run in `out`"}}
    parse = partial(parse_flags, TrainConfig, arguments, "lad-kernels train", description or __doc__, special=bare)
    given = parse()
    if given.resume is None:
        return given
    path = checkpoint.find(given.resume)
    checkpoint.verify(path, CONFIG)
    folder = checkpoint.run_folder(path)
    saved = json.loads((path / CONFIG).read_text())
    config = parse(defaults={**saved, "out": None if folder is None else str(folder)})
    if config.overwrite:
        raise Refused(
            "overwrite: expected it alone, got it together with --resume; a resumed run goes on in its folder"
        )
    return replace(config, resume=str(path))


def saved_fields(config: TrainConfig) -> dict:
    """The fields that a checkpoint keeps: all but `resume` and `overwrite`."""
    return {name: value for name, value in asdict(config).items() if name not in ("resume", "overwrite")}


def check_machine(config: TrainConfig) -> None:
    """Refuse an unknown device, task or model before anything is created."""
    check_device(config.device)
    check_task(config.task)
    if config.model is not None and config.resume is None:
        check_model(model_folder(config.model))


def check_task(task: str) -> None:
    """Raises Refused unless reasoning-gym has this dataset."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1, cutoff=0.0)
        raise Refused(f"task: expected a dataset of reasoning-gym, got {task!r}; did you mean {near[0]!r}?")
