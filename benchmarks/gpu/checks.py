"""The GPU experiments that check, or compare whole providers (peers, LAD against GRPO); see `experiments.py`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import verdicts
from benchmarks.gpu.head_shapes import ROUNDS, Gate, peak_mib, timed
from benchmarks.gpu.run import Run
from benchmarks.harness import gate
from benchmarks.harness.data import EVERYWHERE, Batch, fit, make_batch
from benchmarks.harness.eager import EAGER
from benchmarks.harness.measure import claim, describe, peak_bytes_cuda, ratio, summary
from benchmarks.harness.provider import Provider
from benchmarks.harness.providers import PROMISE, TAIL_MASS, all_providers, our_loss, split_available
from benchmarks.harness.shapes import REAL_TOKENS, TINY, Shape
from lad_kernels import (
    GRPOConfig,
    LADConfig,
    group_advantages,
    grpo_loss,
    lad_loss,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    reference,
)
from lad_kernels.head import dispatch
from lad_kernels.objective import DIVERGENCES, LEVELS
from lad_kernels.testing import CONTRACT_MARGIN, FP32_TOLERANCE, check_head, make_inputs, relative_error

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def correctness(run: Run) -> None:
    """Uninitialised memory is NaN throughout. The exit status is that of our own functions."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the library is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = [*head_options(run), *repeats(run), *gates(run), *objectives(run)]
    if failed:
        raise SystemExit(f"outside the rule: {', '.join(failed)}")


def dtypes(run: Run) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if run.dry_run else (torch.bfloat16, torch.float16, torch.float32)


def gates(run: Run) -> Iterator[str]:
    """The gate for every provider that can run; yields those of ours that miss it."""
    for dtype in dtypes(run):
        for data in ("flat",) if run.dry_run else ("flat", "peaked"):
            batch = gate.gate_batch(data, dtype, run.device)
            providers, missing = split_available([*all_providers(), *forced_providers(run.paths)], batch)
            if dtype is torch.bfloat16:  # another dtype's reason would hide that a peer takes this one
                run.missing(missing)
            for provider in sorted(providers, key=lambda p: not p.ours):
                if "compiled" in provider.tags:
                    continue
                label = dict(provider=provider.name, job=provider.job, dtype=str(dtype)[6:], data=data)
                try:
                    verdict = gate.measure(provider, batch)
                except Exception as error:  # reported; ours also fail the run
                    run.add("gate", **label, note=describe(error))
                    if provider.ours:
                        yield f"{provider.name} {provider.job}"
                    continue
                shown = {name.replace(" ", "_"): f"{e:.1e} of {a:.1e}" for name, (e, a) in verdict.report.items()}
                run.add("gate", **label, **shown, outside=", ".join(verdict.failed))
                if provider.ours and verdict.failed:
                    yield f"{provider.name} {provider.job} {dtype} {data}"


def forced_providers(paths: list[str]) -> list[Provider]:
    """Our loss on each path, which the model of dispatch.py would not choose for inputs as small as the gate's."""
    loss = our_loss(linear_lad_loss, "triton", config=LADConfig(tail_mass=TAIL_MASS))

    def provider(path: str) -> Provider:
        def forward(batch: Batch) -> torch.Tensor:  # []
            with dispatch.force(path):
                return loss(batch)

        return Provider(f"{path}, forced", "lad", forward, ours=True, promise=PROMISE * (path == "routed"))

    return [provider(path) for path in paths]


def head_options(run: Run) -> Iterator[str]:
    """linear_logprobs with every logit transform, a bias, masked tokens and the entropy's gradient."""
    options = dict(bias=True, logit_scale=0.7, softcap=9.0, temperature=0.8)
    for dtype in dtypes(run):
        inputs = make_inputs(150, 64, 600, dtype=dtype, device=run.device, **options)
        upstream = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(run.device)
        head = lambda *args, **kw: linear_logprobs(*args, **kw, impl="triton")  # noqa: E731
        row = dict(check="linear_logprobs, all options", case=str(dtype)[6:])
        try:
            report = check_head(head, inputs, entropy_upstream=upstream)
        except Exception as error:
            run.add("checks", **row, worst_share_of_allowance=None, note=describe(error))
            yield row["check"]
        else:
            run.add("checks", **row, worst_share_of_allowance=max(e / a for e, a in report.values()), note="")


