"""LAD or GRPO on verifiable problems, one file, top to bottom: configuration, rollouts, update, evaluation, loop.

Without `--model` the policy is a small Qwen3-style decoder with random weights and a tokenizer built in process: a few
supervised steps on generated solutions teach it the format, reinforcement learning does the rest. With
`--model PATH_OR_ID --device cuda` the same loop fine-tunes a pretrained causal language model: fp32 weights, bf16
autocast, flash-attention and Liger's layer kernels where they are installed.

The logits of the training batch are never stored: the last hidden states go to `linear_lad_loss` or
`linear_grpo_loss` with the head's weight, packed, [N, D] with `cu_seqlens`; `loss_mask` marks the rows that predict a
completion token.

A run is reproducible from its seed, and on the CPU `--resume` continues it bit for bit: model, optimiser, generator and
step are in the checkpoint, and the problems of a step are a function of seed and step.

    python -m integration.trainer --algorithm lad --steps 100 --out runs/lad
    python -m integration.trainer --resume runs/lad/checkpoint --steps 150
    python -m integration.trainer --model Qwen/Qwen2.5-0.5B-Instruct --device cuda --task gsm_symbolic
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from integration.policy import Packed, Policy, build_policy, logprobs_of, pack, sample, through_head
from integration.tasks import RIGHT, Entry, Task, encode_prompt, normalize, tagged_answer
from lad_kernels import (
    GRPOConfig,
    LADConfig,
    group_advantages,
    linear_grpo_loss,
    linear_lad_loss,
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; every field is a command-line flag."""

    algorithm: str = "lad"  # lad or grpo
    task: str = "countdown"  # any reasoning-gym dataset
    train_size: int = 3000  # problems generated for training
    held_out_size: int = 200  # problems generated for evaluation
    model: str | None = None  # path or hub id; none builds a small decoder
    device: str = "cpu"
    seed: int = 0  # of sampling and of the order of problems
    steps: int = 200  # rollouts
    prompts_per_step: int = 16
    group_size: int = 8  # completions per prompt
    updates_per_rollout: int = 2  # optimiser steps per rollout; from the second one on the ratio is not 1
    micro_batch: int = 128  # completions per forward and backward
    max_new_tokens: int = 0  # 0: as long as the longest training answer, or 512 for a pretrained model
    temperature: float = 1.0
    learning_rate: float = 3e-4
    learning_rate_warmup: int = 10  # steps; Adam's first steps are as long as its later ones but know far less
    max_grad_norm: float = 1.0
    divergence: str = "js"  # LAD
    eta: float = 0.25  # LAD
    level: str = "token"  # LAD: token, sequence or sequence_sum
    warm_steps: int = 150  # supervised steps before a small decoder meets reinforcement learning
    warm_batch: int = 64
    warm_learning_rate: float = 3e-3
    hidden_size: int = 128  # small decoder
    layers: int = 2  # small decoder
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    out: str = "runs/trainer"
    resume: str | None = None  # a checkpoint directory

    def __post_init__(self) -> None:
        for name, allowed in (("algorithm", ("lad", "grpo")), ("level", ("token", "sequence", "sequence_sum"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in ("group_size", "updates_per_rollout", "prompts_per_step", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number > 0, got {self.temperature!r}")
        LADConfig(self.divergence, eta=self.eta)  # refuses these two itself


class Rollout(NamedTuple):
    """Sampled completions, `group_size` in a row per prompt, and what they are worth."""

    prompts: list[list[int]]  # B token lists
    completions: list[list[int]]  # B token lists, the end token included when it was sampled
    scores: Tensor  # [B]
    distinct: float  # distinct right answers per problem

    @property
    def accuracy(self) -> float:
        return (self.scores >= RIGHT).float().mean().item()


def rollout(
    policy: Policy, task: Task, entries: list[Entry], group_size: int, config: TrainConfig, generator: torch.Generator
) -> Rollout:
    """Sample completions for `entries` and score them."""
    tokenizer = policy.tokenizer
    texts = [task.chat_prompt(e, tokenizer) if policy.pretrained else task.prompt(e) for e in entries]
    prompts = [encode_prompt(text, tokenizer) for text in texts]
    completions = sample(
        policy,
        prompts,
        group_size,
        max_new_tokens=config.max_new_tokens or (512 if policy.pretrained else task.longest + 1),
        temperature=config.temperature,
        generator=generator,
    )
    ended = [row[:-1] if row[-1] in policy.end_ids else row for row in completions]  # some end in a word of the text
    answers = tokenizer.batch_decode(ended, skip_special_tokens=True)
    if policy.pretrained:
        answers = [tagged_answer(answer) for answer in answers]
    scores = task.scores([entry for entry in entries for _ in range(group_size)], answers)
    right = {(i // group_size, normalize(a)) for i, a in enumerate(answers) if scores[i] >= RIGHT}
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    return Rollout(repeated, completions, torch.tensor(scores), len(right) / len(entries))


# ---- Learning ------------------------------------------------------------------------------------------------------


def warm_start(policy: Policy, task: Task, config: TrainConfig) -> list[float]:
    """Supervised steps on generated solutions; returns the losses."""
    rng = random.Random(config.seed)
    optimizer = make_optimizer(policy, config.warm_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.warm_learning_rate, total_steps=config.warm_steps, pct_start=0.1
    )
    end, losses = [policy.tokenizer.eos_token_id], []
    for _ in range(config.warm_steps):
        entries = rng.choices(task.train, k=config.warm_batch)
        prompts = policy.tokenizer([task.prompt(e) for e in entries]).input_ids
        solutions = policy.tokenizer([task.solution(e, rng) for e in entries]).input_ids
        batch = pack(prompts, [solution + end for solution in solutions], policy.device)
        loss = -logprobs_of(policy, batch, 1.0).logprobs.sum() / batch.loss_mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # or the first step of what follows would take the last gradient again
        schedule.step()
        losses.append(loss.item())
    return losses


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay: the policy starts from weights worth keeping."""
    return torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def update(policy: Policy, optimizer: torch.optim.Optimizer, run: Rollout, config: TrainConfig) -> dict[str, float]:
    """The optimiser steps of one rollout; returns metrics averaged over its micro-batches."""
    advantages = group_advantages(run.scores.to(policy.device), group_size=config.group_size)  # [B]
    rows = range(len(run.prompts))
    per_update = -(-len(rows) // config.updates_per_rollout)
    minibatches = []  # one per optimiser step: micro-batches of (packed samples, old log-probs, advantages)
    for first in range(0, len(rows), per_update):
        minibatch = []
        for start in range(first, min(first + per_update, len(rows)), config.micro_batch):
            part = slice(start, min(start + config.micro_batch, first + per_update))
            batch = pack(run.prompts[part], run.completions[part], policy.device)
            old = None
            if config.updates_per_rollout > 1:
                with torch.no_grad():
                    old = logprobs_of(policy, batch, config.temperature).logprobs  # [N]
            minibatch.append((batch, old, advantages[part]))
        minibatches.append(minibatch)
    policy.model.train()
    records = [record for minibatch in minibatches for record in optimizer_step(policy, optimizer, minibatch, config)]
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    minibatch: list[tuple[Packed, Tensor | None, Tensor]],
    config: TrainConfig,
) -> list[dict[str, float]]:
    """One AdamW step on a minibatch of micro-batches, as if it were one large batch: the normaliser is the whole's."""
    tokens = sum(batch.loss_mask.sum() for batch, _, _ in minibatch)  # []
    loss_function, objective = linear_grpo_loss, GRPOConfig()
    if config.algorithm == "lad":
        objective = LADConfig(config.divergence, eta=config.eta, importance_sampling_level=config.level)
        loss_function = linear_lad_loss
    records = []
    for batch, old, advantages in minibatch:
        options = {
            "old_logprobs": old,  # [N], or None: the ratio is exactly 1
            "advantages": advantages,  # [B], one per sample
            "loss_mask": batch.loss_mask,  # [N]
            "cu_seqlens": batch.cu_seqlens,  # [B + 1]
            "temperature": config.temperature,
            "normalizer": tokens,
            "return_entropy": True,
            "config": objective,
        }
        loss = partial(loss_function, target_ids=batch.target_ids, **options)
        out = through_head(policy, batch, loss)
        out.loss.backward()
        entropy = out.entropy.sum() / batch.loss_mask.sum()
        records.append({"loss": out.loss.detach(), "entropy": entropy, **out.metrics})
        del out  # and with it what the loss kept for its backward, before the next micro-batch
    norm = nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return [{"grad_norm": norm.item(), **{k: v.item() for k, v in record.items()}} for record in records]


@torch.no_grad()
def evaluate(policy: Policy, task: Task, config: TrainConfig, samples: int = 16) -> dict[str, float]:
    """Accuracy, pass@8, distinct right answers and token entropy on the held-out problems, `samples` answers each."""
    generator = torch.Generator(policy.device).manual_seed(12345)
    problems = max(1, config.micro_batch // samples)  # at a time
    right, distinct, entropy, tokens = [], 0.0, 0.0, 0
    for start in range(0, len(task.held_out), problems):
        entries = task.held_out[start : start + problems]
        run = rollout(policy, task, entries, samples, config, generator)
        batch = pack(run.prompts, run.completions, policy.device)
        entropy += logprobs_of(policy, batch, config.temperature, return_entropy=True).entropy.sum().item()
        tokens += int(batch.loss_mask.sum())
        right.append((run.scores >= RIGHT).view(-1, samples).sum(1))
        distinct += run.distinct * len(entries)
    right = torch.cat(right)  # [P], right answers per problem
    miss = torch.ones(len(right))  # [P], chance that 8 of the samples, drawn without replacement, are all wrong
    for i in range(8):
        miss *= ((samples - right - i) / (samples - i)).clamp_min(0)
    return {
        "accuracy": right.sum().item() / (len(right) * samples),
        "pass@8": 1.0 - miss.mean().item(),
        "distinct": distinct / len(right),
        "entropy": entropy / tokens,
    }


@dataclass
class State:
    """Everything that changes during a run; the checkpoint holds exactly this."""

    policy: Policy
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    step: int = 0


def save_checkpoint(state: State, config: TrainConfig) -> Path:
    """Write `out/checkpoint`: model and tokenizer as `from_pretrained` reads them, and the trainer's own state."""
    path = Path(config.out) / "checkpoint"
    fresh = path.with_name("checkpoint.new")  # a crash while writing leaves the previous one whole
    shutil.rmtree(fresh, ignore_errors=True)
    state.policy.model.save_pretrained(fresh)
    state.policy.tokenizer.save_pretrained(fresh)
    saved = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state(), "step": state.step}
    torch.save({**saved, "config": asdict(config)}, fresh / "trainer_state.pt")
    shutil.rmtree(path, ignore_errors=True)
    return fresh.rename(path)


def load_policy(config: TrainConfig) -> Policy:
    """The checkpoint to resume, the model to fine-tune, or a small decoder with random weights."""
    return build_policy(
        config.resume or config.model,
        config.device,
        pretrained=config.model is not None,
        seed=config.seed,
        hidden_size=config.hidden_size,
        layers=config.layers,
    )


def initial_state(policy: Policy, config: TrainConfig) -> State:
    """A fresh state, or the one saved in `config.resume`."""
    optimizer = make_optimizer(policy, config.learning_rate)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    if config.resume is None:
        return State(policy, optimizer, generator)
    saved = torch.load(Path(config.resume) / "trainer_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    return State(policy, optimizer, generator, saved["step"])


def problems_of_step(task: Task, step: int, config: TrainConfig) -> list[Entry]:
    """The training problems of a step, a function of seed and step: every epoch is a new permutation."""
    chosen = []
    for position in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step):
        epoch, index = divmod(position, len(task.train))
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1000 * config.seed + epoch))
        chosen.append(task.train[order[index]])
    return chosen


def open_log(state: State, config: TrainConfig) -> TextIO:
    """`out/metrics.jsonl` with the lines up to the state's step, ready for the next one."""
    path = Path(config.out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() and config.resume else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.step))
    return path.open("a", buffering=1)  # a line at a time, for whoever is watching


def train(policy: Policy, task: Task, config: TrainConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The reinforcement learning loop; returns one record per step and appends it to `out/metrics.jsonl`."""
    state = initial_state(policy, config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    records = []
    bar = None
    if progress is not None:
        bar = progress.add_task(
            f"{config.algorithm} seed {config.seed}", total=config.steps, completed=state.step, text=""
        )
    with open_log(state, config) as log:
        while state.step < config.steps:
            started = time.perf_counter()
            for group in state.optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.learning_rate_warmup))
            entries = problems_of_step(task, state.step, config)
            run = rollout(policy, task, entries, config.group_size, config, state.generator)
            metrics = update(policy, state.optimizer, run, config)
            state.step += 1
            tokens = sum(map(len, run.prompts)) + sum(map(len, run.completions))
            record = {
                "algorithm": config.algorithm,
                "seed": config.seed,
                "step": state.step,
                "reward": run.scores.mean().item(),
                "accuracy": run.accuracy,
                "distinct": run.distinct,
                "tokens_per_second": tokens / (time.perf_counter() - started),
                **metrics,
            }
            records.append(record)
            log.write(json.dumps(record) + "\n")
            if progress is not None:
                progress.update(bar, completed=state.step, text=progress_line(record))
            if state.step == config.steps or (config.save_every and state.step % config.save_every == 0):
                save_checkpoint(state, config)
    return records


def progress_line(record: dict[str, Any]) -> str:
    return (
        f"reward {record['reward']:.2f}  accuracy {record['accuracy']:.2f}  entropy {record['entropy']:.2f}  "
        f"distinct {record['distinct']:.1f}  {record['tokens_per_second']:,.0f} tok/s"
    )


def make_progress(console: Console) -> Progress:
    """A live line per run: bar, step, measures of the last step, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Flags are the fields of `TrainConfig`; with `--resume` the saved ones hold wherever no flag is given."""
    from integration.flags import parse_flags

    parse = partial(parse_flags, TrainConfig, arguments, "lad-kernels train", __doc__)
    config = parse()
    if config.resume is None:
        return config
    saved = torch.load(Path(config.resume) / "trainer_state.pt", map_location="cpu", weights_only=True)
    return parse(defaults=saved["config"])


def main(arguments: list[str] | None = None) -> None:
    config, console = parse_config(arguments), Console()
    policy = load_policy(config)
    task = Task(config.task, config.train_size, config.held_out_size)
    if config.model is None and config.resume is None:
        losses = warm_start(policy, task, config)
        console.print(f"warm start: supervised loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    before = evaluate(policy, task, config)
    with make_progress(console) as progress:
        train(policy, task, config, progress)
    console.print("held-out, before:", before)
    console.print("held-out, after: ", evaluate(policy, task, config))
    console.print(f"checkpoint: {Path(config.out) / 'checkpoint'}")


if __name__ == "__main__":
    main()
