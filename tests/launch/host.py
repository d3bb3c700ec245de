"""What a routed call costs the host, kernel by kernel: CPU tensors through Triton's launcher, above no driver at all.

`make test-launch` ends with it. Kernels do nothing, operations of PyTorch run on the CPU, on few tokens, and the counts
that the host would read are made up. What a GPU's own launches take is missing, so only ratios of two commits mean
anything, in turn on one machine: `PYTHONPATH=<checkout> python tests/launch/host.py` with the stub of the Makefile.
"""

from __future__ import annotations

import statistics
import time

import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lad_kernels import LADConfig, checks, linear_lad_loss
from lad_kernels.head import cost, dispatch
from lad_kernels.head.kernels import tile_table

V, D, TOKENS, PAIRS, CALLS = 151_936, 64, 120, 2, 60  # PAIRS of each block
SYNC, LAUNCHED = "counts are known", "pairs_kernel"
events: list[tuple[str, float]] = []


def pretend() -> None:
    """A Hopper that launches nothing, and counts of pairs in the place of what no kernel has written."""
    active = CudaDriver()
    active.get_current_stream, active.get_current_device = (lambda device=0: 0), (lambda: 0)
    active.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(active)
    checks.triton_unavailable = lambda device, dtype: None
    tile_table.probe = lambda device: tile_table.Device("sm_90", 132)
    cost.architecture = lambda device, triton: "h200"
    tolist, norm, run, blocks = torch.Tensor.tolist, torch.linalg.vector_norm, JITFunction.run, -(-V // 128)

    def counts(x: torch.Tensor) -> list:
        if x.shape != (blocks + 3,):
            return tolist(x)
        events.append((SYNC, time.perf_counter()))
        return [*range(0, PAIRS * blocks + 1, PAIRS), PAIRS * blocks, TOKENS]  # offsets, rows, tokens with a gradient

    def launch(kernel: JITFunction, *arguments, **options):
        done = run(kernel, *arguments, **options)
        events.append((kernel.__name__, time.perf_counter()))
        return done

    torch.Tensor.tolist, JITFunction.run = counts, launch
    lengths = torch.zeros(V)  # the device's work, not the host's
    torch.linalg.vector_norm = lambda x, *a, **k: lengths.clone() if x.shape == (V, D) else norm(x, *a, **k)


def main() -> None:
    pretend()
    hidden, weight = (torch.zeros(n, D, dtype=torch.bfloat16).requires_grad_() for n in (TOKENS, V))  # [N, D], [V, D]
    targets, old, advantages = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(TOKENS), torch.ones(TOKENS)
    calls = []
    for _ in range(CALLS + 5):
        hidden.grad = weight.grad = None
        events.clear()
        start = time.perf_counter()
        with dispatch.force("routed"):
            config = LADConfig(tail_mass=3e-4)
            out = linear_lad_loss(hidden, weight, targets, old, advantages=advantages, config=config, impl="triton")
        out.loss.backward()
        calls.append((time.perf_counter() - start, dict(events)))
    whole = statistics.median(seconds for seconds, _ in calls[5:])
    between = statistics.median(at[LAUNCHED] - at[SYNC] for _, at in calls[5:])
    print(f"a routed call takes the host {1e3 * whole:.2f} ms, {1e3 * between:.2f} from counts to {LAUNCHED}")


if __name__ == "__main__":
    main()
