"""One entry to the programs of this repository.

    lad-kernels doctor                              # versions, devices, and the path that typical shapes take
    lad-kernels train --algorithm lad --steps 100   # LAD or GRPO on verifiable problems, one process
    lad-kernels profile --model PATH_OR_ID          # how sparse a policy's logit gradient is
    lad-kernels bench --one-thread                  # the benchmarks of a checkout

`--config FILE.yaml` stands for the flags that the file names; flags after it win; `--print-config` prints such a file.
Both fill a dataclass, `TrainConfig`, `ProfileConfig` or `doctor.Asked`; the flags of `bench` are pytest's. Training on
several GPUs goes through TRL: `accelerate launch -m integration.train_trl`. `python -m integration.cli` is the same
program.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@dataclass(frozen=True)
class ProfileConfig:
    """The flags of `lad-kernels profile`.

    Attributes:
        model: path or hub id; none takes the trainer's small decoder after a warm start
        ids: token ids [B, T + 1], a tensor written by torch.save; none samples
        task: a reasoning-gym dataset to sample completions for
        prompts: problems, 8 completions each
        device: cuda if there is one, else cpu
        warm_steps: supervised steps of the small decoder
        out: where the plot goes
    """

    model: str | None = None
    ids: Path | None = None
    task: str = "countdown"
    prompts: int = 16
    tail_mass: float = 3e-4
    temperature: float = 1.0
    device: str | None = None
    seed: int = 0
    warm_steps: int = 150
    out: Path = Path("sparsity.png")

    def __post_init__(self) -> None:
        for name in ("prompts", "warm_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}; give 1 or more")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a finite number > 0, got {self.temperature}; 1 leaves logits alone"
            )
        if not 0 <= self.tail_mass < float("inf"):
            raise ValueError(f"tail_mass: expected a finite number >= 0, got {self.tail_mass}; 3e-4 is the default")


def train(arguments: list[str]) -> int:
    from integration import trainer

    return trainer.main(arguments)


def bench(arguments: list[str]) -> int:
    text = (
        "Runs `pytest benchmarks` of this checkout; further flags are pytest's, and @FILE holds them, one a line.\n"
        "Those that matter:\n  --bench-set tiny | small | full | sweep | gpu   --one-thread   --save   -k EXPRESSION"
    )
    parser = argparse.ArgumentParser(
        "lad-kernels bench",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", action="store_true", help="benchmarks/gpu.sh: everything for one CUDA device")
    given, rest = parser.parse_known_args(arguments)
    if not BENCHMARKS.is_dir():
        raise SystemExit(
            f"bench: expected a checkout with {BENCHMARKS}, got an installed package, which has no benchmarks; clone "
            f"the repository and run `pip install -e '.[bench]'` there"
        )
    command = ["bash", str(BENCHMARKS / "gpu.sh")] if given.gpu else [sys.executable, "-m", "pytest", "benchmarks"]
    return subprocess.call([*command, *rest], cwd=BENCHMARKS.parent)


def profile(arguments: list[str]) -> int:
    from integration.flags import parse_flags

    text = "What tail_mass would keep of a policy's logit gradient, by entropy: a table and a plot."
    asked = parse_flags(ProfileConfig, arguments, "lad-kernels profile", text)
    import torch

    from integration.runs import Refused, claim_folder, complain
    from integration.train_config import TrainConfig, check_machine
    from integration.trainer import load_policy
    from lad_kernels import profile_sparsity

    config = TrainConfig(
        task=asked.task, model=asked.model, device=asked.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seed=asked.seed, temperature=asked.temperature, warm_steps=asked.warm_steps, prompts_per_step=asked.prompts,
    )  # fmt: skip
    try:
        check_machine(config)
        if asked.ids is not None and not asked.ids.is_file():
            raise Refused(f"ids: expected a file written by torch.save, got {str(asked.ids)!r}; check the path")
        claim_folder(str(asked.out.parent), used=True)
        policy = load_policy(config)
    except Refused as error:
        return complain("lad-kernels profile", f"--{error}", 2)
    if policy.set_aside:
        print(f"sampling from the distribution that is trained: the model's own {policy.set_aside} set aside")
    if asked.ids is not None:
        ids = torch.load(asked.ids, weights_only=True).to(policy.device)  # [B, T + 1]
        given = {"model_or_hidden": policy.model, "input_ids": ids}
    else:
        given = own_samples(policy, config)
    with policy.autocast():
        found = profile_sparsity(**given, temperature=asked.temperature, tail_mass=asked.tail_mass)
    print(found)
    print(f"written: {found.save_png(asked.out)}")
    return 0


def own_samples(policy, config) -> dict:
    """Arguments of `profile_sparsity` for completions that the policy samples itself, advantages as coefficients."""
    import torch

    from integration.policy import pack, through_head
    from integration.tasks import Task
    from integration.trainer import rollout, warm_start
    from lad_kernels import group_advantages

    task = Task(config.task, max(500, config.prompts_per_step), 10)
    if config.model is None:
        warm_start(policy, task, config)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    run = rollout(policy, task, task.train[: config.prompts_per_step], config.group_size, config, generator)
    batch = pack(run.prompts, run.completions, policy.device)
    found = {}

    def keep(hidden, weight, **head):  # [N, D], [V, D]
        found.update(model_or_hidden=hidden, weight=weight, **head)
        return ()

    with torch.no_grad():
        through_head(policy, batch, keep)
    advantages = group_advantages(run.scores, group_size=config.group_size).to(policy.device)  # [B]
    return {
        "target_ids": batch.target_ids,
        "coefficients": advantages.repeat_interleave(batch.cu_seqlens.diff()),  # [N]
        "loss_mask": batch.loss_mask,
        **found,
    }


def doctor(arguments: list[str]) -> int:
    from integration import doctor
    from integration.flags import parse_flags

    text = "What is installed and works here. The exit status is 1 if something that has to work does not."
    names = {"type": Literal[doctor.PACKAGES], "nargs": "+", "default": [], "help": "packages that have to work"}
    return doctor.main(parse_flags(doctor.Asked, arguments, "lad-kernels doctor", text, special={"require": names}))


COMMANDS = {"train": train, "bench": bench, "profile": profile, "doctor": doctor}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "lad-kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="train | bench | profile | doctor")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="those of the command: lad-kernels COMMAND --help")
    given = parser.parse_args(arguments)
    try:
        return COMMANDS[given.command](given.flags)
    except ModuleNotFoundError as error:
        extra = "cli" if given.command == "doctor" else "train"
        raise SystemExit(
            f"lad-kernels {given.command} needs {error.name}: pip install 'lad_kernels[{extra}]'"
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
