"""Plots and tables of `docs/`: every number of those pages that code can produce is produced here.

    python -m docs.tools.figures             # plots, and the tables between `<!-- table: NAME -->` and `<!-- end -->`
    python -m docs.tools.figures --measure   # also the bandit table, about six minutes of one core

Coefficients are gradients that autograd takes through `lad_loss` and `grpo_loss`, in float64.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.tools import head_share
from integration import bandit
from integration.report import Sheet
from lad_kernels import GRPOConfig, LADConfig, group_advantages, grpo_loss, lad_loss

DOCS = Path(__file__).resolve().parents[1]
DIVERGENCES = bandit.DIVERGENCES
ETAS = (0.25, 0.5, 1.0, 2.0, 4.0)
COLORS = {name: f"C{i}" for i, name in enumerate(DIVERGENCES)} | {"grpo": "black"}
PAGES = ("divergences.md", "when_it_helps.md")
RIGHT = (1, 4, 7)  # right answers in a group of 8


def coefficients(config: LADConfig | GRPOConfig, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """c = d loss / d log pi of tokens with these log-ratios and advantages, token level: [M], [M] -> [M] float64."""
    loss = lad_loss if isinstance(config, LADConfig) else grpo_loss
    old = torch.full(log_ratio.shape, -8.0, dtype=torch.float64)  # [M]
    logprobs = (old + log_ratio).requires_grad_()  # [M], below 0
    loss(logprobs, old, advantages.double(), config=config, normalizer=1.0).loss.backward()
    return logprobs.grad


def by_length(level: str, lengths: list[int], drift: float, target: float) -> Tensor:
    """-c of one token of a completion whose tokens all have log-ratio `drift`, times the token count; [lengths]."""
    found = []
    for length in lengths:
        old = torch.full((length,), -1.0, dtype=torch.float64)  # [N]
        logprobs = (old + drift).requires_grad_()  # [N]
        bounds, advantage = torch.tensor([0, length]), torch.tensor([target], dtype=torch.float64)  # [2], [1]
        config = LADConfig(eta=1.0, importance_sampling_level=level)
        lad_loss(logprobs, old, advantage, cu_seqlens=bounds, config=config).loss.backward()
        found.append(-length * logprobs.grad[0])
    return torch.stack(found)


def plot_advantage(figure: Figure) -> None:
    """-c at ratio 1 against u = A / eta: what each divergence makes of an advantage."""
    u = torch.linspace(-6, 6, 241, dtype=torch.float64)  # [M]
    panels = figure.subplots(1, 2)
    for axes, names in zip(panels, (("js", "hd", "tv", "kl", "pearson"), DIVERGENCES)):
        for name in names:
            y = -coefficients(LADConfig(name, eta=1.0), torch.zeros_like(u), u)  # [M]
            axes.plot(u, y, color=COLORS[name], label=name)
        y = -coefficients(GRPOConfig(), torch.zeros_like(u), u)  # [M]
        axes.plot(u, y, color=COLORS["grpo"], linestyle="--", label="grpo (A = u)")
        axes.set(xlabel="u = A / eta", ylabel="-c at ratio 1")
        axes.axhline(0, color="0.8", zorder=0)
        axes.legend(fontsize="small")
    panels[0].set(ylim=(-6, 8), title="near the origin")
    panels[1].set(yscale="symlog", title="all, symmetric logarithmic axis")


def plot_ratio(figure: Figure) -> None:
    """-c against the log-ratio for a good and a bad answer: where the push ends."""
    d = torch.linspace(-4, 4, 321, dtype=torch.float64)  # [M]
    for axes, u in zip(figure.subplots(1, 2), (2.0, -2.0)):
        for name in DIVERGENCES:
            y = -coefficients(LADConfig(name, eta=1.0), d, torch.full_like(d, u))  # [M]
            axes.plot(d, y, color=COLORS[name], label=name)
        y = -coefficients(GRPOConfig(), d, torch.full_like(d, u))  # [M]
        axes.plot(d, y, color=COLORS["grpo"], linestyle="--", label="grpo, clip 0.2")
        axes.axvline(u, color="0.7", linestyle=":")
        axes.set(xlabel="log-ratio", ylabel="-c", yscale="symlog", title=f"u = {u:+g}; dotted: the target, x = 1")
        axes.axhline(0, color="0.8", zorder=0)
    axes.legend(fontsize="x-small", ncols=3)


def plot_eta(figure: Figure) -> None:
    """js: -c at ratio 1 times eta against the advantage, and the target on the bandit's advantages."""
    left, right = figure.subplots(1, 2)
    advantages, curve = torch.linspace(-3, 3, 241, dtype=torch.float64), bandit.advantage_curve()  # [M], [ARMS]
    for i, eta in enumerate(ETAS):
        y = -eta * coefficients(LADConfig(eta=eta), torch.zeros_like(advantages), advantages)  # [M]
        left.plot(advantages, y, color=f"C{i}", label=f"eta {eta:g}")
        target = torch.softmax(curve / eta, 0)  # [ARMS]
        right.plot(target, color=f"C{i}", label=f"eta {eta:g}: {effective(target):.0f} effective arms")
    left.set(xlabel="advantage A", ylabel="-c times eta, at ratio 1", title="js")
    right.set(xlabel="arm", ylabel="target probability", yscale="log", ylim=(1e-5, 1), title="pi_old e^(A / eta)")
    left.legend(fontsize="small")
    right.legend(fontsize="x-small", loc="upper right")


