"""How much of a training step the head is, and what its logits would take, for published model shapes.

Flops of forward and backward of N tokens: 6 N P for P weights in matrix products, of which the head has D V, and
6 N T H per layer for causal attention over sequences of T tokens (two products with T / 2 keys on average; H = heads
times their width). An embedding is looked up, not multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

from integration.report import Sheet
from lad_kernels.head import memory

EAGER_COPIES = 3044 / (
    2048 * 151_936 * 4 / 2**20
)  # of float32 logits, measured for eager torch (docs/results.md, N = 2,048)
ROUTED_KEPT = 0.03  # share of pairs: SmolLM2-135M sampled and scored at temperature 0.6 (docs/sparsity.md)


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers, as its configuration file gives it."""

    name: str
    hidden_size: int  # D
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # V
    tied: bool

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.hidden_size * self.vocab_size

    @property
    def blocks(self) -> int:
        """Weights in the matrix products of all layers."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def weights(self) -> int:
        """Weights of the model, an untied embedding included; norms and biases are left out."""
        return self.blocks + self.head * (1 if self.tied else 2)

    def share(self, length: int) -> float:
        """The head's part of a dense step's flops, sequences of `length` tokens."""
        return self.head / (self.head + self.blocks + self.layers * length * self.heads * self.head_dim)


SHAPES = (
    Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151_936, True),
    Shape("Qwen2.5-1.5B", 1536, 28, 12, 2, 128, 8960, 151_936, True),
    Shape("Qwen2.5-3B", 2048, 36, 16, 2, 128, 11_008, 151_936, True),
    Shape("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18_944, 152_064, False),
    Shape("Llama-3-8B", 4096, 32, 32, 8, 128, 14_336, 128_256, False),
    Shape("Qwen2.5-32B", 5120, 64, 40, 8, 128, 27_648, 152_064, False),
    Shape("Llama-3-70B", 8192, 80, 64, 8, 128, 28_672, 128_256, False),
)


def share_table() -> Sheet:
    """The head's share, and the flops of a step on our paths over those of a dense one."""
    rows = []
    for s in SHAPES:
        at = s.share(2048)
        routed = 1 - at * (1 - (2 + 6 * ROUTED_KEPT) / 6)
        model = [s.name, f"{s.hidden_size:,}", f"{s.vocab_size:,}", "tied" if s.tied else "untied"]
        shares = [f"{x:.1%}" for x in (s.share(0), at, s.share(16_384))]
        rows.append([*model, f"{s.weights / 1e9:.2f}", *shares, f"{1 + at / 3:.3f}", f"{routed:.3f}"])
    short = ["model", "D", "V", "head and embedding", "weights, 10^9"]
    shares = ["head, short sequences", "head, T = 2,048", "head, T = 16,384"]
    return Sheet("", [*short, *shares, "step, two passes", f"step, routed {ROUTED_KEPT:.0%}"], rows)


def memory_table() -> Sheet:
    """GiB that logits take when stored, and what each path takes beside inputs and gradients; bfloat16 inputs."""
    rows = []
    for shape in (SHAPES[0], SHAPES[4]):
        for tokens in (4096, 16_384, 32_768):
            logits = 4 * tokens * shape.vocab_size
            work = memory.Work(tokens, shape.hidden_size, shape.vocab_size, 2, "sm_90")
            found = [logits, EAGER_COPIES * logits]
            for path in ("two_pass", "routed", "one_pass"):
                size, float32_dw = memory.peak_bytes(work, path, int(ROUTED_KEPT * tokens * work.blocks))
                found.append(size + 4 * shape.head * float32_dw)
            rows.append([shape.name, f"{tokens:,}", *(f"{size / 2**30:.2f}" for size in found)])
    stored = ["logits, one float32 copy", "eager torch"]
    return Sheet("", ["head of", "N", *stored, "ours, two passes", "ours, routed", "ours, one pass"], rows)
