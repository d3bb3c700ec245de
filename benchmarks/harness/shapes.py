"""Head shapes, named after the models they come from, each with the reason it is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """N = sequences x length tokens of hidden size D against a vocabulary of V words."""

    name: str
    sequences: int
    length: int
    hidden_size: int
    vocab_size: int
    reason: str

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def flops(self) -> int:
        """Of one product [N, D] x [D, V]; forward and backward need three of them at least."""
        return 2 * self.tokens * self.hidden_size * self.vocab_size

    def __str__(self) -> str:
        return f"{self.name} N={self.tokens} D={self.hidden_size} V={self.vocab_size}"


TINY = (
    Shape("tiny", 6, 15, 64, 600, "two vocabulary tiles of 256 and a remainder; runs in the interpreter"),
    Shape("tiny odd", 4, 10, 48, 509, "a prime vocabulary: unaligned rows"),
)

CPU_SMALL = (
    Shape(
        "small", 4, 32, 128, 32_000, "a Llama-2 vocabulary at a size that every provider runs in a fraction of a second"
    ),
    Shape("GPT-2 narrow", 4, 16, 64, 50_257, "an odd vocabulary: no power of two, no multiple of 16"),
)

CPU_FULL = (
    Shape("Qwen2.5-0.5B short", 8, 64, 896, 151_936, "the 0.5B head with few tokens: dW traffic dominates"),
    Shape("Qwen2.5-0.5B long", 8, 256, 896, 151_936, "the 0.5B head, 27 % of that model's flops"),
)

GPU = (
    Shape("Qwen2.5-7B vocabulary", 8, 512, 4096, 151_936, "the size at which peers publish most numbers"),
    Shape("Qwen2.5-0.5B", 16, 1024, 896, 151_936, "small D: the epilogue weighs most"),
    Shape("Llama-3-8B", 8, 512, 4096, 128_256, "the shape of the published cuBLAS, QuACK and Liger tables"),
    Shape("Qwen2.5-7B vocabulary, long", 16, 1024, 4096, 151_936, "power-limited: long kernels clock lower"),
    Shape("Qwen2.5-1.5B", 8, 1024, 1536, 151_936, "between the extremes of D"),
    Shape("scaled cross entropy", 8, 512, 4096, 131_072, "the shape of Liger's scaled-CE and RL-Kernel's tables"),
    Shape("D 2048", 8, 512, 2048, 131_072, "3B-class models"),
    Shape("D 8192", 8, 512, 8192, 131_072, "70B-class models"),
    Shape("GPT-2", 8, 512, 768, 50_257, "an odd vocabulary: TMA and 16-byte loads are ruled out for logits"),
)

SWEEP = tuple(
    Shape(f"sweep {n}", 8, n // 8, 128, 32_000, "time and memory against N, for every provider")
    for n in (64, 128, 256, 512, 1024, 2048)
)

# Of states of a policy: D and V are the policy's, `harness.data.fit` puts them in.
REAL_TOKENS = {
    "tiny": TINY[0],
    "small": Shape("a policy", 8, 32, 576, 49_152, "every provider in a fraction of a second"),
    "full": Shape("a policy", 32, 32, 576, 49_152, "fewer tokens than are sampled, so none twice"),
    "gpu": Shape("a policy", 8, 1024, 576, 49_152, "the tokens of the shapes that others publish"),
}

SETS = {"sweep": SWEEP, "tiny": TINY, "small": CPU_SMALL, "full": CPU_FULL, "gpu": GPU}
