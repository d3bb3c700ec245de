"""The bandit of the LAD paper: does the loss learn the advantage *distribution*, or only its highest arm?

A policy of 50 logits chooses one of 50 arms. The advantage curve has three bumps. Draws come from pi_old, the uniform
policy, which stays frozen. LAD's target is pi* = softmax(log pi_old + A / eta): three bumps of probability. A policy
gradient has no such target; its optimum is the single best arm.

Two rows for GRPO, because clipping matters here. The paper's claim is about the objective, hence `grpo` is unclipped:
under a frozen pi_old it climbs to one arm. `grpo, clipped` (epsilon 0.2) stays in the neighbourhood of pi_old, as the
clip removes every gradient beyond a ratio of 1.2: it neither collapses nor learns the target.

E_old[e^(A/eta)] > 1, so no policy reaches x = 1 everywhere and every divergence keeps a small bias of its own. `tv`
keeps more: without the partition function many policies reach its minimum, and the path decides which one is reached.

    python -m integration.bandit
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from integration.report import Sheet, mean_and_std
from lad_kernels import GRPOConfig, LADConfig, grpo_loss, lad_loss
from lad_kernels.objective import DIVERGENCES

ARMS = 50
BUMPS = ((10, 4.0), (25, 5.0), (40, 4.0))  # (centre, height); every width is 5 arms
DRAWS = 32  # per step
ETA = 1.0
LEARNING_RATE = 5e-3
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logprobs [N], old_logprobs [N], advantages [N]
MAX_TV_JS = 0.05  # checks: js must come closer to the target than this ...
MIN_TV_GRPO = 0.5  # ... and unclipped GRPO must stay further away than this


class BanditResult(NamedTuple):
    """Final policies and their distance to the target, by method."""

    target: Tensor  # [ARMS]
    policies: dict[str, Tensor]  # name -> [S, ARMS]
    distance: dict[str, Tensor]  # name -> [S], total variation to the target


def advantage_curve() -> Tensor:
    """Three bumps, standardised over the arms: [ARMS]."""
    arms = torch.arange(ARMS, dtype=torch.float32)
    curve = sum(height * torch.exp(-((arms - centre) ** 2) / (2 * 5.0**2)) for centre, height in BUMPS)
    return (curve - curve.mean()) / curve.std(correction=0)


def methods() -> dict[str, Loss]:
    """Losses by name: LAD with every divergence, GRPO without and with clipping."""

    def of(loss: Any, config: Any) -> Loss:
        return lambda logp, old, adv: loss(logp, old, adv, config=config).loss

    losses = {name: of(lad_loss, LADConfig(divergence=name, eta=ETA)) for name in DIVERGENCES}
    losses["grpo"] = of(grpo_loss, GRPOConfig(epsilon_low=1e9, epsilon_high=1e9))
    losses["grpo, clipped"] = of(grpo_loss, GRPOConfig())
    return losses


def train_logits(losses: dict[str, Loss], steps: int, seeds: int) -> Tensor:
    """Logits [K, S, ARMS] of K = len(losses) policies per seed, trained from the uniform policy on the same draws.

    A loss is called once a step with N = S * DRAWS tokens, the draws of a seed next to each other.
    """
    advantages = advantage_curve()  # [ARMS]
    logits = torch.zeros(len(losses), seeds, ARMS, requires_grad=True)  # [K, S, ARMS]
    old_logp = torch.full((seeds * DRAWS,), -math.log(ARMS))  # [N], pi_old is uniform
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        draws = torch.randint(ARMS, (seeds, DRAWS), generator=generator)  # [S, DRAWS] ~ pi_old
        index = draws.expand(len(losses), -1, -1)  # [K, S, DRAWS]
        logp = logits.log_softmax(-1).gather(-1, index).flatten(1)  # [K, N]
        adv = advantages[draws].flatten()  # [N], used as given
        total = sum(loss(logp[i], old_logp, adv) for i, loss in enumerate(losses.values()))
        optimizer.zero_grad()
        total.backward()  # the policies share no logits, so their gradients are independent
        optimizer.step()
    return logits.detach()


def run_bandit(steps: int = 4000, seeds: int = 3, only: tuple[str, ...] | None = None) -> BanditResult:
    """Train every method, or those named in `only`, on the same draws."""
    losses = {name: loss for name, loss in methods().items() if only is None or name in only}
    policies = dict(zip(losses, train_logits(losses, steps, seeds).softmax(-1)))
    target = torch.softmax(advantage_curve() / ETA, dim=0)  # [ARMS], pi_old is uniform
    distance = {name: 0.5 * (p - target).abs().sum(-1) for name, p in policies.items()}
    return BanditResult(target, policies, distance)


def bandit_sheet(result: BanditResult) -> Sheet:
    """Total variation and effective arms, mean and standard deviation over seeds."""
    target_arms = torch.special.entr(result.target).sum().exp().item()
    title = f"Bandit, frozen uniform pi_old: distance to the target ({target_arms:.1f} effective arms)"
    rows = []
    for name, distance in result.distance.items():
        label = name if name.startswith("grpo") else f"lad {name}"
        arms = torch.special.entr(result.policies[name]).sum(-1).exp()  # [S], exp(entropy)
        rows.append([label, mean_and_std(distance.tolist()), mean_and_std(arms.tolist(), 1)])
    return Sheet(title, ["method", "total variation", "effective arms"], rows)


def plot_bandit(result: BanditResult, path: Path) -> None:
    """Bars of the target with the first seed's LAD (js) and GRPO policies over them."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(ARMS), result.target.tolist(), color="0.85", label="target  softmax(A / η)")
    axes.plot(result.policies["js"][0].tolist(), color="tab:blue", label="LAD (js)")
    axes.plot(result.policies["grpo"][0].tolist(), color="tab:red", label="GRPO")
    axes.set(xlabel="arm", ylabel="probability", yscale="log", ylim=(1e-4, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def bandit_checks(result: BanditResult) -> dict[str, bool]:
    """Statement -> whether it holds for the mean over seeds."""
    js, grpo = result.distance["js"].mean().item(), result.distance["grpo"].mean().item()
    return {
        f"bandit: LAD js within {MAX_TV_JS} of the target (measured {js:.3f})": js <= MAX_TV_JS,
        f"bandit: unclipped GRPO at least {MIN_TV_GRPO} away (measured {grpo:.3f})": grpo >= MIN_TV_GRPO,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcome = run_bandit()
    Console().print(bandit_sheet(outcome).rich())
    checks = bandit_checks(outcome)
    for statement, holds in checks.items():
        print("pass" if holds else "FAIL", statement)
    raise SystemExit(not all(checks.values()))
