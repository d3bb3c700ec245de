"""The same numbers from independent code: Liger's GRPO loss and Cut Cross-Entropy, on the CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from lad_kernels import GRPOConfig, linear_grpo_loss, linear_logprobs
from lad_kernels.testing import relative_error

B, T, D, V = 4, 9, 32, 200
TOLERANCE = 1e-6  # float32 against float32; measured at most 1.4e-7 against Liger


@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed: the GRPO family lacks its outside oracle"
    )


@pytest.fixture(scope="module")
def cce():
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler for torch.compile: log-probs lack their outside oracle")
    return pytest.importorskip(
        "cut_cross_entropy", reason="cut-cross-entropy is not installed: log-probs lack their outside oracle"
    )


def batch():
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(B, T, D, generator=gen)
    w = torch.randn(V, D, generator=gen) / 4
    bias = torch.randn(V, generator=gen) / 4
    y = torch.randint(0, V, (B, T), generator=gen)
    mask = torch.rand(B, T, generator=gen) > 0.2
    with torch.no_grad():
        near = linear_logprobs(h, w, y, bias=bias).logprobs
    old, ref = (near + 0.3 * torch.randn(B, T, generator=gen) for _ in range(2))
    return h, w, bias, y, mask, old, ref, torch.tensor([1.3, -0.7, 0.2, -1.1])


LIGER = {
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, GRPOConfig(epsilon_high=0.28)),
    "grpo": ({"loss_type": "grpo"}, GRPOConfig(loss_agg_mode="seq-mean-token-mean")),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": T},
        GRPOConfig(loss_agg_mode="seq-mean-token-sum-norm"),
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        GRPOConfig(importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-mean"),
    ),
    "with reference": ({"loss_type": "bnpo", "beta": 0.1}, GRPOConfig(kl_coef=0.1)),
}


@pytest.mark.parametrize("name", LIGER)
def test_liger_grpo(name, liger, device):
    if device != "cpu":
        pytest.skip("an oracle for the numbers, which the CPU gives; the GPU's are compared with float64 elsewhere")
    options, config = LIGER[name]
    h, w, bias, y, mask, old, ref, advantages = batch()
    theirs = [x.clone().requires_grad_() for x in (h, w, bias)]
    loss = liger.LigerFusedLinearGRPOLoss(
        **{"beta": 0.0, "compiled": False, "use_ref_model": "beta" in options, **options}
    )
    value, _ = loss(
        theirs[0],
        theirs[1],
        y,
        mask.float(),
        advantages,
        bias=theirs[2],
        old_per_token_logps=old,
        ref_per_token_logps=ref if "beta" in options else None,
    )
    value.backward()
    ours = [x.clone().requires_grad_() for x in (h, w, bias)]
    out = linear_grpo_loss(
        ours[0], ours[1], y, old, bias=ours[2], advantages=advantages, loss_mask=mask, config=config, ref_logprobs=ref
    )
    out.loss.backward()
    assert abs(out.loss.item() - value.item()) <= TOLERANCE * max(1.0, abs(value.item()))
    for a, b in zip(ours, theirs):
        assert relative_error(a.grad, b.grad) <= TOLERANCE


def test_cut_cross_entropy(cce, device):
    if device != "cpu":
        pytest.skip("an oracle for the numbers, which the CPU gives; the GPU's are compared with float64 elsewhere")
    h, w, _, y, _, old, _, _ = batch()
    theirs = [x.clone().requires_grad_() for x in (h, w)]
    nll = cce.linear_cross_entropy(*theirs, y, softcap=9.0, reduction="none", impl="torch_compile")
    (nll * old).sum().backward()
    ours = [x.clone().requires_grad_() for x in (h, w)]
    logprobs = linear_logprobs(*ours, y, softcap=9.0).logprobs
    (-logprobs * old).sum().backward()
    assert relative_error(-logprobs.detach(), nll.detach()) <= TOLERANCE
    for a, b in zip(ours, theirs):
        assert relative_error(a.grad, b.grad) <= TOLERANCE