def objective_cases(dry_run: bool) -> Iterator[tuple[str, Callable, Callable, LADConfig | GRPOConfig]]:
    for divergence in DIVERGENCES[:1] if dry_run else DIVERGENCES:
        for level in LEVELS[:2] if dry_run else LEVELS:
            config = LADConfig(divergence=divergence, eta=1.0, importance_sampling_level=level)
            yield f"lad_loss {divergence} {level}", lad_loss, reference.lad_loss, config
    for kind in ("ppo", "cispo", "reinforce"):
        yield f"grpo_loss {kind}", grpo_loss, reference.grpo_loss, GRPOConfig(policy_loss=kind)
    for level in LEVELS[1:]:
        config = GRPOConfig(importance_sampling_level=level)
        yield f"grpo_loss ppo {level}", grpo_loss, reference.grpo_loss, config


def objectives(run: Run) -> Iterator[str]:
    """Loss gradients from given log-probs, and advantages, against float64."""
    gen = torch.Generator().manual_seed(2)
    logprobs = (-3 * torch.rand(6, 37, generator=gen)).to(run.device)  # [B, T]
    old = (logprobs + 0.1 * torch.randn(6, 37, generator=gen).to(run.device)).clamp(max=0)  # [B, T]
    mask = (torch.rand(6, 37, generator=gen) > 0.2).to(run.device)  # [B, T]
    advantages = torch.randn(6, generator=gen).to(run.device)  # [B]

    def gradient(loss: Callable, config: object, dtype: torch.dtype, **impl: str) -> torch.Tensor:  # [B, T]
        leaf = logprobs.to(dtype).requires_grad_()
        out = loss(leaf, old.to(dtype), advantages.to(dtype), loss_mask=mask, config=config, **impl)
        return torch.autograd.grad(out.loss, leaf)[0]

    for name, ours, plain, config in objective_cases(run.dry_run):
        if run.time_left() < 8:  # each case is a kernel to compile; the test suite has them all
            run.add("checks", check=name, case="float32", worst_share_of_allowance=None, note="not reached")
            continue
        truth = gradient(plain, config, torch.float64)
        allowed = CONTRACT_MARGIN * relative_error(gradient(plain, config, torch.float32), truth)
        found = relative_error(gradient(ours, config, torch.float32, impl="triton"), truth)
        share = found / max(allowed, FP32_TOLERANCE)
        run.add("checks", check=name, case="float32", worst_share_of_allowance=share, note="")
        if not share <= 1:
            yield name
    rewards = (100 + 0.01 * torch.randn(24, generator=gen)).to(run.device)  # [B]
    truth = reference.group_advantages(rewards.double(), group_size=8)
    share = relative_error(group_advantages(rewards, group_size=8, impl="triton"), truth) / 1e-4
    run.add(
        "checks",
        check="group_advantages, rewards 100 +- 0.01",
        case="float32",
        worst_share_of_allowance=share,
        note="float32 rewards: 1e-4",
    )
    if not share <= 1:
        yield "group_advantages"


def repeats(run: Run) -> Iterator[str]:
    """Two runs on one path agree bitwise; a token's log-prob does not depend on its neighbours."""
    shape = TINY[1] if run.dry_run else Shape("repeat", 8, 333, 1024, 50_304, "several waves of tiles, odd N")
    b = make_batch(shape, "peaked", torch.bfloat16, run.device)

    def whole(loss: Callable, path: str) -> list[torch.Tensor]:
        padded = b.hidden.view(*b.padded, -1), b.weight, b.targets.view(b.padded), b.old_logprobs
        with dispatch.force(path):
            out = loss(*padded, advantages=b.advantages, impl="triton")
        found = torch.autograd.grad(out.loss, (b.hidden, b.weight))
        return [out.loss.detach(), out.logprobs, *found, out.metrics["head_flops"]]

    losses = (linear_lad_loss,) if run.dry_run else (linear_lad_loss, linear_grpo_loss)
    for loss, path in itertools.product(losses, run.paths):
        first, check = whole(loss, path), f"{loss.__name__} twice, {path}"
        same = all(torch.equal(x, y) for x, y in zip(first, whole(loss, path)))
        passes = 2 * first[-1].item() / shape.flops
        run.add(
            "checks",
            check=check,
            case="bitwise",
            worst_share_of_allowance=None,
            note=f"{'equal' if same else 'DIFFERENT'}, {passes:.3g} N D V",
        )
        if not same:
            yield check
    with torch.no_grad():
        full = linear_logprobs(b.hidden, b.weight, b.targets, impl="triton")
        part = linear_logprobs(b.hidden[:37], b.weight, b.targets[:37], impl="triton")
    same = torch.equal(full.logprobs[:37], part.logprobs)
    run.add(
        "checks",
        check="log-probs of 37 tokens alone and in the batch",
        case="bitwise",
        worst_share_of_allowance=None,
        note="equal" if same else "DIFFERENT",
    )
    if not same:
        yield "batch invariance"


