r"""LAD or GRPO on verifiable problems, top to bottom: rollouts, update, evaluation, loop, program.

Without `--model` the policy is a small Qwen3-style decoder with random weights and a tokenizer built in process: a few
supervised steps on generated solutions teach it the format, reinforcement learning does the rest. With
`--model PATH_OR_ID --device cuda` the same loop fine-tunes a pretrained causal language model: fp32 weights, bf16
autocast, flash-attention and Liger's layer kernels where they are installed.

The logits of the training batch are never stored: the last hidden states, packed, go to `linear_lad_loss` or
`linear_grpo_loss` with the head's weight.

Every run has a folder of its own, runs/train-DATE-TIME or `--out`; only `--overwrite` replaces another run. A run is
reproducible from its seed, and on the CPU `--resume` continues it bit for bit, after Ctrl-C, SIGTERM, a crash or a full
disk: model, optimiser, generators and step are in the checkpoint, and the problems of a step are a function of seed and
step. Every file of a checkpoint has a checksum, which `--resume` checks.

    python -m integration.trainer --algorithm lad --steps 100 --out runs/lad
    python -m integration.trainer --resume runs/lad --steps 150
    python -m integration.trainer --model Qwen/Qwen2.5-0.5B-Instruct --device cuda --task gsm_symbolic
    python -m integration.trainer --model smollm2 --task chain_sum --prompt few_shot --max-new-tokens 4 \
        --task-options '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor, nn

from integration import checkpoint
from integration.policy import Packed, Policy, logprobs_of, pack, sample, through_head
from integration.prompts import EqualRewards, form_of
from integration.runs import Interrupted, Signals, cut_log, open_log
from integration.state import State, initial_state, load_policy, make_optimizer, save_checkpoint
from integration.tasks import RIGHT, Entry, Task, build_task, encode_prompt, normalize
from integration.train_config import TrainConfig, check_machine, parse_config
from lad_kernels import GRPOConfig, LADConfig, group_advantages, linear_cross_entropy, linear_grpo_loss, linear_lad_loss
from lad_kernels.outputs import METRICS
from lad_kernels.preflight import Refused, claim_folder, complain


class Rollout(NamedTuple):
    """Sampled completions, `group_size` in a row per prompt, and what they are worth."""

    prompts: list[list[int]]  # B token lists
    completions: list[list[int]]  # B token lists, the end token included when it was sampled
    scores: Tensor  # [B]
    distinct: float  # distinct right answers per problem
    texts: list[str]  # B completions as text, without their ends


def rollout(
    policy: Policy, task: Task, entries: list[Entry], group_size: int, config: TrainConfig, generator: torch.Generator
) -> Rollout:
    """Sample completions for `entries` and score them."""
    tokenizer, form = policy.tokenizer, form_of(config, policy.pretrained)
    prompts = [encode_prompt(form.ask(task, entry, tokenizer), tokenizer) for entry in entries]
    completions = sample(
        policy,
        prompts,
        group_size,
        max_new_tokens=config.max_new_tokens or (512 if form.answer == "tag" else task.longest + 1),
        temperature=config.temperature,
        generator=generator,
    )
    ends = policy.sampling.eos_token_id
    ended = [row[:-1] if row[-1] in ends else row for row in completions]  # it may decode to text
    texts = tokenizer.batch_decode(ended, skip_special_tokens=True)
    answers = [form.read(text) for text in texts]
    scores = task.scores([entry for entry in entries for _ in range(group_size)], answers)
    right = {(i // group_size, normalize(a)) for i, a in enumerate(answers) if scores[i] >= RIGHT}
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    return Rollout(repeated, completions, torch.tensor(scores), len(right) / len(entries), texts)


# ---- Learning ------------------------------------------------------------------------------------------------------


def warm_start(policy: Policy, task: Task, config: TrainConfig) -> list[float]:
    """Supervised steps on generated solutions; returns the losses."""
    rng = random.Random(config.seed)
    optimizer = make_optimizer(policy, config.warm_learning_rate)
    ramp = 0.2 if config.warm_steps == 10 else 0.1  # a tenth of 10 would be a ramp of length 0, by which torch divides
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.warm_learning_rate, total_steps=config.warm_steps, pct_start=ramp
    )
    end, losses = [policy.tokenizer.eos_token_id], []
    for _ in range(config.warm_steps):
        entries = rng.choices(task.train, k=config.warm_batch)
        prompts = policy.tokenizer([task.prompt(e) for e in entries]).input_ids
        solutions = policy.tokenizer([task.solution(e, rng) for e in entries]).input_ids
        batch = pack(prompts, [solution + end for solution in solutions], policy.device)
        labels = batch.target_ids.masked_fill(~batch.loss_mask, -100)  # [N]
        loss = through_head(policy, batch, partial(linear_cross_entropy, target_ids=labels))
        loss.backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # or the next optimizer's first step would use this gradient again
        schedule.step()
        losses.append(loss.item())
    return losses


def update(policy: Policy, optimizer: torch.optim.Optimizer, run: Rollout, config: TrainConfig) -> dict[str, float]:
    """The optimiser steps of one rollout; returns their metrics, averaged."""
    advantages = group_advantages(run.scores.to(policy.device), group_size=config.group_size)  # [B]
    rows = range(len(run.prompts))
    per_update = -(-len(rows) // config.updates_per_rollout)
    minibatches = []  # one per optimiser step: micro-batches of (packed samples, old log-probs, advantages)
    for first in rows[::per_update]:
        minibatch = []
        for start in rows[first : first + per_update : config.micro_batch]:
            part = slice(start, min(start + config.micro_batch, first + per_update))
            batch = pack(run.prompts[part], run.completions[part], policy.device)
            reused = config.updates_per_rollout > 1
            old = logprobs_of(policy, batch, config.temperature).logprobs if reused else None  # [N]
            minibatch.append((batch, old, advantages[part]))
        minibatches.append(minibatch)
    policy.model.train()
    records = [optimizer_step(policy, optimizer, minibatch, config) for minibatch in minibatches]
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    minibatch: list[tuple[Packed, Tensor | None, Tensor]],
    config: TrainConfig,
) -> dict[str, float]:
    """One AdamW step on a minibatch of micro-batches, as if it were one large batch: the normaliser is that of all."""
    tokens = sum(batch.loss_mask.sum() for batch, _, _ in minibatch)  # []
    loss_function, objective = linear_grpo_loss, GRPOConfig()
    if config.algorithm == "lad":
        objective = LADConfig(config.divergence, eta=config.eta, importance_sampling_level=config.level)
        loss_function = linear_lad_loss
    records, counts = [], []
    for batch, old, advantages in minibatch:
        loss = partial(
            loss_function,
            target_ids=batch.target_ids,  # [N]
            old_logprobs=old,  # [N], or None: the ratio is exactly 1
            advantages=advantages,  # [B], one per sample
            loss_mask=batch.loss_mask,  # [N]
            cu_seqlens=batch.cu_seqlens,  # [B + 1]
            temperature=config.temperature,
            normalizer=tokens,
            return_entropy=True,
            config=objective,
        )
        out = through_head(policy, batch, loss)
        out.loss.backward()
        records.append({"loss": out.loss.detach(), "entropy": out.entropy.sum() / batch.loss_mask.sum(), **out.metrics})
        counts.append(counts_of(batch, advantages))
        del out  # frees what the loss saved for its backward before the next micro-batch
    norm = nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm.item(), **combined(records, counts)}


def counts_of(batch: Packed, advantages: Tensor) -> dict[str, Tensor]:  # [B]
    """Numbers of tokens that means are over."""
    signs = advantages.repeat_interleave(batch.cu_seqlens.diff()).sign() * batch.loss_mask  # [N]
    tokens = batch.loss_mask.sum()  # []
    return {
        "tokens": tokens,
        "loss tokens": tokens,
        "positive tokens": (signs > 0).sum(),
        "negative tokens": (signs < 0).sum(),
    }


def combined(records: list[dict[str, Tensor]], counts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of micro-batches as those of their batch, by METRICS; without those that no number per part gives."""
    out = {}
    for name in records[0]:
        values, how = torch.stack([record[name] for record in records]), {"loss": "sum", **METRICS}.get(name, "tokens")
        if how in counts[0]:
            weights = torch.stack([count[how] for count in counts])  # [micro-batches]
            out[name] = ((values * weights).sum() / weights.sum().clamp(min=1)).item()
        elif how != "apart":
            out[name] = (values.sum() if how == "sum" else values.max()).item()
    return out


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
    all_wrong = [math.comb(samples - n, 8) for n in right.tolist()]  # of the ways to draw 8 of a problem's samples
    return {
        "accuracy": right.sum().item() / (len(right) * samples),
        "pass@8": 1.0 - sum(all_wrong) / (len(right) * math.comb(samples, 8)),
        "distinct": distinct / len(right),
        "entropy": entropy / tokens,
    }