def plot_level(figure: Figure) -> None:
    """-c per token against the completion's length when every token has drifted by 0.005 nats towards the target."""
    lengths = [int(n) for n in torch.logspace(0, 3, 40)]
    axes = figure.subplots()
    for level, line in (("token", "-"), ("sequence", "--"), ("sequence_sum", "-")):
        axes.plot(lengths, by_length(level, lengths, drift=0.005, target=4.0), line, label=level)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="tokens of the completion", ylabel="-c of a token times their number", xscale="log")
    axes.set(yscale="symlog", title="js, u = 4")
    axes.legend()


PLOTS: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "divergences-advantage.png": (plot_advantage, (10, 4)),
    "divergences-ratio.png": (plot_ratio, (10, 4)),
    "divergences-eta.png": (plot_eta, (10, 4)),
    "divergences-level.png": (plot_level, (6, 4)),
}


def effective(p: Tensor) -> float:
    """exp(entropy) of probabilities [ARMS]."""
    return torch.special.entr(p).sum().exp().item()


def coefficient_table() -> Sheet:
    """-c at ratio 1 of a right and a wrong answer, binary reward, groups of 8, for the divergences and some eta."""
    rows = []
    for right in RIGHT:
        rewards = (torch.arange(8) < right).double()  # [8]
        a = group_advantages(rewards, group_size=8)[[0, -1]]  # [2], of a right and of a wrong answer
        for eta in ETAS[::2]:
            row = [f"{right} of 8", f"{eta:g}", " / ".join(f"{x:+.2g}" for x in (a / eta).tolist())]
            for name in DIVERGENCES:
                c = -coefficients(LADConfig(name, eta=eta), torch.zeros(2), a)  # [2]
                row.append(" / ".join(f"{x:+.2g}" for x in c.tolist()))
            rows.append(row)
    return Sheet("", ["right answers", "eta", "u", *DIVERGENCES], rows)


def bandit_distances(
    configs: dict[str, LADConfig], steps: int = 4000, seeds: int = 2
) -> dict[str, float]:  # total variation to the target, mean over seeds
    """The bandit of `integration.bandit` for any configuration; `target_norm` uses the 32 draws of a step."""
    bounds = torch.arange(seeds * bandit.DRAWS + 1)  # [N + 1], N = S * DRAWS completions of one token

    def loss(config: LADConfig) -> bandit.Loss:
        given = {"cu_seqlens": bounds, "group_size": bandit.DRAWS, "config": config}
        return lambda logp, old, adv: lad_loss(logp, old, adv, **given).loss

    losses, found = {name: loss(config) for name, config in configs.items()}, {}
    policies = bandit.train_logits(losses, steps, seeds).softmax(-1)  # [K, S, ARMS]
    for (name, config), policy in zip(configs.items(), policies):
        target = torch.softmax(bandit.advantage_curve() / config.eta, 0)  # [ARMS]
        found[name] = 0.5 * (policy - target).abs().sum(-1).mean().item()
    return found


def bandit_table() -> Sheet:
    """Distance to the target by divergence and eta, without and with `target_norm`."""
    rows = []
    for norm in (None, "group"):
        for name in DIVERGENCES:
            configs = {f"{eta:g}": LADConfig(name, eta=eta, target_norm=norm) for eta in ETAS}
            rows.append([name, str(norm), *(f"{x:.3f}" for x in bandit_distances(configs).values())])
    return Sheet("", ["divergence", "target_norm", *(f"eta {eta:g}" for eta in ETAS)], rows)


TABLES: dict[str, Callable[[], Sheet]] = {
    "coefficients": coefficient_table,
    "head-share": head_share.share_table,
    "memory": head_share.memory_table,
}
MEASURED: dict[str, Callable[[], Sheet]] = {"bandit": bandit_table}


def fill(text: str, tables: dict[str, Callable[[], Sheet]]) -> str:
    """A page with the tables of these names made anew; others stay as they are."""

    def made(match: re.Match) -> str:
        body = tables[match[1]]().markdown().split("\n\n", 1)[1] if match[1] in tables else match[2]
        return f"<!-- table: {match[1]} -->\n{body.strip()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", made, text, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the bandits of the measured table too")
    measure = parser.parse_args(arguments).measure
    for name, (plot, size) in PLOTS.items():
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(DOCS / name, dpi=100)
    for name in PAGES:
        page = DOCS / name
        page.write_text(fill(page.read_text(), TABLES | (MEASURED if measure else {})))


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny tensors
    main()
