"""Which path a call takes through the head, in one sentence."""

from __future__ import annotations

import torch

from lad_kernels import checks


def why(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    grad: bool = True,
    impl: str = "auto",
) -> str:
    """The path that a head of this shape takes, why, and what it costs.

    Args:
        tokens: tokens that take part (masked ones never reach the head).
        hidden_size, vocab_size: D and V.
        dtype, device: of the hidden states; the device need not exist on this machine.
        grad: whether a gradient will be asked for.
        impl: as given to the public functions.
    """
    device = torch.device(device)
    if impl == "reference":
        path, reason = "reference, stored logits", "impl='reference'"
    elif checks.use_triton(impl, device, dtype):
        path, reason = "Triton kernels", "the input is on an accelerator" if impl == "auto" else "impl='triton'"
    else:
        unavailable = checks.triton_unavailable(device, dtype)
        path, reason = "chunked PyTorch", "impl='torch'" if impl == "torch" else unavailable
    unit = tokens * hidden_size * vocab_size
    passes = 8 if grad and impl != "reference" else 6 if grad else 2
    work = f"{passes} N D V = {passes * unit:.3g} flops"
    logits = tokens * vocab_size * 4
    stored = f"stores {logits / 2**30:.3g} GiB of logits" if impl == "reference" else "stores no logits"
    kind = "dense, two passes (logits recomputed in the backward)" if grad else "score only"
    return f"{path}: {kind}, because {reason}; {work}; {stored} (N={tokens}, D={hidden_size}, V={vocab_size}, {dtype})."
