"""linear_logprobs on every path against the float64 specification, by the rule in lad_kernels/testing.py."""

from __future__ import annotations

import pytest
import torch
from cases import CASES

from lad_kernels import checks, linear_logprobs
from lad_kernels.head import dispatch, pytorch
from lad_kernels.testing import check_head, format_report, make_inputs, run_head

IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head(impl):
    return lambda *args, **kw: linear_logprobs(*args, **kw, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_parity_with_float64(name, impl, dtype, device):
    inputs = make_inputs(**CASES[name], dtype=dtype, device=device)
    report = check_head(head(impl), inputs)
    print("\n" + format_report(report))


@pytest.mark.parametrize(
    ("vocab_size", "impl"),
    [(50_257, "torch"), (151_936, "torch"), (256_000, "torch"), (50_257, "triton"), (256_000, "triton")],
)
def test_vocabularies_of_real_models(vocab_size, impl, device):
    """GPT-2's, Qwen's and Gemma's, whole: every block of every slab is written and reduced."""
    inputs = make_inputs(40, 32, vocab_size, dtype=torch.bfloat16, device=device, masked=0.0)
    print("\n" + format_report(check_head(head(impl), inputs)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entropy", (None, 0.4))
def test_entropy_and_its_gradient(impl, dtype, entropy, device):
    inputs = make_inputs(130, 64, 600, dtype=dtype, device=device, entropy=entropy, bias=True, softcap=20.0)
    upstream = torch.randn(130, generator=torch.Generator().manual_seed(1)).to(device)
    print("\n" + format_report(check_head(head(impl), inputs, entropy_upstream=upstream)))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_temperature_per_token(impl, device):
    temperature = 0.5 + torch.rand(70, generator=torch.Generator().manual_seed(3)).to(device)
    check_head(head(impl), make_inputs(70, 32, 300, device=device, temperature=temperature, softcap=8.0))


@pytest.mark.parametrize("impl", ("torch",))
def test_float64_is_exact(impl, device):
    inputs = make_inputs(90, 40, 700, dtype=torch.float64, device=device, bias=True, softcap=9.0)
    ours, truth = run_head(head(impl), inputs), run_head(head("reference"), inputs)
    for a, b in zip((ours.logprobs, ours.dhidden, ours.dweight), (truth.logprobs, truth.dhidden, truth.dweight)):
        assert (a - b).norm() <= 1e-13 * b.norm()


def test_chunked_path_crosses_its_own_tiles(monkeypatch, device):
    """Two full chunks of tokens and two full slabs of vocabulary, with remainders, at a small tile size."""
    monkeypatch.setattr(pytorch, "TILE_BYTES", 4 * 32 * 100)
    monkeypatch.setattr(pytorch, "MAX_CHUNK", 32)
    inputs = make_inputs(75, 48, 230, device=device, bias=True, masked=0.0)
    upstream = torch.randn(75, device=device)
    check_head(head("torch"), inputs, entropy_upstream=upstream)


def test_chunked_path_crosses_tiles_at_their_default_size(device):
    inputs = make_inputs(2 * pytorch.MAX_CHUNK + 5, 8, 4200, device=device, masked=0.0)
    assert [len(t) for t in pytorch._tiles(4101, 4200, 4)] == [3, 3]
    check_head(head("torch"), inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_only_for_what_needs_them(impl, needs, device):
    i = make_inputs(20, 16, 140, device=device)
    h, w = i.hidden.requires_grad_(needs[0]), i.weight.requires_grad_(needs[1])
    out = linear_logprobs(h, w, i.targets, loss_mask=i.loss_mask, impl=impl)
    assert out.logprobs.requires_grad == any(needs)
    if any(needs):
        out.logprobs.sum().backward()
    assert (h.grad is not None, w.grad is not None) == needs


@pytest.mark.parametrize("hidden_size", (64, 97))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_token_alone_has_the_log_prob_it_has_in_a_batch(dtype, hidden_size, device):
    """Bitwise, in the Triton kernels; with an odd hidden size most tokens of the batch start off 16 bytes."""
    i = make_inputs(35, hidden_size, 300, dtype=dtype, device=device, masked=0.0)
    score = lambda rows, **mask: linear_logprobs(  # noqa: E731
        i.hidden[rows], i.weight, i.targets[rows], return_entropy=True, impl="triton", **mask
    )
    mask = torch.arange(35, device=device) % 3 == 1
    batch = torch.stack(score(slice(None)))  # [3, 35] log-probs, entropy, lse
    assert torch.equal(torch.stack(score(slice(None), loss_mask=mask))[:, mask], batch[:, mask])  # gathered
    for rows in (slice(0, 1), slice(1, 2), slice(34, 35), slice(3, 20)):
        assert torch.equal(torch.stack(score(rows)), batch[:, rows])
    off = [i.hidden[k:].data_ptr() % 16 != 0 for k in (1, 34)]
    assert off == [hidden_size == 97] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_inputs_unchanged(impl, device):
    i = make_inputs(20, 16, 140, device=device, bias=True)
    leaves = [x.requires_grad_() for x in (i.hidden, i.weight, i.bias)]
    before = [x.detach().clone() for x in leaves]
    out = linear_logprobs(i.hidden, i.weight, i.targets, bias=i.bias, loss_mask=i.loss_mask, impl=impl)
    first = torch.autograd.grad(out.logprobs, leaves, i.upstream, retain_graph=True)
    second = torch.autograd.grad(out.logprobs, leaves, i.upstream)
    for a, b, x, y in zip(first, second, leaves, before):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_is_differentiable(impl, device):
    i = make_inputs(30, 16, 140, dtype=torch.float32, device=device, masked=0.0)
    h = i.hidden.requires_grad_()
    linear_logprobs(h, i.weight, i.targets, impl=impl).lse.square().sum().backward()
    h64 = i.hidden.detach().double().requires_grad_()
    (h64 @ i.weight.double().T).logsumexp(1).square().sum().backward()
    assert (h.grad - h64.grad).norm() <= 2e-6 * h64.grad.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", (0, 6))
def test_nothing_to_do(impl, tokens, device):
    """N = 0, and a batch in which everything is masked: zeros that can be differentiated."""
    h = torch.randn(tokens, 16, device=device, requires_grad=True)
    w = torch.randn(40, 16, device=device, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    y = torch.full((tokens,), -100, device=device)
    out = linear_logprobs(h, w, y, loss_mask=mask, return_entropy=True, impl=impl)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs.shape == (tokens,)
    assert not h.grad.count_nonzero()
    assert not w.grad.count_nonzero()


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_logits(impl, device):
    """Logits of +-1e4, rows of nothing but large negative logits, a certain token: finite, and right."""
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(300, 16, generator=gen)
    h = torch.randn(12, 16, generator=gen)
    h[:4] *= 1e4
    w[:, 0], h[4:8, 0] = 1.0, -5e4
    y = torch.randint(0, 300, (12,), generator=gen)
    h, w, y = h.to(device), w.to(device), y.to(device)
    got = linear_logprobs(h, w, y, return_entropy=True, impl=impl)
    z = h.double() @ w.double().T
    truth = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    scale = z.abs().amax(1)
    assert ((got.logprobs - truth).abs() <= 1e-6 * scale).all()
    assert (got.logprobs <= 0).all()
    assert got.entropy.isfinite().all()
    assert (got.entropy >= -1e-6 * scale).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_views_and_padded_input(impl, device):
    """Strided hidden states, a transposed weight, a [B, T] batch: same numbers as the packed contiguous call."""
    i = make_inputs(24, 32, 140, device=device)
    plain = linear_logprobs(i.hidden, i.weight, i.targets, loss_mask=i.loss_mask, impl=impl).logprobs
    wide = torch.randn(24, 64, device=device)
    wide[:, ::2] = i.hidden
    strided = linear_logprobs(wide[:, ::2], i.weight.T.contiguous().T, i.targets, loss_mask=i.loss_mask, impl=impl)
    padded = linear_logprobs(
        i.hidden.view(4, 6, 32), i.weight, i.targets.view(4, 6), loss_mask=i.loss_mask.view(4, 6), impl=impl
    )
    torch.testing.assert_close(strided.logprobs, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded.logprobs.view(-1), plain, rtol=1e-6, atol=1e-6)


def test_masked_positions_may_hold_anything(device):
    i = make_inputs(20, 16, 140, device=device)
    h = i.hidden.clone()
    h[~i.loss_mask] = torch.nan
    h.requires_grad_()
    out = linear_logprobs(h, i.weight, i.targets, loss_mask=i.loss_mask)
    out.logprobs.sum().backward()
    assert out.logprobs.isfinite().all()
    assert h.grad.isfinite().all()
    assert not h.grad[~i.loss_mask].count_nonzero()


def test_memory_of_the_chunked_path_does_not_grow_with_n_times_v(device):
    """Largest tensor PyTorch allocates, by its own profiler: a tile, never N x V."""
    if device != "cpu":
        pytest.skip("the profiler's allocation record is read on the CPU; benchmarks measure the GPU's peak")
    n, v = 4096, 20_000
    h = torch.randn(n, 8, requires_grad=True)
    w = torch.randn(v, 8, requires_grad=True)
    y = torch.randint(0, v, (n,))
    with torch.profiler.profile(profile_memory=True) as prof:
        linear_logprobs(h, w, y).logprobs.sum().backward()
    largest = max(e.cpu_memory_usage for e in prof.events())
    assert 0 < largest <= 2 * pytorch.TILE_BYTES < 4 * n * v / 4


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_outside_the_vocabulary_is_never_a_number(impl, device, monkeypatch):
    """Where its range is not checked (accelerators), it reads nothing out of bounds and has probability 0."""
    monkeypatch.setattr(checks, "target_range", lambda *_: None)
    i = make_inputs(8, 16, 140, device=device, masked=0.0)
    targets = i.targets.clone()
    targets[0], targets[1] = 140, -7
    logprobs = linear_logprobs(i.hidden, i.weight, targets, impl=impl).logprobs
    assert (logprobs[:2] == -torch.inf).all()
    assert logprobs[2:].isfinite().all()


def test_offsets_beyond_two_to_the_31(device):
    """Rows 2^23 elements apart: the last token and weight row lie beyond 2^31 elements (lazily zero memory)."""
    step, rows, width = 2**23 - 1, 260, 16
    memory = torch.zeros(step * rows, dtype=torch.float16, device=device)
    h, w = memory.as_strided((rows, width), (step, 1)), memory.as_strided((rows, width), (step, 1), width)
    gen = torch.Generator().manual_seed(0)
    for x in (h, w):
        x.copy_(torch.randn(rows, width, generator=gen))
    y = torch.arange(rows, device=device).flip(0)
    far = linear_logprobs(h, w, y, impl="triton").logprobs
    near = linear_logprobs(h.contiguous(), w.contiguous(), y, impl="triton").logprobs
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)


def test_why_says_which_path():
    said = dispatch.why(4096, 896, 151_936, device="cpu", dtype=torch.float32)
    assert "chunked PyTorch" in said
    assert "no logits" in said
    assert "reference" in dispatch.why(10, 8, 20, device="cpu", impl="reference")