# A cut loses the last: first what tests the kernels themselves, then the rest of these folders.
FIRST = (
    "head/test_routed_kernels.py", "head/test_route_kernels.py", "head/test_one_pass_kernels.py",
    "head/test_head_kernels.py", "objective/test_objective_kernel.py", "head/test_paths.py", "loss/test_loss.py",
    "loss/test_cross_entropy.py", "loss/test_policy_loss.py",
)  # fmt: skip
FOLDERS = ("head", "objective", "loss")
# Compiling for other GPUs needs none; neither do impl="torch", processes on a CPU and what only it traces. Planted bugs
# may index beyond a tensor, which ends the process's use of the device.
LEFT_OUT = (
    "mutants",
    "compiles",
    "test_compiled_checks",
    "test_operator",
    "distributed",
    "soak",
    "test_fuzz",
    "test_values",
)
WITH_KERNELS = f"not ({' or '.join(LEFT_OUT)} or [torch] or [torch- or -torch] or -torch-)"
WORKERS = 16
LONGEST = 90  # seconds of a test
SHOWN = 100_000  # characters of tracebacks


def test_suite(run: Run) -> None:
    """The repository's tests of everything that launches a kernel; a cut keeps verdicts and tracebacks so far."""
    if run.dry_run:
        run_tests(run, ["-n", "0", "tests/head/test_head.py", "-k", "test_parity_with_float64 and float32 and one"])
    else:
        tests = ROOT / "tests"
        others = sorted(str(f.relative_to(tests)) for folder in FOLDERS for f in (tests / folder).glob("test_*.py"))
        files = dict.fromkeys((*FIRST, *others))
        limits = [f"--timeout={LONGEST}", "--timeout-method=thread"]  # ends the worker, which xdist replaces
        run_tests(run, ["-n", str(WORKERS), *limits, "-k", WITH_KERNELS, *(f"tests/{f}" for f in files)])


