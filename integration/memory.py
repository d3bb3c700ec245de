"""Peak memory and time of one loss with gradients at a real vocabulary: stored logits against lad_kernels.

Each provider runs in a process of its own, so that neither inherits the other's peak. On the CPU the peak is that of
the resident set above its size once the inputs exist; on CUDA it is the allocator's. Both include the gradients of
hidden states and weight, which every provider has to return.

    python -m integration.memory ours --tokens 512
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from integration.report import Sheet
from lad_kernels import lad_loss, linear_lad_loss

VOCABULARY = 151_936  # Qwen's


def eager(hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """LAD as trainers write it: every logit and every log-probability is stored."""
    logits = (hidden @ weight.T).float()  # [N, V]
    logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]  # [N]
    return lad_loss(logp, old_logp, advantages).loss


def ours(hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """The same number, with logits that exist a chunk at a time."""
    return linear_lad_loss(hidden, weight, target, old_logp, advantages=advantages).loss


PROVIDERS = {"eager": (eager, "eager torch, stored logits"), "ours": (ours, "linear_lad_loss")}


def resident_bytes(line: str = "VmRSS") -> int:
    """The resident set now, or its peak with `VmHWM`; where /proc is missing, its peak in both cases.

    `ru_maxrss` would not do on Linux: a process inherits the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(rf"{line}:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def measure(provider: str, tokens: int, hidden_size: int, device: str) -> dict[str, float]:
    """Peak bytes above the inputs and seconds of one loss with both gradients, in this process."""
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    arguments = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    hidden = torch.randn(tokens, hidden_size, dtype=dtype, **arguments).requires_grad_()  # [N, D]
    weight = torch.randn(VOCABULARY, hidden_size, dtype=dtype, **arguments).mul_(0.05).requires_grad_()  # [V, D]
    target = torch.randint(VOCABULARY, (tokens,), **arguments)  # [N]
    advantages = torch.randn(tokens, **arguments)  # [N], one per token
    old_logp = torch.full((tokens,), -12.0, device=device)  # [N]
    loss, _ = PROVIDERS[provider]
    if cuda:
        loss(hidden, weight, target, old_logp, advantages).backward()  # compiles the kernels
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident_bytes()
    started = time.perf_counter()
    loss(hidden, weight, target, old_logp, advantages).backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return {"bytes": peak - before, "seconds": seconds}


def compare_memory(tokens: int, hidden_size: int, device: str) -> dict[str, dict[str, float]]:
    """Provider -> measurement, one fresh process each."""
    results = {}
    for provider in PROVIDERS:
        command = [sys.executable, "-m", "integration.memory", provider, "--tokens", str(tokens)]
        command += ["--hidden-size", str(hidden_size), "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr}")
        results[provider] = json.loads(done.stdout)
    return results


def memory_sheet(results: dict[str, dict[str, float]], tokens: int, hidden_size: int, device: str) -> Sheet:
    """One row per provider."""
    title = f"Loss and gradients at V = {VOCABULARY:,}, N = {tokens:,}, D = {hidden_size:,} on {device}"
    rows = [[PROVIDERS[name][1], f"{r['bytes'] / 2**20:,.0f}", f"{r['seconds']:.2f}"] for name, r in results.items()]
    return Sheet(title, ["provider", "peak MiB above inputs", "seconds"], rows)


def memory_checks(results: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Statement -> whether it holds."""
    mib = {name: r["bytes"] / 2**20 for name, r in results.items()}
    statement = f"memory: ours below eager torch (measured {mib['ours']:,.0f} against {mib['eager']:,.0f} MiB)"
    return {statement: mib["ours"] < mib["eager"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    print(json.dumps(measure(flags.provider, flags.tokens, flags.hidden_size, flags.device)))