def problems_of_step(task: Task, step: int, config: TrainConfig) -> list[Entry]:
    """The training problems of a step, a function of seed and step: every epoch is a new permutation."""
    chosen = []
    for position in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step):
        epoch, index = divmod(position, len(task.train))
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1000 * config.seed + epoch))
        chosen.append(task.train[order[index]])
    return chosen


def train(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    progress: Progress | None = None,
    stopped: Callable[[], Any] = lambda: False,
) -> list[dict[str, Any]]:
    """The reinforcement learning loop; returns one record per step and appends it to `out/metrics.jsonl`.

    The first checkpoint is saved before the first step. If `stopped()` holds after a step, the loop saves and returns.
    """
    state, folder, records = initial_state(policy, config), Path(config.out), []
    title = f"{config.algorithm} seed {config.seed}"
    bar = progress and progress.add_task(title, total=config.steps, completed=state.step, text="")
    rewards = EqualRewards(state.step)
    with open_log(folder) as log:
        if checkpoint.continues(config.resume, folder):
            checkpoint.tidy(folder)
        else:
            save_checkpoint(state, config)
        cut_log(folder, state.step)
        if config.resume is not None and progress is not None:
            progress.console.print(
                f"{config.resume}: going on after step {state.step} of {config.steps}", soft_wrap=True
            )
        while state.step < config.steps and not stopped():
            records.append(train_step(state, task, config, rewards))
            log.write(json.dumps(records[-1]) + "\n")
            if progress is not None:
                progress.update(bar, completed=state.step, text=progress_line(records[-1]))
            due = config.save_every and state.step % config.save_every == 0
            if due or state.step == config.steps or stopped():
                os.fsync(log.fileno())  # the log is never behind its checkpoint
                save_checkpoint(state, config)
    return records