def run_tests(run: Run, arguments: Sequence[str]) -> None:
    record, output = run.path.with_suffix(".jsonl"), run.path.with_suffix(".txt")
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.verdicts"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, *arguments]
    environment = {**os.environ, "VERDICTS": str(record), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with output.open("w") as out:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
                timeout=run.time_left() - 3,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    rows = verdicts.read(record)
    failed = [row for row in rows.values() if row["outcome"] in ("failed", "error")]
    print("".join(f"==== {row['test']}\n{row['text']}\n" for row in failed)[:SHOWN])
    print(output.read_text(errors="replace")[-5000:])
    said = "cut" if code is None else f"exit status {code}"
    counts = Counter(row["outcome"] for row in rows.values())
    run.add("test suite", outcome=said, **{word: counts[word] for word in ("passed", "failed", "error", "skipped")})
    for row in failed:
        run.add("failed tests", test=row["test"], why=row["why"])
    for file, spent in by_file(rows).items():
        run.add("test files", file=file, **spent)
    if code != 0:
        raise SystemExit(f"pytest: {said}")


def by_file(rows: dict[str, dict]) -> dict[str, dict]:
    """How many tests of each file have ended, what they took in all, and the slowest."""
    found: dict[str, list[dict]] = {}
    for row in rows.values():
        found.setdefault(row["test"].split("::")[0], []).append(row)
    slowest = {file: max(group, key=lambda r: r["seconds"]) for file, group in found.items()}
    return {
        file: dict(
            ended=len(group),
            seconds=sum(r["seconds"] for r in group),
            slowest=slowest[file]["test"],
            its_seconds=slowest[file]["seconds"],
        )
        for file, group in found.items()
    }


def lad_against_grpo(run: Run) -> None:
    """The ratio of the two losses in the same kernels, and of LAD to eager GRPO, in time and peak memory."""
    cases = [*itertools.product(run.shapes[:2], ("flat", "peaked")), (REAL_TOKENS["gpu"], "real, T=0.6")]
    for shape, data in cases[:1] if run.dry_run else cases:
        if run.has(data):
            shape = fit(shape, data)
            batches = run.batches(shape, data)
            ours = "lad_kernels (triton)"
            lad, grpo = (next(p for p in all_providers(job) if p.name == ours) for job in ("lad", "grpo"))
            eager = next(p for p in all_providers("grpo") if p.name == EAGER)
            row = claim(lad, grpo, eager, batches, 1 if run.dry_run else 30)
            if run.device == "cuda":
                peaks = [peak_bytes_cuda(p, batches[0]) for p in (lad, grpo, eager)]
                row |= {"memory_ratio": peaks[0] / peaks[1], "lad_to_eager_grpo_memory": peaks[0] / peaks[2]}
            run.add("lad against grpo", shape=str(shape), data=data, impl="triton", **row)
            del batches
            if run.time_left() < 10:
                return


def peers(run: Run, *, slow: bool = False) -> None:
    """Everything that is installed, on the same inputs in turns: the first shape and a policy's, then the others."""
    verdicts, policy = Gate(run), REAL_TOKENS["tiny" if run.dry_run else "gpu"]
    cases = [(policy if "real" in data else run.shapes[0], data) for data in EVERYWHERE]
    cases += [(run.shapes[i], "flat") for i in (() if slow or run.dry_run else (1, 4, 8, 6, 7, 3, 5, 2))]
    for shape, data in cases[::3] if run.dry_run else cases:
        if run.has(data):
            shape = fit(shape, data)
            batches = run.batches(shape, data)
            available, missing = split_available(all_providers(), batches[0])
            run.missing(missing)
            for job in ("head", "lad", "grpo", "ce"):
                if run.time_left() < 6:
                    return
                chosen = [p for p in available if p.job == job and not p.name.startswith("lad_kernels (torch)")]
                chosen = [p for p in chosen if ("compiled" in p.tags) == slow or p.name == EAGER]
                if not slow or len(chosen) > 1:
                    compare(run, verdicts(chosen, data), job, shape, data, batches)
            del batches


def compare(
    run: Run, verdicts: dict[Provider, gate.Verdict], job: str, shape: Shape, data: str, batches: list[Batch]
) -> None:
    """Rounds, then memory; one row per provider. Our PyTorch path takes true float32 products, seconds on CUDA."""
    rounds = timed(list(verdicts), batches, min(ROUNDS, run.repeats), run.time_left)
    run.missing(rounds.failed)
    baseline = next((s for p, s in rounds.samples.items() if p.name == EAGER), None)
    for provider, samples in rounds.samples.items():
        run.add(
            "speed", job=job, shape=str(shape), data=data, dtype="bfloat16", provider=provider.name,
            ours=provider.ours, note=provider.note, rounds=len(samples), **summary(samples),
            vs_eager=ratio(samples, baseline) if baseline else None, errors=verdicts[provider].errors,
            outside=verdicts[provider].failed,
        )  # fmt: skip
        if data != "peaked" and (beyond := peak_mib(run, provider, batches[0])) is not None:
            run.add(
                "memory",
                job=job,
                shape=str(shape) if data == "flat" else f"{shape}, {data}",
                provider=provider.name,
                ours=provider.ours,
                peak_mib=beyond + batches[0].gradient_bytes / MIB,
                beyond_gradients_mib=beyond,
            )


def slow_peers(run: Run) -> None:
    """Peers for torch.compile and other providers that take long to start."""
    if run.dry_run:
        run.missing({"providers that compile for long": "not run dry"})
        return
    peers(run, slow=True)


EXPERIMENTS: dict[str, Callable[[Run], None]] = {
    f.__name__: f for f in (correctness, test_suite, lad_against_grpo, peers, slow_peers)
}
