"""What a launch issues and asks for, per warp, summed over the warps of all programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

CLASSES = {  # the first whose beginning matches
    "matrix": ("mma", "wgmma.mma_async"),
    "copy": ("cp.async", "ldmatrix", "stmatrix"),
    "special": ("ex2", "sqrt", "div.full.f32", "div.rn.f32"),
    "float32": ("fma", "add.f32", "add.rn.f32", "mul.f32", "mul.rn.f32", "sub.f32", "sub.rn.f32", "max.f32", "min.f32"),
    "global": ("ld.global", "st.global", "atom.global", "red.global"),
    "shared": ("ld.shared", "st.shared"),
    "synchronise": ("bar", "mbarrier", "fence", "wgmma"),
    "shuffle": ("shfl", "elect"),
    "convert": ("cvt",),
}


@dataclass
class Counters:
    instructions: Counter = field(default_factory=Counter)  # class -> warps that issued one
    sectors: Counter = field(default_factory=Counter)  # load, store: 32-byte pieces of global memory asked for
    sectors_needed: Counter = field(default_factory=Counter)  # the same if each warp's bytes lay together
    passes: Counter = field(default_factory=Counter)  # load, store, ldmatrix: over the 32 banks of shared memory
    passes_needed: Counter = field(default_factory=Counter)  # the same if no two words met in a bank
    barriers: int = 0  # CTAs that passed a bar.sync

    def issued(self, name: str, warps: int) -> None:
        kind = next((c for c, beginnings in CLASSES.items() if name.startswith(beginnings)), "integer and control")
        self.instructions[kind] += warps

    def global_access(self, kind: str, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """`size` bytes at addresses [n], by the threads `lanes` [n]."""
        warps = lanes // 32 << 50
        ends = np.concatenate([addresses, addresses + size - 1]) >> 5  # sectors
        self.sectors[kind] += len(np.unique(ends | np.tile(warps, 2)))
        distinct = np.unique(addresses | warps) >> 50  # warp of each address that it asks for
        self.sectors_needed[kind] += int((-(np.bincount(distinct) * size // -32)).sum())

    def shared_access(self, kind: str, at: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """`size` bytes at each address [n]. Accesses of 8 and 16 bytes take half and quarter warps at a time."""
        words = max(size // 4, 1)
        word = ((at >> 2)[:, None] + np.arange(words)).reshape(-1)
        turn = np.repeat(lanes // (32 // words), words)  # threads that pass together
        turn, word = np.divmod(np.unique(turn * (1 << 34) + word), 1 << 34)
        first = int(turn.min()) if len(turn) else 0
        hits = np.bincount((turn - first) * 32 + word % 32, minlength=32)  # words by turn and bank
        hits = np.pad(hits, (0, -len(hits) % 32)).reshape(-1, 32)
        self.passes[kind] += int(hits.max(1).sum())
        self.passes_needed[kind] += int((-(hits.sum(1) // -32)).sum())
