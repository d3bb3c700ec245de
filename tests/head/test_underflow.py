"""Probabilities that float32 cannot hold, in the PyTorch path: no slower than others, and nothing else changes."""

from __future__ import annotations

import math
import time

import pytest
import torch

from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs
from lad_kernels.head import dispatch, pytorch
from lad_kernels.head.records import LogitGradient
from lad_kernels.testing import HeadInputs, check_head, relative_error, run_head

N, D, V = 64, 32, 16_384


def make(depth: float, dtype: torch.dtype = torch.float32) -> HeadInputs:
    """A certain policy: the logits of all words but some thirty lie `depth` to `depth` + 6 nats below the largest."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=gen) / 4, torch.randn(V, D, generator=gen) / 4
    bias = -depth - 6 * torch.rand(V, generator=gen)
    bias[:: V // 32] = 0.0
    targets = torch.randint(0, 32, (N,), generator=gen) * (V // 32)
    targets[: N // 8] = torch.randint(0, V, (N // 8,), generator=gen)  # most of these are impossible
    upstream = torch.randn(N, generator=gen)
    mask = torch.ones(N, dtype=torch.bool)
    return HeadInputs(hidden, weight, bias, targets, mask, upstream, {}).cast(dtype)


def torch_head(*args, **options):
    return linear_logprobs(*args, impl="torch", **options)


@pytest.mark.parametrize("path", [*dispatch.PATHS, "entropy"])
def test_underflow_takes_no_longer(path, one_thread):
    """At most three times as long as probabilities in range; without LOWEST it was 13 to 21 times on a Xeon."""

    def seconds(inputs: HeadInputs) -> float:
        config = LADConfig(tail_mass=0.0, entropy_coef=0.01 * (path == "entropy"))
        h, w = (x.clone().requires_grad_() for x in (inputs.hidden, inputs.weight))
        start = time.thread_time()
        with dispatch.force("two_pass" if path == "entropy" else path):
            linear_lad_loss(
                h,
                w,
                inputs.targets,
                inputs.upstream - 3,
                advantages=inputs.upstream,
                bias=inputs.bias,
                config=config,
                impl="torch",
            ).loss.backward()
        return time.thread_time() - start

    far, near = make(92.0), make(12.0)
    rounds = [(seconds(far), seconds(near)) for _ in range(5)]  # interleaved: caches are shared
    slow, usual = (min(x) for x in zip(*rounds))
    assert slow < 3 * usual


@pytest.mark.parametrize("depth", (50.0, 62.0, 84.0, 92.0, 150.0, 700.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_results_stay_exact(depth, dtype):
    """Log-probs, among them some below -87 and -104, entropy and every gradient."""
    inputs = make(depth, dtype)
    upstream = torch.linspace(-1, 1, N)
    if dtype != torch.float64:
        check_head(torch_head, inputs, entropy_upstream=upstream)
        return
    ours = run_head(torch_head, inputs, entropy_upstream=upstream)
    truth = run_head(lambda *a, **k: linear_logprobs(*a, impl="reference", **k), inputs, entropy_upstream=upstream)
    for x, y in zip(vars(ours).values(), vars(truth).values()):
        assert relative_error(x, y) < 1e-13


@pytest.mark.parametrize("slabs", (1, 4))
@pytest.mark.parametrize("depth", (40.0, 55.0))
def test_masses_of_blocks_down_to_the_lowest(depth, slabs, monkeypatch):
    """Log-masses some 35 to 55 nats below lse, against float64."""
    monkeypatch.setattr(pytorch, "TILE_BYTES", 4 * N * V // slabs)
    inputs = make(depth)
    operands = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias, pytorch.LogitTransform())
    out = pytorch.forward(*operands, want_entropy=False, want_block_lse=True)
    z = inputs.hidden.double() @ inputs.weight.double().T + inputs.bias.double()  # [N, V]
    exact = z.unflatten(1, (-1, pytorch.BLOCK)).logsumexp(2).T  # [blocks, N]
    assert (exact - out.lse).amin() < -depth + 6
    torch.testing.assert_close(out.block_lse.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("entropy", (False, True))
def test_logit_gradients_are_zero_or_far_from_underflow(entropy, dtype):
    """Coefficients and entries of W or H whose product is 1e-10 or more leave a normal number."""
    depth = -1.2 * math.log(torch.finfo(dtype).tiny)
    log_p = torch.linspace(-depth, 0, 4096, dtype=dtype)[None]  # [1, 4096] twenty and more a nat
    dz = pytorch._logit_gradient(
        log_p.clone(),
        slice(0, 1),
        0,
        torch.tensor([4095]),
        torch.zeros(1, dtype=dtype),
        LogitGradient(*torch.tensor([[0.0], [1.0]], dtype=dtype), torch.zeros(1, dtype=dtype) if entropy else None),
    )  # [1, 4096]
    zero = dz == 0
    assert zero[log_p < pytorch.LOWEST[dtype] - 1].all()
    assert not zero[log_p > pytorch.LOWEST[dtype] + 1].any()
    assert (1e-10 * dz[~zero]).amin() > torch.finfo(dtype).tiny
    torch.testing.assert_close(dz[~zero], log_p.exp()[~zero], rtol=1e-4, atol=0)
