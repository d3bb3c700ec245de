"""Whether dropping the tail of the gradient changes training: dense, routed and unbiased routed AdamW from one start.

A policy over V tokens (context embedding, one hidden layer, untied head) is fitted to sampled next-token pairs of a
Zipf-like source, then trained for 2,000 steps of LAD on sampled tokens whose reward is 1 inside a set of tokens that
depends on the context. All three variants start from the same weights and seed; three seeds give the noise. Training
is on-policy, where the value of the LAD loss depends on the rewards alone: reward, gradient norm and entropy show
its progress. Adam divides by the gradient's own size, so a row of the head that rarely has a large gradient may take
steps of the learning rate's size when the backward is dense and none when it is routed: how far the rows of the coldest
quarter of the blocks (those kept least often in the run that drops the tail) move is reported next to held-out loss.

python -m benchmarks.studies.training [--steps 2000] [--seeds 3]   20 minutes of one core; writes results/training/
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.harness import machine
from benchmarks.harness.results import RESULTS, Results
from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs

VOCABULARY, HIDDEN, CONTEXTS = 16_384, 64, 256
PROMPTS, GROUP = 16, 8  # sampled contexts a step, tokens per context
LEARNING_RATE = 5e-5
TEMPERATURE = 0.5  # of the policy that is sampled and trained: peaked, as policies under reinforcement learning are
LAST = 0.1  # share of a run, at its end, over which the means are taken
VARIANTS = {
    "routed, tail dropped": LADConfig(tail_mass=3e-4, backward="routed", tail="drop"),  # first: it defines cold blocks
    "routed, unbiased tail": LADConfig(tail_mass=3e-4, backward="routed"),
    "dense": LADConfig(backward="dense"),
}


class Policy(nn.Module):
    """Context ids [N] -> hidden states [N, D]; `head.weight` is the lm_head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CONTEXTS, HIDDEN)
        self.body = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, contexts: Tensor) -> Tensor:
        x = self.embed(contexts)  # [N, D]
        return self.norm(x + self.body(x))


@dataclass
class Outcome:
    """Means over the last steps of a run (`LAST`), and what became of the head's rows."""

    variant: str
    seed: int
    reward: float
    gradient_norm: float
    entropy: float
    held_out_loss: float
    kept_share: float
    cold_rows_hot: float  # share of steps in which the coldest quarter of the blocks got any gradient in this run
    cold_rows_moved: float  # mean length of their displacement over the mean length of the rows
    hot_rows_moved: float
    seconds: float


