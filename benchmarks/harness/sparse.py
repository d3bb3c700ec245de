"""Flops that are saved: the paths of `linear_lad_loss` against eager torch, on data that suits them and on data
that does not.

    off-policy    old log-probs differ from the present ones; every token has a gradient
    zero groups   on-policy, and 19 of 32 sequences have advantage 0, as groups without reward variance do

python -m benchmarks.harness.sparse SET DATA CASE      peak memory of every entry on CPU, in bytes, as JSON
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.data import REAL, Batch, fit, make_batch
from benchmarks.harness.eager import EAGER, ETA, eager_logprobs, lad_from_logprobs
from benchmarks.harness.machine import cores, flush_subnormals
from benchmarks.harness.measure import M_MMAP_THRESHOLD, ROOT, peak_bytes_cpu
from benchmarks.harness.provider import Provider
from benchmarks.harness.shapes import REAL_TOKENS, Shape
from lad_kernels import LADConfig, LossOutput, linear_lad_loss, reference
from lad_kernels.head import dispatch
from lad_kernels.testing import relative_error

TAIL_MASS = 3e-4
CASES = ("off-policy", "zero groups")
SHAPES = {
    "tiny": Shape("tiny", 32, 4, 64, 600, "runs in a test"),
    "small": Shape("small", 32, 8, 128, 32_000, "a fraction of a second"),
    "full": Shape("Qwen2.5-0.5B", 32, 64, 896, 151_936, "the 0.5B head, 27 % of that model's flops"),
    "gpu": Shape("Qwen2.5-7B vocabulary", 32, 128, 4096, 151_936, "the size at which peers publish most numbers"),
}
ZERO = 19  # sequences of 32 without a gradient


@dataclass(frozen=True)
class Entry:
    """One way to the gradient. `path` None lets the package choose."""

    name: str
    config: LADConfig | None  # None: eager torch
    path: str | None = None
    return_logprobs: bool = True

    def loss(self, batch: Batch, case: str) -> Tensor:  # []
        """The loss; `outputs` keeps the metrics of the last call of ours."""
        advantages = batch.advantages
        if self.config is None:
            logprobs = eager_logprobs(batch)
            if case == "zero groups":
                batch = dataclasses.replace(batch, old_logprobs=logprobs.detach().view(batch.padded))
            return lad_from_logprobs(logprobs, batch)
        old = None if case == "zero groups" else batch.old_logprobs
        arguments = (batch.hidden.view(*batch.padded, -1), batch.weight, batch.targets.view(batch.padded), old)
        call: Callable[[], LossOutput] = lambda: linear_lad_loss(  # noqa: E731
            *arguments, advantages=advantages, config=self.config, return_logprobs=self.return_logprobs
        )
        if self.path is None:
            out = call()
        else:
            with dispatch.force(self.path):
                out = call()
        outputs[self] = out
        return out.loss


outputs: dict[Entry, LossOutput] = {}
EXACT, SPARSE = LADConfig(eta=ETA, tail_mass=0.0), LADConfig(eta=ETA, tail_mass=TAIL_MASS)
ENTRIES = (
    Entry(EAGER, None),
    Entry("exact, as chosen", EXACT),
    Entry("exact, one pass", EXACT, "one_pass"),
    Entry("exact, two pass", EXACT, "two_pass"),
    Entry(f"tail_mass {TAIL_MASS:g}, as chosen", SPARSE),
    Entry(f"tail_mass {TAIL_MASS:g}, routed", SPARSE, "routed"),
    Entry(f"tail_mass {TAIL_MASS:g}, as chosen, no log-probs", SPARSE, None, False),
)


def entries(data: str, case: str) -> list[Entry]:
    """What is worth measuring: forced paths off-policy, log-probs left out where that saves a forward."""
    found = [e for e in ENTRIES if (e.path is None) or case == "off-policy"]
    found = [e for e in found if e.return_logprobs or case == "zero groups"]
    return [e for e in found if not (data == "flat" and e.path == "routed")]


def provider(entry: Entry, case: str) -> Provider:
    """The entry as the machinery of measure.py takes it."""
    return Provider(entry.name, "lad", lambda b: entry.loss(b, case), ours=entry.config is not None)


def shape_of(set_name: str, data: str) -> Shape:
    """The set's shape; on a CPU no token of a policy repeats."""
    return fit(REAL_TOKENS["full"] if set_name == "full" and data in REAL else SHAPES[set_name], data)


def make(shape: Shape, data: str, case: str, dtype: torch.dtype, device: str) -> Batch:
    batch = make_batch(shape, data, dtype, device)
    if case == "zero groups":
        batch.advantages[:ZERO] = 0
    return batch


def truth(batch: Batch, case: str) -> tuple[Tensor, Tensor]:
    """dH [N, D] and dW [V, D] by `reference` in float64, a sequence at a time, so that its logits fit."""
    hidden, weight = batch.hidden.detach().double(), batch.weight.detach().double()
    dh, dw = torch.zeros_like(hidden), torch.zeros_like(weight)
    length = batch.padded[1]
    for i in range(batch.padded[0]):
        rows = slice(i * length, (i + 1) * length)
        h, w = hidden[rows].clone().requires_grad_(), weight.requires_grad_()
        old = None if case == "zero groups" else batch.old_logprobs[i : i + 1].double()
        loss = reference.linear_lad_loss(
            h[None],
            w,
            batch.targets[rows][None],
            old,
            advantages=batch.advantages[i : i + 1].double(),
            config=EXACT,
            normalizer=float(len(hidden)),
        ).loss
        found = torch.autograd.grad(loss, (h, w))
        dh[rows] = found[0]
        dw += found[1]
    return dh, dw


def errors(dh: Tensor, dw: Tensor, true_dh: Tensor, true_dw: Tensor, targets: Tensor) -> dict[str, float]:
    """Relative errors per region, and the absolute ones that a certificate bounds."""
    rows = torch.zeros(len(dw), dtype=torch.bool, device=dw.device)  # [V]
    rows[targets] = True
    return {
        "dH": relative_error(dh, true_dh),
        "dW target rows": relative_error(dw[rows], true_dw[rows]),
        "dW other rows": relative_error(dw[~rows], true_dw[~rows]),
        "dH absolute": (dh - true_dh).norm().item(),
        "dW absolute": (dw - true_dw).norm().item(),
    }


def peaks_cpu(set_name: str, data: str, case: str) -> dict[str, int]:
    """Peak bytes of every entry beyond the inputs, from one fresh process."""
    command = [sys.executable, "-m", "benchmarks.harness.sparse", set_name, data, case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    set_name, data, case = sys.argv[1:]
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that freed tensors leave the resident memory at once
    flush_subnormals()
    torch.set_num_threads(cores())
    made = make(shape_of(set_name, data), data, case, torch.float32, "cpu")
    print(json.dumps({e.name: peak_bytes_cpu(provider(e, case), made) for e in entries(data, case)}))
