"""One process of `test_distributed.py`: joins a group and runs the cases of some modules in turn.

    python distributed_worker.py RANK WORLD STORE MODULE...

Rank 0 prints the time of each case. The first failure ends the process, and the parent ends the others.
"""

from __future__ import annotations

import importlib
import sys
import time
from datetime import timedelta

import conftest  # noqa: F401  (the interpreter's settings, before Triton is imported)
import torch
import torch.distributed as dist


def main(rank: int, world: int, store: str, *modules: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case in [case for module in modules for case in importlib.import_module(module).CASES]:
        started = time.perf_counter()
        case()
        dist.barrier()
        if rank == 0:
            print(f"{case.__name__} {time.perf_counter() - started:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
