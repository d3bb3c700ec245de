"""The targets' columns of dR, written after a slab's kernel: which numbers, and nothing but those; dW of their slab."""

from __future__ import annotations

import pytest
import torch
from test_mutants import check, mutate

from lad_kernels import linear_logprobs
from lad_kernels.head import memory
from lad_kernels.head.kernels import dense, target_columns
from lad_kernels.head.records import LogitGradient
from lad_kernels.testing import make_inputs

N, V, FIRST = 300, 40, 100  # tokens of two programs; words of a slab, and the first of them


def check_write(module, device: str) -> None:
    """Targets before, in and beyond the slab against the formula; all else stays, in the next rows too."""
    gen = torch.Generator().manual_seed(0)
    targets = torch.randint(FIRST - V, FIRST + 2 * V, (N,), generator=gen)
    targets[:7] = torch.tensor([FIRST, FIRST - 1, FIRST + 7, FIRST + V - 1, FIRST + V, FIRST + 5, -100])
    targets[-1] = FIRST + 3  # a bug that writes beyond a row writes to another, not beyond the tensor
    logp, slopes, onehot, prob, entropy = torch.randn(5, N, generator=gen).unbind()
    logp = -logp.abs()
    logp[[2, 3]] = torch.tensor([-torch.inf, torch.nan])  # an excluded word, and a token that is lost
    logp[0], onehot[0], prob[0], entropy[0] = -1e-6, 1e3, -1e3, 0.0  # a certain policy: 1 - p
    p = logp.double().exp()
    want = (onehot + p * prob - entropy * torch.where(p == 0, 0.0, p * logp.double())) * slopes  # [N]
    rows = ((targets >= FIRST) & (targets < FIRST + V)).nonzero()[:, 0]
    for wide in (V, 2 * V):
        expected = torch.full((N, wide), 7.0, dtype=torch.bfloat16)
        found = expected.clone().to(device)
        expected[rows, targets[rows] - FIRST] = want[rows].bfloat16()
        numbers = [x.to(device) for x in (targets, logp, slopes)]
        gradient = LogitGradient(*(x.to(device) for x in (onehot, prob, entropy)))
        module.write(found[:, :V], *numbers, gradient, FIRST)
        torch.testing.assert_close(found.cpu(), expected, rtol=2**-8, atol=1e-6, equal_nan=True)


BUGS = {
    "softmax term missing": ("+ to_mass) - to_mass * one_minus_exp(logp)", ")"),
    "a certain policy cancels": ("+ to_mass) - to_mass * one_minus_exp(logp)", ") + to_mass * tl.exp(logp)"),
    "one-hot missing": ("tl.load(onehot + rows, mask=mine, other=0.0)", "0.0"),
    "entropy term missing": ("g -= tl.load(entropy", "g -= 0.0 * tl.load(entropy"),
    "slope forgotten": ("g *= tl.load(slopes + rows, mask=mine, other=0.0)", "g *= 1.0"),
    "slab offset forgotten": ("other=-1) - column0", "other=-1) - 0"),
    "targets before the slab": ("(column >= 0) & ", ""),
    "targets beyond the slab": ("(column < V) & ", ""),
    "an excluded word's NaN": ("logp = tl.where(logp < -1e30, -1e30, logp)", "logp = logp"),
    "a NaN lost": ("tl.where(logp < -1e30, -1e30, logp)", "tl.where(logp >= -1e30, logp, -1e30)"),
    "another token's row": ("dr + rows * dr_stride", "dr + (rows ^ 1) * dr_stride"),
    "the first program's tokens": ("tl.program_id(0).to(tl.int64) * TOKENS", "0 * TOKENS"),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_bug_in_what_is_written_is_caught(bug, tmp_path, device):
    if bug is None:
        check_write(target_columns, device)
        return
    mutant = mutate("head/kernels/target_columns.py", *BUGS[bug], tmp_path)
    with pytest.raises(AssertionError):
        check_write(mutant, device)


def test_without_entropy_it_counts_as_zero(device):
    numbers = torch.linspace(-2, -1, 30, device=device)
    found = [torch.zeros(30, 8, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for dr, entropy in zip(found, (None, torch.zeros_like(numbers))):
        gradient = LogitGradient(numbers, -numbers, entropy)
        target_columns.write(dr, torch.arange(30, device=device) % 9, numbers, numbers, gradient, 0)
    assert torch.equal(*found)
    assert found[0].any(1).sum() == 27


DENSE_BUGS = {
    "log-probs of other tokens": ("select(self.logprobs, run)", "self.logprobs"),
    "slopes of other tokens": ("select(self.slopes, run)", "self.slopes"),
    "targets not written": ("target_columns.write(", "id("),
    "before the scale": ("prior=self.lse, levels", "prior=None, levels"),
    "dW of the last run": ("item == 2 and rows == N and not add", "item == 2 and not add"),
    "dW of float16 still scaled": ("then is None and down is None", "then is None"),
}


@pytest.mark.parametrize("bug", [None, *DENSE_BUGS])
def test_bug_in_their_use_is_caught(bug, monkeypatch, tmp_path, device):
    """In 16 bits, slabs of 256 words and runs of 256 tokens: the slope of a row and of an element."""
    old, new = DENSE_BUGS[bug] if bug else ("import annotations", "import annotations  #")
    mutant = mutate("head/kernels/dense.py", old, new, tmp_path)
    monkeypatch.setattr(memory.Work, "token_chunk", lambda _, tokens, **listed: (tokens, 1))
    monkeypatch.setattr(mutant, "_MIN_COLUMNS", 256)
    monkeypatch.setattr(mutant, "_ROW_STEP", 32)
    monkeypatch.setattr(dense, "backward", mutant.backward)

    def check_all() -> None:
        for softcap in (30.0, None):
            check("triton", torch.bfloat16, device, softcap)
        monkeypatch.setattr(memory.Work, "token_chunk", lambda _, tokens, **listed: (tokens, 1 << 20))
        check("triton", torch.float16, device)

    if bug is None:
        check_all()
        return
    with pytest.raises((AssertionError, TypeError)):
        check_all()


def test_an_excluded_target_in_16_bits(device):
    """Its log-prob is -inf; its gradient, and the entropy's, are numbers."""
    inputs = make_inputs(90, 80, 2 * 256 + 40, dtype=torch.bfloat16, device=device, bias=True, masked=0.0)
    inputs.bias[inputs.targets[0]] = -torch.inf
    hidden = inputs.hidden.clone().requires_grad_()
    out = linear_logprobs(hidden, inputs.weight, inputs.targets, bias=inputs.bias, return_entropy=True, impl="triton")
    assert out.logprobs[0] == -torch.inf
    torch.autograd.backward([out.logprobs, out.entropy], [torch.ones(90, device=device)] * 2)
    assert hidden.grad.isfinite().all()
