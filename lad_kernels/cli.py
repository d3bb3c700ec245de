"""The command line of this package.

    lad-kernels doctor                              # versions, devices, and the path that typical shapes take
    lad-kernels profile --model smollm2 --prompts FILE  # how sparse a policy's logit gradient is
    lad-kernels train --algorithm lad --steps 100   # in a checkout: LAD or GRPO on verifiable problems, one process
    lad-kernels bench --one-thread                  # in a checkout: the benchmarks

`--config FILE.yaml` sets the flags that the file names; later flags win; `--print-config` prints such a file.
They fill a dataclass, `doctor.Asked`, `ProfileConfig` or the trainer's `TrainConfig`; the flags of `bench` are
pytest's. Training on several GPUs goes through TRL: `accelerate launch -m integration.train_trl` in a checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lad_kernels import profile_sparsity

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ProfileConfig:
    """The flags of `lad-kernels profile`.

    Attributes:
        model: path or hub id of a causal language model, or a known name: smollm2, gemma3-270m
        ids: token ids [B, T + 1] of prompts and completions, a tensor written by torch.save
        prompts: a text file, one prompt a line; without `ids` the model completes these
        completions: samples of each prompt
        max_new_tokens: longest completion
        device: cuda if there is one, else cpu
        out: where the plot goes
    """

    model: str | None = None
    ids: Path | None = None
    prompts: Path | None = None
    completions: int = 8
    max_new_tokens: int = 256
    tail_mass: float = 3e-4
    temperature: float = 1.0
    device: str | None = None
    seed: int = 0
    out: Path = Path("sparsity.png")

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("model: expected a path or hub id, got none; name the policy to measure")
        if (self.ids is None) == (self.prompts is None):
            given = "neither" if self.ids is None else "both"
            raise ValueError(f"ids: expected --ids or --prompts, got {given}; give token ids or a file of prompts")
        for name in ("completions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}; give 1 or more")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a finite number > 0, got {self.temperature}; 1 leaves logits alone"
            )
        if not 0 <= self.tail_mass < float("inf"):
            raise ValueError(f"tail_mass: expected a finite number >= 0, got {self.tail_mass}; 3e-4 is the default")


def train(arguments: list[str]) -> int:
    _require_checkout("train", "integration")
    path = os.pathsep.join(x for x in (str(CHECKOUT), os.environ.get("PYTHONPATH")) if x)
    # -P: a folder called integration in the working directory is the user's own
    command = [sys.executable, "-P", "-m", "integration.trainer", *arguments]
    return subprocess.call(command, env=os.environ | {"PYTHONPATH": path})


def bench(arguments: list[str]) -> int:
    text = (
        "Runs `pytest benchmarks` of this checkout; further flags are pytest's, and @FILE holds them, one a line.\n"
        "Those that matter:\n  --bench-set tiny | small | full | sweep | gpu   --one-thread   --save   -k EXPRESSION"
    )
    parser = argparse.ArgumentParser(
        "lad-kernels bench", description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpu", action="store_true", help="benchmarks/gpu.sh: everything for one CUDA device")
    given, rest = parser.parse_known_args(arguments)
    _require_checkout("bench", "benchmarks")
    script = CHECKOUT / "benchmarks" / "gpu.sh"
    command = ["bash", str(script)] if given.gpu else [sys.executable, "-m", "pytest", "benchmarks"]
    return subprocess.call([*command, *rest], cwd=CHECKOUT)


def _require_checkout(command: str, folder: str) -> None:
    """Raises SystemExit where the package is installed without the repository around it."""
    if not ((CHECKOUT / folder).is_dir() and (CHECKOUT / "setup.py").is_file()):
        raise SystemExit(
            f"lad-kernels {command}: expected a checkout of the repository with {folder}/, got an installed package; "
            f"clone the repository and run `pip install -e .` there"
        )


def profile(arguments: list[str]) -> int:
    from lad_kernels.flags import parse_flags
    from lad_kernels.preflight import Refused, check_device, check_model, claim_folder, complain
    from lad_kernels.pretrained import model_folder

    text = "What tail_mass would keep of a policy's logit gradient, by entropy: a table and a plot."
    asked = parse_flags(ProfileConfig, arguments, "lad-kernels profile", text)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(device)
        for name in ("ids", "prompts"):
            path = getattr(asked, name)
            if path is not None and not path.is_file():
                raise Refused(f"{name}: expected a file, got {str(path)!r}; check the path")
        claim_folder(str(asked.out.parent), used=True)
        folder = model_folder(asked.model)
        check_model(folder)
        model, tokenizer = _load(folder, device)
    except Refused as error:
        return complain("lad-kernels profile", f"--{error}", 2)
    torch.manual_seed(asked.seed)
    if asked.ids is not None:
        tokens = _Tokens(torch.load(asked.ids, weights_only=True).to(device), None, None)
    else:
        tokens = _own_samples(model, tokenizer, asked)
    result = profile_sparsity(
        model,
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        loss_mask=tokens.loss_mask,
        temperature=asked.temperature,
        tail_mass=asked.tail_mass,
    )
    print(result)
    print(f"written: {result.save_png(asked.out)}")
    return 0


def _load(path: str, device: str) -> tuple[Any, Any]:
    """Model, in the dtype of its checkpoint, and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lad_kernels.preflight import Refused

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise Refused(
            f"model: expected a causal language model, got {path!r} ({str(error).splitlines()[0]}); check its files"
        ) from error
    return model.to(device).eval(), tokenizer


class _Tokens(NamedTuple):
    """What is profiled."""

    input_ids: torch.Tensor  # [B, T + 1]
    attention_mask: torch.Tensor | None  # [B, T + 1]
    loss_mask: torch.Tensor | None  # [B, T]


def _own_samples(model: Any, tokenizer: Any, asked: ProfileConfig) -> _Tokens:
    """Completions that the policy samples itself, and a mask of their tokens."""
    prompts = [line for line in asked.prompts.read_text().splitlines() if line.strip()]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": line}] for line in prompts]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
    else:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
    batch = batch.to(model.device)
    ids = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=asked.temperature,
        num_return_sequences=asked.completions,
        max_new_tokens=asked.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )  # [B, T + 1]
    start = batch["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=ids.device)
    ended = torch.isin(ids[:, start:], ends).int()  # [B, new]
    sampled = ended.cumsum(1) - ended == 0  # [B, new] up to and with the first end
    before = batch["attention_mask"].repeat_interleave(asked.completions, 0)  # [B, start]
    attention = torch.cat([before, sampled.to(before.dtype)], 1)  # [B, T + 1]
    loss_mask = torch.cat([torch.zeros_like(before), sampled.to(before.dtype)], 1)[:, 1:]  # [B, T]
    return _Tokens(ids, attention, loss_mask)


def doctor(arguments: list[str]) -> int:
    from lad_kernels import doctor
    from lad_kernels.flags import parse_flags

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