def train_step(state: State, task: Task, config: TrainConfig, rewards: EqualRewards) -> dict[str, Any]:
    """A rollout and its updates; returns the step's record."""
    started = time.perf_counter()
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.learning_rate_warmup))
    entries = problems_of_step(task, state.step, config)
    run = rollout(state.policy, task, entries, config.group_size, config, state.generator)
    rewards.see(run.scores.tolist(), run.texts)
    metrics = update(state.policy, state.optimizer, run, config)
    state.step += 1
    tokens = sum(map(len, run.prompts)) + sum(map(len, run.completions))
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "step": state.step,
        "reward": run.scores.mean().item(),
        "accuracy": (run.scores >= RIGHT).float().mean().item(),
        "distinct": run.distinct,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        **metrics,
    }


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
        TextColumn("{task.fields[text]}", table_column=Column()),  # on two lines where the terminal is narrow
        TimeRemainingColumn(),
        console=console,
    )


def run_program(config: TrainConfig, console: Console, signals: Signals) -> int:
    """Everything between flags and exit status; `config.out` is the run's folder."""
    policy, again = load_policy(config), f"lad-kernels train --resume {config.out}"
    task = build_task(config)
    if policy.pretrained:
        precision = "float32" if isinstance(policy.autocast(), nullcontext) else "bf16 autocast, float32 weights"
        form, rate = form_of(config, True), config.learning_rate
        console.print(f"{precision}; prompt {form.prompt}, answer {form.answer}, learning rate {rate:g}")
    if policy.set_aside:
        console.print(f"sampling from the distribution that is trained: the model's own {policy.set_aside} set aside")
    if config.model is None and config.resume is None:
        losses = warm_start(policy, task, config)
        console.print(f"warm start: supervised loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    before = evaluate(policy, task, config)
    with signals.held(), make_progress(console) as progress:
        train(policy, task, config, progress, lambda: signals.caught)
    if signals.caught:
        console.print(f"stopped by {signals.caught.name}; the checkpoint is saved, go on with: {again}", soft_wrap=True)
        return 128 + signals.caught
    console.print("held-out, before:", before)
    console.print("held-out, after: ", evaluate(policy, task, config))
    console.print(f"checkpoint: {Path(config.out) / checkpoint.LINK}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse flags, train, evaluate; returns the exit status: 2 for a wrong flag, 1 for a failed write, 128 + signal."""
    console, out = Console(), None
    try:
        with Signals() as signals:
            config = parse_config(arguments, __doc__)
            check_machine(config)
            resuming = config.out is not None and checkpoint.continues(config.resume, Path(config.out))
            cure = f"go on with that run by --resume {config.out}, replace it by --overwrite, or name another folder"
            out = claim_folder(config.out, "train-", used=config.overwrite or resuming, cure=cure)
            return run_program(replace(config, out=str(out)), console, signals)
    except Refused as error:
        return complain("lad-kernels train", f"--{error}", 2)
    except checkpoint.SaveError as error:
        return complain("lad-kernels train", str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) or out is None:
            raise
        message = f"{out} cannot be written to ({error.strerror}); make room and go on with --resume {out}"
        return complain("lad-kernels train", message, 1)
    except Interrupted:
        saved = out is not None and (out / checkpoint.LINK).exists()
        advice = (
            f"go on with: lad-kernels train --resume {out}" if saved else "nothing is lost, for nothing was trained yet"
        )
        console.print(f"stopped by {signals.caught.name}; {advice}", soft_wrap=True)
        return 128 + signals.caught


if __name__ == "__main__":
    raise SystemExit(main())