def favourites(contexts: Tensor, rank: Tensor) -> Tensor:
    return contexts * 7919 % (VOCABULARY // 2 - 8) + rank


def source(contexts: Tensor, gen: torch.Generator) -> Tensor:
    """Next tokens [N]: one of 8 favourites of the context (in the lower half of the vocabulary) with odds 1 / rank^2,
    or, once in 1,000, any token by Zipf's law."""
    rank = torch.multinomial(1 / torch.arange(1.0, 9.0) ** 2, len(contexts), replacement=True, generator=gen)  # [N]
    favourite = favourites(contexts, rank)  # [N]
    zipf = torch.multinomial(1 / (torch.arange(VOCABULARY) + 2.7), len(contexts), replacement=True, generator=gen)
    return torch.where(torch.rand(len(contexts), generator=gen) < 0.999, favourite, zipf)


def reward(contexts: Tensor, tokens: Tensor) -> Tensor:
    """1 for the context's favourites of odd rank [N]."""
    odd = torch.arange(1, 8, 2)  # [4]
    good = favourites(contexts[:, None], odd)  # [N, 4]
    return (tokens[:, None] == good).any(1).float()


def held_out_loss(policy: Policy) -> float:
    gen = torch.Generator().manual_seed(99)
    contexts = torch.randint(CONTEXTS, (4096,), generator=gen)
    with torch.no_grad():
        return -linear_logprobs(policy(contexts), policy.head.weight, source(contexts, gen)).logprobs.mean().item()


def warm_start(steps: int = 2000) -> Policy:
    """A policy fitted to the source by maximum likelihood."""
    torch.manual_seed(0)
    policy, gen = Policy(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        contexts = torch.randint(CONTEXTS, (512,), generator=gen)
        loss = -linear_logprobs(policy(contexts), policy.head.weight, source(contexts, gen)).logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
    return policy


def train(start: dict, variant: str, seed: int, steps: int, cold: Tensor | None) -> tuple[Outcome, Tensor]:
    """One run; returns its outcome and in how many steps each block of the head had a gradient [blocks]."""
    policy = Policy()
    policy.load_state_dict(start)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    gen = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    config, log, began = VARIANTS[variant], [], time.process_time()
    hot = torch.zeros(VOCABULARY // 128)  # [blocks]
    for _ in range(steps):
        contexts = torch.randint(CONTEXTS, (PROMPTS,), generator=gen).repeat_interleave(GROUP)  # [N]
        hidden = policy(contexts)  # [N, D]
        with torch.no_grad():
            p = (hidden @ policy.head.weight.T / TEMPERATURE).softmax(-1)  # [N, V]
            tokens = torch.multinomial(p, 1, generator=gen)[:, 0]  # [N]
            entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean().item()
        rewards = reward(contexts, tokens)  # [N]
        out = linear_lad_loss(
            hidden[:, None],
            policy.head.weight,
            tokens[:, None],
            rewards=rewards,
            group_size=GROUP,
            config=config,
            temperature=TEMPERATURE,
        )
        optimizer.zero_grad()
        out.loss.backward()
        grad = policy.head.weight.grad  # [V, D]
        hot += grad.view(-1, 128, HIDDEN).abs().amax((1, 2)) > 0
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        optimizer.step()
        log.append((rewards.mean().item(), norm, entropy, out.metrics["kept_share"].item()))
    last = log[-max(1, round(LAST * steps)) :]
    mean_reward, norm, entropy, kept = (statistics.fmean(x) for x in zip(*last))
    cold = coldest(hot) if cold is None else cold  # [blocks]
    rows = cold.repeat_interleave(128)  # [V]
    moved = (policy.head.weight.detach() - start["head.weight"]).norm(dim=1) / start["head.weight"].norm(dim=1).mean()
    outcome = Outcome(
        variant,
        seed,
        mean_reward,
        norm,
        entropy,
        held_out_loss(policy),
        kept,
        hot[cold].mean().item() / steps,
        moved[rows].mean().item(),
        moved[~rows].mean().item(),
        time.process_time() - began,
    )
    return outcome, hot


def coldest(hot: Tensor) -> Tensor:
    """The quarter of the blocks [blocks] that had a gradient most seldom."""
    return torch.zeros_like(hot, dtype=torch.bool).index_fill_(0, hot.argsort()[: len(hot) // 4], True)


def compare(steps: int, seeds: int) -> list[Outcome]:
    policy = warm_start()
    print(f"warm start: held-out loss {held_out_loss(policy):.4f}")
    start, outcomes = {k: v.clone() for k, v in policy.state_dict().items()}, []
    for seed in range(seeds):
        cold = None  # [blocks]
        for variant in VARIANTS:
            outcome, hot = train(start, variant, seed, steps, cold)
            cold = coldest(hot) if cold is None else cold
            outcomes.append(outcome)
            print(outcomes[-1], flush=True)
    return outcomes


def summarise(outcomes: list[Outcome]) -> list[dict]:
    """Mean and standard deviation over seeds of every number, by variant."""
    rows = []
    for variant in VARIANTS:
        runs = [asdict(o) for o in outcomes if o.variant == variant]
        row: dict[str, object] = {"variant": variant, "seeds": len(runs)}
        for key in [k for k in runs[0] if k not in ("variant", "seed")]:
            values = [r[key] for r in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            row[key] = f"{statistics.fmean(values):.4g} +- {deviation:.2g}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m benchmarks.studies.training --steps {options.steps} --seeds {options.seeds}"
    results = Results(machine.describe("cpu", command))
    for line in summarise(compare(options.steps, options.seeds)):
        results.add("training", **line)
    results.save(RESULTS / "training" / "results.json")
    print(report.render([results]))
