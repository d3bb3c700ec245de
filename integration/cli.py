"""One entry to the programs of this repository.

    lad-kernels doctor                              # versions, devices, and the path that typical shapes take
    lad-kernels train --algorithm lad --steps 100   # LAD or GRPO on verifiable problems, one process
    lad-kernels profile --model PATH_OR_ID          # how sparse a policy's logit gradient is
    lad-kernels bench --one-thread                  # the benchmarks of a checkout

`--config FILE.yaml` stands for the flags that the file names; flags after it win. Training on several GPUs goes through
TRL: `accelerate launch -m integration.train_trl`. `python -m integration.cli` is the same program.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def expand_config(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the flags of the YAML mapping in FILE: keys are flag names, with _ or -."""
    found, rest = [], iter(arguments)
    for argument in rest:
        name, _, path = argument.partition("=")
        found += yaml_flags(path or next(rest, "")) if name == "--config" else [argument]
    return found


def yaml_flags(path: str) -> list[str]:
    """Flags of a YAML mapping: true is the bare flag, false and null are none, a list is several values."""
    import yaml

    if not Path(path).is_file():
        raise SystemExit(f"--config: expected a YAML file, got {path!r}, which does not exist")
    given = yaml.safe_load(Path(path).read_text()) or {}
    flat = isinstance(given, dict) and all(isinstance(k, str) and not isinstance(v, dict) for k, v in given.items())
    if not flat:
        raise SystemExit(f"--config: expected one flat mapping of flags to values in {path}, got {given!r}")
    flags = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is True:
            flags.append(flag)
        elif value not in (False, None):
            flags.append(f"{flag}={value}")
    return flags


def train(flags: argparse.Namespace, rest: list[str]) -> int:
    from integration import trainer

    trainer.main(rest)
    return 0


def bench(flags: argparse.Namespace, rest: list[str]) -> int:
    if not BENCHMARKS.is_dir():
        raise SystemExit(
            f"bench: expected a checkout with {BENCHMARKS}, got an installed package, which has no benchmarks; clone "
            f"the repository and run `pip install -e '.[bench]'` there"
        )
    command = ["bash", str(BENCHMARKS / "gpu.sh")] if flags.gpu else [sys.executable, "-m", "pytest", "benchmarks"]
    return subprocess.call([*command, *rest], cwd=BENCHMARKS.parent)


def profile(flags: argparse.Namespace, rest: list[str]) -> int:
    import torch

    from integration.trainer import TrainConfig, load_policy
    from lad_kernels import profile_sparsity

    config = TrainConfig(
        task=flags.task, model=flags.model, device=flags.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seed=flags.seed, temperature=flags.temperature, warm_steps=flags.warm_steps, prompts_per_step=flags.prompts,
    )  # fmt: skip
    policy = load_policy(config)
    if flags.ids is not None:
        ids = torch.load(flags.ids, weights_only=True).to(policy.device)  # [B, T + 1]
        given = {"model_or_hidden": policy.model, "input_ids": ids}
    else:
        given = own_samples(policy, config)
    with policy.autocast():
        found = profile_sparsity(**given, temperature=flags.temperature, tail_mass=flags.tail_mass)
    print(found)
    print(f"written: {found.save_png(flags.out)}")
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


def doctor(flags: argparse.Namespace, rest: list[str]) -> int:
    from integration import doctor

    given = {k: v for k, v in vars(flags).items() if k in doctor.Asked.__dataclass_fields__}
    return doctor.main(doctor.Asked(**given))


def make_parser() -> argparse.ArgumentParser:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("lad-kernels", description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | bench | profile | doctor")

    one = commands.add_parser("train", help="LAD or GRPO on verifiable problems", add_help=False, **raw)
    one.set_defaults(run=train)

    text = (
        "Runs `pytest benchmarks` of this checkout; further flags are pytest's. Those that matter:\n"
        "  --bench-set tiny | small | full | sweep | gpu   --one-thread   --save   -k EXPRESSION"
    )
    one = commands.add_parser("bench", help="the benchmarks of a checkout", description=text, **raw)
    one.add_argument("--gpu", action="store_true", help="benchmarks/gpu.sh: everything for one CUDA device")
    one.set_defaults(run=bench)

    text = "What tail_mass would keep of a policy's logit gradient, by entropy: a table and a plot."
    one = commands.add_parser("profile", help="how sparse a policy's logit gradient is", description=text, **raw)
    one.add_argument("--model", help="path or hub id; none takes the trainer's small decoder after a warm start")
    one.add_argument("--ids", type=Path, help="token ids [B, T + 1], a tensor written by torch.save; none samples")
    one.add_argument("--task", default="countdown", help="a reasoning-gym dataset to sample completions for")
    one.add_argument("--prompts", type=int, default=16, help="problems, 8 completions each")
    one.add_argument("--tail-mass", type=float, default=3e-4)
    one.add_argument("--temperature", type=float, default=1.0)
    one.add_argument("--device")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--warm-steps", type=int, default=150, help="supervised steps of the small decoder")
    one.add_argument("--out", type=Path, default=Path("sparsity.png"))
    one.set_defaults(run=profile)

    text = "What is installed and works here. The exit status is 1 if something that has to work does not."
    one = commands.add_parser("doctor", help="what is installed and works here", description=text, **raw)
    one.add_argument("--device", help="default: cuda if there is one, else cpu")
    one.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"))
    one.add_argument("--impl", default="auto", choices=("auto", "triton", "torch", "reference"))
    one.add_argument("--tokens", type=int, default=16_384, help="N")
    one.add_argument("--hidden-size", type=int, help="D")
    one.add_argument("--vocab-size", type=int, help="V")
    one.add_argument("--require", nargs="+", default=(), metavar="PACKAGE", help="packages that have to work")
    one.set_defaults(run=doctor)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = make_parser()
    flags, rest = parser.parse_known_args(expand_config(sys.argv[1:] if arguments is None else arguments))
    if rest and flags.command not in ("train", "bench"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return flags.run(flags, rest)
    except ModuleNotFoundError as error:
        raise SystemExit(f"lad-kernels {flags.command} needs {error.name}: pip install 'lad_kernels[train]'") from error


if __name__ == "__main__":
    raise SystemExit(main())
