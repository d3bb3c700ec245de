"""Hidden states of a small trained policy over a real vocabulary, and what a routed backward does to their gradient.

python -m benchmarks.studies.policy_states train       a tokenizer and a causal LM from this machine's Python files
python -m benchmarks.studies.policy_states states      completions sampled from it, one file of states per temperature
python -m benchmarks.studies.policy_states report      sparsity and errors by entropy; benchmarks/results/policy_states/

The model is small and briefly trained, and nothing about it is chosen to suit the package, not even its entropy.
Other code reads the data by `load_states` and `sparsity_table`. `transformers` and `tokenizers` are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.harness import machine
from benchmarks.harness.data import ENTROPY
from benchmarks.harness.results import RESULTS, Results
from lad_kernels import linear_logprobs
from lad_kernels.head.records import BLOCK
from lad_kernels.testing import relative_error, sample_targets

RUNS = Path("runs/policy_states")
VOCABULARY = 32_768
CORPUS_BYTES = 60_000_000
SUFFIXES = (".py", ".md", ".rst", ".txt")
SEPARATOR = "<|endoftext|>"  # id 0, between files
HELD_OUT = 20  # every so many files, one is held out
BATCH, LENGTH = 16, 128  # sequences and tokens of a training step
PROMPT, COMPLETION, COMPLETIONS = 32, 96, 43  # tokens, tokens, completions per temperature: 4,128 tokens
TEMPERATURES = (1.0, 0.6, 0.3)
THETAS = (1e-3, 3e-4, 1e-4)
TAIL_THETA = 3e-4
REPORT_TOKENS = 2048  # at most; whole completions
CHUNK = 128  # tokens whose float64 logits exist at once


class States(NamedTuple):
    """Tokens of one policy at one temperature, completion after completion."""

    hidden: Tensor  # [N, D] float32: hidden[n] predicts targets[n]
    weight: Tensor  # [V, D] float32
    targets: Tensor  # [N] int64
    temperature: float


# ------------------------------------------------------------------------------------------------------- training


def corpus_files() -> Iterator[tuple[str, Path]]:
    """(name, path) of the standard library's text files, then of the installed packages', sorted within each."""
    library, packages = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    for root, skip in ((library, {"site-packages", "dist-packages"}), (packages, set())):
        for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            name = path.relative_to(root)
            if not skip & set(name.parts):
                yield f"{root.name}/{name}", path


def read_corpus() -> tuple[list[str], list[str], dict]:
    """Texts to train on, texts held out, and a record of both; stops at CORPUS_BYTES."""
    train, held_out, size, digest = [], [], 0, hashlib.sha256()
    for i, (name, path) in enumerate(corpus_files()):
        content = path.read_bytes()
        if size + len(content) > CORPUS_BYTES:
            break
        size += len(content)
        digest.update(name.encode() + content)
        (held_out if i % HELD_OUT == HELD_OUT - 1 else train).append(content.decode("utf-8", errors="replace"))
    return train, held_out, {"files": len(train) + len(held_out), "bytes": size, "sha256": digest.hexdigest()}


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [SEPARATOR], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **options))
    return tokenizer


def encode(tokenizer, texts: list[str]) -> Tensor:  # [tokens] int64
    return torch.tensor([i for text in texts for i in (*tokenizer.encode(text).ids, 0)])


def windows(tokens: Tensor, count: int, length: int, gen: torch.Generator) -> Tensor:  # [count, length]
    starts = torch.randint(len(tokens) - length, (count, 1), generator=gen)  # [count, 1]
    return tokens[starts + torch.arange(length)]


def new_model(hidden: int, layers: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = hidden // 64
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def loss_of(model, batch: Tensor) -> Tensor:
    """Mean negative log-probability of batch[:, 1:]; batch is [B, T + 1]."""
    hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state  # [B, T, D]
    return -linear_logprobs(hidden, model.lm_head.weight, batch[:, 1:]).logprobs.mean()


def learning_rate(progress: float, peak: float = 2e-3) -> float:
    """A short linear rise, then a cosine down to a tenth; `progress` runs from 0 to 1."""
    return peak * min(1.0, (progress + 1e-3) / 0.02) * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0)))


def fit(model, train: Tensor, held_out: Tensor, minutes: float, seed: int) -> list[dict]:
    """Train until the wall clock says `minutes`; one row per minute with the held-out loss."""
    gen = torch.Generator().manual_seed(seed)
    probe = windows(held_out, 2 * BATCH, LENGTH + 1, torch.Generator().manual_seed(0))  # [2 BATCH, LENGTH + 1]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    log, losses, step, start = [], [], 0, time.monotonic()
    while (elapsed := (time.monotonic() - start) / 60) < minutes or losses:
        if elapsed >= min(len(log) + 1, minutes):
            with torch.no_grad():
                row = {"minutes": elapsed, "steps": step, "train": sum(losses) / max(len(losses), 1)}
                log.append(row | {"held_out": loss_of(model, probe).item()})
            losses = []
            print(", ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            continue
        optimizer.param_groups[0]["lr"] = learning_rate(elapsed / minutes)
        loss = loss_of(model, windows(train, BATCH, LENGTH + 1, gen))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
    return log


def train(out: Path, minutes: float, hidden: int, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    texts, held_out_texts, corpus = read_corpus()
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens, held_out = (encode(tokenizer, part) for part in (texts, held_out_texts))
    corpus |= {"train_tokens": len(tokens), "held_out_tokens": len(held_out), "vocabulary": tokenizer.get_vocab_size()}
    model = new_model(hidden, layers)
    log = fit(model, tokens, held_out, minutes, seed)
    model.save_pretrained(out)  # model.safetensors and config.json
    torch.save(held_out, out / "held_out.pt")
    options = {"minutes": minutes, "seed": seed, "batch": BATCH, "length": LENGTH}
    record = {"machine": machine.describe("cpu"), "options": options, "corpus": corpus, "log": log}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(model, prompts: Tensor, temperature: float, gen: torch.Generator) -> States:
    """Plain sampling of COMPLETION tokens after each prompt [B, PROMPT]."""
    ids, cache, hidden, targets = prompts, None, [], []
    for _ in range(COMPLETION):
        out = model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, h = out.past_key_values, out.last_hidden_state[:, -1]  # [B, D]
        ids = torch.multinomial((model.lm_head(h) / temperature).softmax(-1), 1, generator=gen)  # [B, 1]
        hidden.append(h)
        targets.append(ids[:, 0])
    weight = model.lm_head.weight.detach()  # [V, D]
    return States(torch.stack(hidden, 1).flatten(0, 1), weight, torch.stack(targets, 1).flatten(), temperature)


def states_file(path: Path, temperature: float) -> Path:
    return Path(path) / f"states-{float(temperature)}.pt"


def load_states(path: Path | str = RUNS, temperature: float = 1.0) -> States:
    return States(**torch.load(states_file(path, temperature), weights_only=True))


def write_states(out: Path, temperatures: Sequence[float], seed: int) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    gen = torch.Generator().manual_seed(seed)
    prompts = windows(torch.load(out / "held_out.pt", weights_only=True), COMPLETIONS, PROMPT, gen)  # [B, PROMPT]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for temperature in temperatures:
        states = sample(model, prompts, temperature, torch.Generator().manual_seed(seed + 1))
        torch.save(states._asdict(), states_file(out, temperature))
        text = tokenizer.decode(states.targets[:COMPLETION].tolist())
        print(f"temperature {temperature}: {len(states.targets)} tokens; the first completion: {text[:160]!r}")


# --------------------------------------------------------------------------------------------------------- report

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (pieces, sizes) -> (pieces, pairs multiplied)


class Gradients(NamedTuple):
    """Gradients of one rule, float64, without the constant factor 1 / temperature."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    kept: Tensor  # [N] share of each token's pieces that are multiplied


