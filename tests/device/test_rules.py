"""The stand-in CUDA device refuses and counts what a CUDA build does."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import io

import pytest
import torch
from cuda_device import LOG, CudaTensor
from cuda_device.log import GRANULE

from lad_kernels.head.kernels import target_columns, tile_table
from lad_kernels.head.records import LogitGradient

X = torch.arange(12.0).view(3, 4)  # [3, 4], on the host


@pytest.fixture
def x() -> torch.Tensor:
    return X.to("cuda")  # [3, 4]


@pytest.fixture(autouse=True)
def fresh_log():
    LOG.clear()


def test_a_tensor_says_where_it_is_and_keeps_its_values(x):
    assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (torch.device("cuda", 0), True, False, 0)
    assert isinstance(x, CudaTensor)
    for y in (x.cpu(), torch.tensor([[1.0]], device="cuda").to("cpu"), x.to(device="cpu", dtype=torch.float64)):
        assert not isinstance(y, CudaTensor)
        assert y.device.type == "cpu"
    assert torch.equal(x.cpu(), X)
    for made in (
        torch.zeros(2, device="cuda"),
        torch.empty_like(x),
        x.new_ones(3),
        x.new_tensor(7.0),
        torch.arange(4, device=x.device),
        torch.as_tensor([1, 2], device="cuda"),
        x[1:].T,
        torch.randn(3, generator=torch.Generator("cuda").manual_seed(0), device="cuda"),
        copy.deepcopy(x),
    ):
        assert made.is_cuda


def test_gradients_cross_devices():
    leaf = X.clone().requires_grad_()
    (leaf.cuda() * 2).sum().cpu().backward()
    assert torch.equal(leaf.grad, torch.full((3, 4), 2.0))
    there = X.to("cuda").requires_grad_()
    there.to("cpu").square().sum().backward()
    assert there.grad.is_cuda
    assert torch.equal(there.grad.cpu(), 2 * X)


def test_two_devices_are_refused(x):
    for operation in (
        lambda: x + X,
        lambda: x @ X.T,
        lambda: torch.where(x > 0, x, X),
        lambda: x.index_add(0, torch.tensor([0, 1, 2]), x),
        lambda: x.index_put((torch.tensor([0]),), X[:1]),
        lambda: torch.cat([x, X]),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            operation()
    assert (x + torch.tensor(1.0)).is_cuda  # numbers, and indices, may stay on the host
    assert x[torch.tensor([0, 2])].shape == (2, 4)


def test_products_with_a_wider_result(x):
    a, b = x.bfloat16(), x.T.bfloat16()  # [3, 4], [4, 3]
    exact = X @ X.T
    assert torch.equal(torch.mm(a, b, out_dtype=torch.float32).cpu(), exact)
    out = torch.ones(3, 3, device="cuda")
    assert torch.addmm(out, a, b, out=out, out_dtype=torch.float32) is out
    assert torch.equal(out.cpu(), exact + 1)
    for wrong, message in (
        (lambda: torch.mm(a, b, out_dtype=torch.float64), "out_dtype must be the same"),
        (lambda: torch.mm(x, x.T, out_dtype=torch.bfloat16), "out_dtype must be the same"),
        (lambda: torch.mm(a, x.T, out_dtype=torch.float32), "same dtype"),
        (lambda: torch.mm(a, b, out=out.half(), out_dtype=torch.float32), "provided out tensor"),
        (lambda: torch.addmm(out.half(), a, b, out_dtype=torch.float32), "self dtype must match"),
        (lambda: torch.mm(a, a, out_dtype=torch.float32), "cannot be multiplied"),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()


def test_what_has_no_deterministic_implementation_raises(x):
    assert torch.are_deterministic_algorithms_enabled()
    for operation in (lambda: x.cumsum(0), lambda: torch.histc(x), lambda: x.median(0), lambda: x.kthvalue(1)):
        with pytest.raises(RuntimeError, match="deterministic implementation"):
            operation()
    assert x.long().cumsum(0).is_cuda
    assert x.median() == 5
    torch.use_deterministic_algorithms(False)
    assert torch.equal(x.cumsum(0).cpu(), X.cumsum(0))


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (lambda x: x @ x.T, torch.bfloat16),
        (lambda x: torch.mv(x, x[0]), torch.bfloat16),  # a CPU does not cast these two
        (lambda x: torch.linalg.vecdot(x, x), torch.bfloat16),
        (lambda x: torch.nn.functional.linear(x, x), torch.bfloat16),
        (lambda x: x.bfloat16().exp(), torch.float32),
        (lambda x: x.bfloat16().sum(), torch.float32),
        (lambda x: x.bfloat16() ** 2, torch.float32),
        (lambda x: x.half().log_softmax(-1), torch.float32),
        (lambda x: torch.cat([x, x.half()]), torch.float32),
        (lambda x: x.bfloat16() * 2, torch.bfloat16),
        (lambda x: torch.mm(x, x.T, out=x.new_empty(3, 3)), torch.float32),
        (lambda x: x.double() @ x.double().T, torch.float64),
    ],
)
def test_autocast_casts_by_the_lists_of_cuda(operation, dtype, x):
    with torch.autocast("cuda", torch.bfloat16):
        assert operation(x).dtype == dtype


def test_a_backward_pass_has_no_context_variables(x):
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")
    seen = []
    x.requires_grad_()
    y = x * 1
    y.register_hook(lambda g: seen.append((variable.get(), torch.is_autocast_enabled("cuda"))))
    with torch.autocast("cuda", torch.bfloat16):
        y.sum().backward()
    assert seen == [("outside", True)]
    y = x * 1
    y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()


def test_syncs_and_copies_are_counted_by_line(x):
    LOG.clear()
    x.sum().item()
    x.nonzero()
    x[x > 3]
    assert bool(x.any())
    x.cpu()
    x.tolist()
    X.to("cuda")
    assert [operation for operation, _ in LOG.syncs] == [
        "_local_scalar_dense",
        "nonzero",
        "index",
        "_local_scalar_dense",
        "copy to the host",
        "tolist",
    ]
    assert all("test_rules.py" in line for _, line in LOG.syncs)
    assert sum(LOG.copies.values()) == 1
    LOG.clear()
    x.repeat_interleave(2, 0)
    x.repeat_interleave(torch.tensor([1, 2, 1], device="cuda"), 0, output_size=4)
    assert not LOG.syncs


def test_live_bytes():
    before = LOG.allocated
    a = torch.zeros(1000, device="cuda")
    assert LOG.allocated - before == 4096 == -(-4000 // GRANULE) * GRANULE
    view, held = a[:10], a.view(10, 100)
    del a, view
    assert LOG.allocated - before == 4096
    b = torch.zeros(1, device="cuda")
    del b, held
    assert (LOG.allocated, LOG.peak) == (before, before + 4096 + GRANULE)
    assert torch.cuda.max_memory_allocated() == LOG.peak


def test_saved_and_loaded(x):
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)["x"].cpu(), X)


def test_kernels_take_no_tensor_of_the_host(x):
    import triton
    import triton.language as tl

    @triton.jit
    def add_one(source, target, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(target + at, tl.load(source + at) + 1)

    out = torch.empty(4, device="cuda")
    add_one[(1,)](x[1], out, 4)
    assert torch.equal(out.cpu(), X[1] + 1)
    assert LOG.launches == {"add_one": 1}
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add_one[(1,)](X[1], out, 4)


def test_the_packages_kernels_are_launched_on_their_tensors_device(monkeypatch):
    """Which need not be the current one."""
    numbers, targets = torch.zeros(3, device="cuda"), torch.arange(3, device="cuda")
    out, gradient = torch.empty(3, 4, dtype=torch.bfloat16, device="cuda"), LogitGradient(numbers, numbers)
    target_columns.write(out, targets, numbers, numbers, gradient, 0)
    monkeypatch.setattr(tile_table, "current", lambda device: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="_target_columns_kernel was launched on the current device"):
        target_columns.write(out, targets, numbers, numbers, gradient, 0)
