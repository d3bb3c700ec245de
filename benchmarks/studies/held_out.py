"""A peaked policy of another kind than the benchmarks' own, each call the first of its process, on one CPU thread.

    python -m benchmarks.studies.held_out     eight minutes of one core, 8 GB

Speed on low-entropy data was tuned on `data.py`'s peaked states. Here the words of a Zipf vocabulary have lengths of
their own, and a hidden state mixes 1 to 11 of them; mean entropy 0.4 nats, as there. A first call has no warm memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks.harness import machine
from benchmarks.harness.data import DRIFT, Batch
from benchmarks.harness.eager import EAGER, eager_lad
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.shapes import Shape
from lad_kernels import LADConfig, linear_lad_loss
from lad_kernels.testing import relative_error, sample_targets

FILE = RESULTS / "cpu-2core" / "held-out.json"
SHAPE = Shape("Qwen 0.5B", 8, 128, 896, 151_936, "a whole vocabulary")
ENTROPY, WORDS, TAIL_MASS, ROUNDS = 0.4, 11, 3e-4, 5
OURS = {"exact": 0.0, "routed": TAIL_MASS}


def make_batch(seed: int = 0) -> Batch:
    n, d, v = SHAPE.tokens, SHAPE.hidden_size, SHAPE.vocab_size
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=gen) / d**0.5  # [V, D]
    weight *= (0.15 * torch.randn(v, 1, generator=gen)).exp()
    frequency = torch.arange(1, v + 1) ** -1.05  # [V]
    ids = torch.multinomial(frequency, n * WORDS, replacement=True, generator=gen).view(n, WORDS)
    share = -torch.rand(n, WORDS, generator=gen).log()  # [N, WORDS] exponential, so Dirichlet once divided
    share *= torch.arange(WORDS) < torch.randint(1, WORDS + 1, (n, 1), generator=gen)
    hidden = (weight[ids] * (share / share.sum(1, keepdim=True))[..., None]).sum(1)  # [N, D]
    hidden += 0.05 * torch.randn(n, d, generator=gen) / d**0.5
    probe, low, high = hidden[:128] @ weight.T, 0.0, 1e4  # [128, V]
    for _ in range(40):
        log_p = (probe * (low + high) / 2).log_softmax(1)
        peaked = -(log_p.exp() * log_p).sum(1).mean() <= ENTROPY
        low, high = (low, (low + high) / 2) if peaked else ((low + high) / 2, high)
    hidden *= high
    targets = sample_targets(hidden, weight, gen)  # [N]
    every = torch.cat([(h @ weight.T).log_softmax(1) for h in hidden.split(256)])  # [N, V]
    logprobs = every.gather(1, targets[:, None])  # [N, 1]
    drift = DRIFT * torch.randn(n, 1, generator=gen)  # [N, 1]
    old = (logprobs + drift).clamp(max=0.0).view(SHAPE.sequences, -1)  # [B, T]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return Batch(*leaves, targets, drift[:, 0], old, torch.randn(SHAPE.sequences, generator=gen))


def step(provider: str, batch: Batch) -> tuple[float, float, list[torch.Tensor]]:
    """(seconds of this thread, share of pairs kept, gradients [N, D] and [V, D])."""
    batch.hidden.grad = batch.weight.grad = None
    start, kept = time.thread_time(), 1.0
    if provider == EAGER:
        eager_lad(batch).backward()
    else:
        b, t = batch.padded
        out = linear_lad_loss(
            batch.hidden.view(b, t, -1),
            batch.weight,
            batch.targets.view(b, t),
            batch.old_logprobs,
            advantages=batch.advantages,
            config=LADConfig(tail_mass=OURS[provider]),
        )
        out.loss.backward()
        kept = out.metrics["kept_share"].item()
    return time.thread_time() - start, kept, [batch.hidden.grad, batch.weight.grad]


def first_call(provider: str, compare: bool) -> None:
    """Print its seconds and share of pairs; with `compare` how far its gradients are off those of stored logits."""
    torch.set_num_threads(1)
    machine.flush_subnormals()
    batch = make_batch()
    seconds, kept, found = step(provider, batch)
    row = {"seconds": seconds, "kept": kept}
    if compare:
        _, _, truth = step(EAGER, batch)
        row |= {f"{name} off": relative_error(x, y) for name, x, y in zip(("dH", "dW"), found, truth)}
    print(json.dumps(row))


def main() -> None:
    results = Results(machine.describe("cpu", "python -m benchmarks.studies.held_out"))
    results.machine["notes"] = ["One thread; CPU time; subnormal numbers are flushed to zero."]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (EAGER, *OURS)}
    for i in range(ROUNDS):
        for name, found in rounds.items():
            command = [sys.executable, "-m", "benchmarks.studies.held_out", name, *["compare"] * (i == 0)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for name, found in rounds.items():
        ratios = [x["seconds"] / y["seconds"] for x, y in zip(found, rounds[EAGER])]
        row = {"provider": name, "ms": 1e3 * median(x["seconds"] for x in found), "vs_eager": median(ratios)}
        row |= {"interval": [min(ratios), max(ratios)], **{key: found[0][key] for key in ("kept", "dH off", "dW off")}}
        results.add("held-out policy, first call", shape=str(SHAPE), **row)
        print(*row.values(), flush=True)
    results.save(FILE)


if __name__ == "__main__":
    first_call(sys.argv[1], len(sys.argv) > 2) if len(sys.argv) > 1 else main()