class Policy(NamedTuple):
    entropy: Tensor  # [N] nats
    chosen: Tensor  # [N] probability of the target


def piece_sizes(p: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:  # [C, V/BLOCK]
    """The left side of the rule: the sum of |dZ| over each block, from block masses and the target's probability."""
    sizes = p.unflatten(1, (-1, BLOCK)).sum(-1)  # [C, V/BLOCK]
    chosen = p.gather(1, targets[:, None])  # [C, 1]
    sizes.scatter_add_(1, targets[:, None] // BLOCK, 1 - 2 * chosen)
    return sizes * coefficients.abs()[:, None]


def everything(pieces: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    return pieces, torch.ones_like(sizes)


def routed(
    pieces: Tensor,  # [C, V/BLOCK, BLOCK] of dZ
    sizes: Tensor,  # [C, V/BLOCK] in units of the mean |coefficient|
    *,
    theta: float,
    tail: str = "none",
) -> tuple[Tensor, Tensor]:
    """Drop pieces of at most theta; `tail` says what stands in for them."""
    if tail == "stochastic":
        probability = (sizes / theta).clamp(1e-300, 1.0)  # [C, V/BLOCK]
        kept = torch.rand_like(sizes) < probability
        return pieces * (kept / probability)[..., None], kept
    kept = sizes > theta  # [C, V/BLOCK]
    put_back = pieces.mean(-1, keepdim=True) if tail == "block means" else pieces.new_zeros(1)
    return torch.where(kept[..., None], pieces, put_back), kept


def gradients(states: States, coefficients: Tensor, rules: dict[str, Rule]) -> tuple[Policy, dict[str, Gradients]]:
    """The gradient of sum_n coefficients[n] (-log p_y) under each rule, in float64, CHUNK tokens at a time."""
    weight, targets = states.weight.double(), states.targets
    hidden, coefficients = states.hidden.double(), coefficients.double()
    unit = coefficients[coefficients != 0].abs().mean()
    policy = Policy(*(hidden.new_empty(len(hidden)) for _ in range(2)))
    found = {
        name: Gradients(torch.empty_like(hidden), torch.zeros_like(weight), torch.empty_like(policy.entropy))
        for name in rules
    }
    for rows in torch.arange(len(hidden)).split(CHUNK):
        h, y, c = hidden[rows], targets[rows], coefficients[rows]  # [C, D], [C], [C]
        p = (h @ weight.T).div_(states.temperature).softmax(-1)  # [C, V]
        policy.entropy[rows] = torch.special.entr(p).sum(-1)
        policy.chosen[rows] = p.gather(1, y[:, None])[:, 0]
        sizes = piece_sizes(p, y, c) / unit  # [C, V/BLOCK]
        p.scatter_add_(1, y[:, None], torch.full_like(y[:, None], -1, dtype=p.dtype))
        pieces = p.mul_(c[:, None]).unflatten(1, (-1, BLOCK))  # [C, V/BLOCK, BLOCK] of dZ
        for name, rule in rules.items():
            new, kept = rule(pieces, sizes)  # [C, V/BLOCK, BLOCK], [C, V/BLOCK]
            dz = new.flatten(1)  # [C, V]
            found[name].hidden[rows] = dz @ weight
            found[name].weight.addmm_(dz.T, h)
            found[name].kept[rows] = kept.double().mean(-1)
    return policy, found


def deciles(policy: Policy, truth: Gradients, found: dict[str, Gradients]) -> list[dict]:
    """Ten groups of tokens by entropy; for each theta the share of pairs kept and the error of their dH."""
    rows = []
    for i, tokens in enumerate(policy.entropy.argsort().tensor_split(10)):
        part = truth.hidden[tokens]  # [N / 10, D]
        row = {"decile": i + 1, "entropy": policy.entropy[tokens].mean().item()}
        row["share of dH squared"] = (part.square().sum() / truth.hidden.square().sum()).item()
        row |= {f"kept {name}": g.kept[tokens].mean().item() for name, g in found.items()}
        row |= {f"dH {name}": relative_error(g.hidden[tokens], part) for name, g in found.items()}
        rows.append(row)
    return rows


def quantiles(x: Tensor, *at: float) -> list[float]:
    return x.quantile(torch.tensor(at, dtype=x.dtype)).tolist()


def errors(states: States, truth: Gradients, g: Gradients) -> dict[str, float]:
    rows = torch.zeros(len(states.weight), dtype=torch.bool)  # [V]
    rows[states.targets] = True
    return {
        "kept": g.kept.mean().item(),
        "dH": relative_error(g.hidden, truth.hidden),
        "dW target rows": relative_error(g.weight[rows], truth.weight[rows]),
        "dW other rows": relative_error(g.weight[~rows], truth.weight[~rows]),
    }


def sparsity_table(states: States, theta: float, coefficients: Tensor) -> list[dict]:
    """Rows of `deciles` for one theta; coefficients [N] weigh the tokens' log-probabilities."""
    name = f"{theta:g}"
    policy, found = gradients(states, coefficients, {"truth": everything, name: partial(routed, theta=theta)})
    return deciles(policy, found.pop("truth"), found)


def permuted(states: States, seed: int) -> States:
    """The same policy with the vocabulary in a random order."""
    order = torch.randperm(len(states.weight), generator=torch.Generator().manual_seed(seed))  # [V]
    return states._replace(weight=states.weight[order], targets=order.argsort()[states.targets])


def flat(states: States, seed: int) -> States:
    """Random hidden states against the same weight: logits of unit variance in every row, targets sampled."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(states.hidden.shape, generator=gen)  # [N, D]
    for rows in hidden.split(CHUNK):
        rows /= (rows @ states.weight.T).std(-1, keepdim=True)  # [C, 1]
    return States(hidden, states.weight, sample_targets(hidden, states.weight, gen), 1.0)


def add_policy(results: Results, name: str, order: str, states: States, coefficients: Tensor) -> Policy:
    """Every table's rows for one policy and one order of the vocabulary."""
    tails = {tail: partial(routed, theta=TAIL_THETA, tail=tail) for tail in ("block means", "stochastic")}
    rules = {f"{theta:g}": partial(routed, theta=theta) for theta in THETAS}
    policy, found = gradients(states, coefficients, {"truth": everything} | rules | tails)
    truth, label = found.pop("truth"), {"policy": name, "order": order}
    by_theta = {rule: found[rule] for rule in rules}
    for row in deciles(policy, truth, by_theta):
        results.add("routing by entropy decile", **label, **row)
    for theta, g in by_theta.items():
        median, high = quantiles(g.kept, 0.5, 0.9)
        spread = {"kept, median token": median, "kept, 90th percentile token": high}
        results.add("routing, all tokens", **label, theta=theta, **errors(states, truth, g), **spread)
    for tail in ("none", *tails):
        g = by_theta[f"{TAIL_THETA:g}"] if tail == "none" else found[tail]
        results.add(f"tails at theta {TAIL_THETA:g}", **label, tail=tail, **errors(states, truth, g))
    return policy


def write_report(out: Path, temperatures: Sequence[float], seed: int) -> None:
    torch.manual_seed(seed)
    command = shlex.join(["python", "-m", "benchmarks.studies.policy_states", *sys.argv[1:]])
    results = Results(machine.describe("cpu", command) | {"notes": []})
    completions = REPORT_TOKENS // COMPLETION
    advantages = torch.randn(completions, generator=torch.Generator().manual_seed(seed))  # [completions]
    coefficients = advantages.repeat_interleave(COMPLETION)  # [N]
    first = slice(len(coefficients))
    for temperature in (*temperatures, None):  # None: the flat control
        states = load_states(out, temperature or temperatures[0])
        states = states._replace(hidden=states.hidden[first], targets=states.targets[first])
        name, states = (f"T={temperature:g}", states) if temperature else ("flat", flat(states, seed))
        policy = add_policy(results, name, "tokenizer", states, coefficients)
        add_policy(results, name, "random", permuted(states, seed), coefficients)
        entropy, certain = policy.entropy.mean().item(), (policy.chosen > 0.999).double().mean().item()
        size = {"tokens": len(coefficients), "vocabulary": len(states.weight), "hidden size": states.hidden.shape[1]}
        row = {"mean entropy": entropy, "entropy, quantiles 0.1, 0.5, 0.9": quantiles(policy.entropy, 0.1, 0.5, 0.9)}
        row |= {"targets with p > 0.999": certain, "distinct targets": len(states.targets.unique())}
        results.add("policies", policy=name, **row, **size)
        if temperature == 1.0:
            results.machine["notes"] = [
                f"Mean entropy at temperature 1 is {entropy:.3g} nats; under reinforcement learning about "
                f"{ENTROPY['peaked']} is usual. A lower temperature lowers it, which is not the same as such training."
            ]
        results.save(RESULTS / "policy_states" / "results.json")
    print(report.render([results]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "states", "report"))
    parser.add_argument("--out", type=Path, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40.0, help="train: wall clock")
    parser.add_argument("--hidden", type=int, default=256, help="train: a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="train")
    parser.add_argument("--temperature", type=float, nargs="+", default=TEMPERATURES, help="states and report")
    args = parser.parse_args()
    if args.step == "train":
        train(args.out, args.minutes, args.hidden, args.layers, args.seed)
    else:
        {"states": write_states, "report": write_report}[args.step](args.out, args.temperature, args.seed)


if __name__ == "__main__":
    main()
