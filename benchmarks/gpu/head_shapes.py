"""The shapes that others publish: N = 8,192 tokens of a 7B or 8B model, forward and backward, next to bare products.

V = 151,936 is what TRL's maintainers ask about, V = 128,256 what Liger's and QuACK's tables show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.kernels import library_ms
from benchmarks.gpu.run import Run
from benchmarks.harness import gate
from benchmarks.harness.data import Batch, fit
from benchmarks.harness.eager import EAGER
from benchmarks.harness.measure import Rounds, describe, peak_bytes_cuda, ratio, summary
from benchmarks.harness.provider import Provider
from benchmarks.harness.providers import all_providers, split_available
from benchmarks.harness.shapes import REAL_TOKENS, TINY, Shape

MIB = 2**20
ROUNDS = 7
SHAPES = (
    Shape("TRL request", 8, 1024, 4096, 151_936, "what TRL's maintainers ask a fused loss head to do"),
    Shape("Llama-3-8B vocabulary", 8, 1024, 4096, 128_256, "the shape of Liger's published table"),
    REAL_TOKENS["gpu"],
)
CASES = (  # shape, data, jobs; most telling first
    (0, "flat", ("lad", "ce")),
    (2, "real, T=1", ("lad",)),
    (2, "real, T=0.6", ("lad", "grpo")),
    (0, "peaked", ("lad", "grpo")),
    (1, "flat", ("ce", "lad")),
    (1, "peaked", ("lad",)),
    (0, "flat", ("grpo", "head")),
)


class Gate:
    """Verdicts of gate.py, one for each provider and data set of a process, as they do not depend on the shape."""

    def __init__(self, run: Run):
        self.run, self.known = run, {}

    def __call__(self, providers: list[Provider], data: str) -> dict[Provider, gate.Verdict]:
        """The providers that may be timed; why the others may not stands among what is missing."""
        for p in providers:
            if (p.name, p.job, data) not in self.known:
                try:
                    verdict = gate.check(
                        p, gate.gate_batch(data, torch.bfloat16, self.run.device, small=self.run.dry_run)
                    )
                except Exception as error:
                    self.run.missing({f"{p.name}, {p.job}": f"gate {describe(error)}"})
                    verdict = None
                self.known[p.name, p.job, data] = verdict
        found = {p: self.known[p.name, p.job, data] for p in providers}
        return {p: verdict for p, verdict in found.items() if verdict is not None}


def timed(providers: list[Provider], batches: list[Batch], rounds: int, time_left: Callable[[], float]) -> Rounds:
    """Rounds in turns. A provider that takes 5 times the eager step is left out after its third."""
    found = Rounds(providers, batches)
    found.warm()
    for count in range(rounds):
        if count >= 3 and time_left() < 6:
            break
        found()
        eager = next((sum(s[-1]) for p, s in found.samples.items() if p.name == EAGER), None)
        if count == 2 and eager is not None:
            found.providers = [p for p in found.providers if sum(found.samples[p][-1]) < 5 * eager]
    return found


def peak_mib(run: Run, provider: Provider, batch: Batch) -> float | None:
    """MiB of a step beyond inputs and gradients; None off CUDA or where memory ran out."""
    if run.device != "cuda":
        return None
    try:
        return max(peak_bytes_cuda(provider, batch) - batch.gradient_bytes, 0) / MIB
    except RuntimeError as error:  # out of memory: a result
        run.missing({f"{provider.name}, memory": describe(error)})
        torch.cuda.empty_cache()
        return None


@torch.no_grad()
def logprob_errors(run: Run, shape: Shape, data: str, batch: Batch) -> None:
    """Absolute errors of the first tokens' log-probs, in nats, against float64; one row per provider of the head."""
    rows = slice(0, 64 if run.dry_run else 512)
    hidden, targets = batch.hidden[rows].double(), batch.targets[rows]  # [R, D], [R]
    logits = hidden @ batch.weight.double().T  # [R, V]
    truth = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # [R]
    largest = logits.abs().max().item()
    del logits
    providers = [p for p in split_available(all_providers("head"), batch)[0] if not p.tags]
    for p in sorted(providers, key=lambda p: not p.ours):
        if run.time_left() < 20:
            return
        try:
            error = (p.forward(batch)[rows].double() - truth).abs()  # [R]
        except Exception as problem:
            run.missing({f"{p.name}, log-prob error": describe(problem)})
            continue
        run.add(
            "log-prob error",
            shape=str(shape),
            data=data,
            provider=p.name,
            tokens=len(truth),
            largest_error=error.max().item(),
            mean_error=error.mean().item(),
            largest_logit=largest,
        )


def head_shapes(run: Run) -> None:
    """Rows: three bare products, then every provider of a job, its time over theirs, its memory beyond gradients."""
    shapes = (TINY[0],) * len(SHAPES) if run.dry_run else SHAPES
    verdicts, products, checked = Gate(run), {}, set()
    for at, data, jobs in CASES[:2] if run.dry_run else CASES:
        if not run.has(data):
            continue
        shape = fit(shapes[at], data)
        if at not in products:
            products[at] = library_ms(run, shape)
            run.add(
                "head shapes",
                shape=str(shape),
                data="",
                job="products",
                provider="three bare products",
                ms=[products[at]] * 3,
                of_three_products=1.0,
                beyond_gradients_mib=None,
                vs_eager=None,
                note="",
            )
        batches = run.batches(shape, data)
        if (at, data) not in checked:
            logprob_errors(run, shape, data, batches[0])
            checked.add((at, data))
        for job in jobs:
            if run.time_left() < 8:
                return
            available, missing = split_available(all_providers(job), batches[0])
            run.missing(missing)
            wanted = [p for p in available if "compiled" not in p.tags and not p.name.startswith("lad_kernels (torch)")]
            allowed = verdicts(wanted, data)
            rounds = timed(list(allowed), batches, min(ROUNDS, run.repeats), run.time_left)
            run.missing(rounds.failed)
            baseline = next((s for p, s in rounds.samples.items() if p.name == EAGER), None)
            memory = partial(peak_mib, run)
            for p, samples in rounds.samples.items():
                ms = summary(samples)["total_ms"]
                run.add(
                    "head shapes",
                    shape=str(shape),
                    data=data,
                    job=job,
                    provider=p.name,
                    ms=ms,
                    of_three_products=ms[1] / products[at],
                    beyond_gradients_mib=memory(p, batches[0]),
                    vs_eager=ratio(samples, baseline) if baseline else None,
                    rounds=len(samples),
                    note=", ".join([p.note] * bool(p.note) + [f"outside the rule: {x}" for x in allowed[p].failed]),
                )
        del batches
        if run.device == "cuda":
            torch.cuda.empty_cache()


EXPERIMENTS: dict[str, Callable[[Run], None]] = {"head_shapes": head_shapes}
