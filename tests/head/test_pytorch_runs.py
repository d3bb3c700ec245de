"""The PyTorch backward of any routing equals that of stored logits, whatever slabs, runs and rows it is cut into."""

from __future__ import annotations

import pytest
import torch
from test_mutants import mutate
from torch.utils._python_dispatch import TorchDispatchMode

from lad_kernels.head import pytorch
from lad_kernels.head.records import BLOCK, LogitGradient, LogitTransform, Needs, Routing

N, D, V = 40, 6, 5 * BLOCK + 30  # the last block is narrower


@pytest.fixture(autouse=True)
def what_is_not_written_shows():
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


def check(ops=pytorch, *, dense: int, density: float, pairs: int = 16, few: int = 0, seed: int = 0) -> None:
    """Two blocks a slab, `pairs` a run, three rows of logits at a time; up to `few` dense tokens are as pairs."""
    ops.MAX_CHUNK, ops.TILE_BYTES, ops.CACHE_BYTES = pairs, 8 * pairs * 2 * BLOCK, 8 * 3 * BLOCK
    ops.FEW_DENSE = few
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = random(N, D), random(V, D), random(V)
    targets = torch.randint(V, (N,), generator=draw)  # [N]
    keep = torch.rand(-(-V // BLOCK), N, generator=draw) < density  # [blocks, N]
    keep[2], keep[:, :dense] = False, False
    keep[3, dense:] = density > 0  # more than a run's
    blocks, tokens = keep.nonzero().unbind(1)  # [P], [P]
    scale = 1 + random(len(blocks)).abs()  # [P]
    gradient = LogitGradient(random(N), random(N), random(N))
    z = hidden @ weight.T + bias  # [N, V]
    lse = z.logsumexp(1)  # [N]
    dz = (z - lse[:, None]).exp() * (gradient.prob[:, None] - gradient.entropy[:, None] * (z - lse[:, None]))
    dz[torch.arange(N), targets] += gradient.onehot
    factor = torch.zeros(N, len(keep), dtype=torch.float64)  # [N, blocks]
    factor[tokens, blocks], factor[:dense] = scale, 1.0
    dz *= factor.repeat_interleave(BLOCK, 1)[:, :V]
    routing = Routing(tokens, scale, [0, *keep.sum(1).cumsum(0).tolist()], torch.arange(dense))
    found = ops.backward(
        hidden, weight, targets, bias, LogitTransform(), lse, gradient, routing, needs=Needs(True, True, True)
    )
    for x, truth in zip(found, (dz @ weight, dz.T @ hidden, dz.sum(0))):
        torch.testing.assert_close(x, truth, rtol=1e-11, atol=1e-12)


CASES = [dict(dense=d, density=p, pairs=r) for d in (0, 3, 20) for p in (0.0, 0.1, 0.5) for r in (1, 16, 64)]
CASES += [case | dict(few=20) for case in CASES if case["dense"] and case["density"]]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_any_routing(case, monkeypatch):
    for name in ("MAX_CHUNK", "TILE_BYTES", "CACHE_BYTES", "FEW_DENSE"):
        monkeypatch.setattr(pytorch, name, None)  # back to its value afterwards
    for seed in range(3):
        check(**case, seed=seed)


class Additions(TorchDispatchMode):
    """The tokens of each `index_add_`."""

    def __init__(self):
        super().__init__()
        self.tokens = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_add_.default:
            self.tokens.append(len(args[2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "tokens"), [("cpu", [10, 11]), ("meta", [5, 5, 7, 4])])
def test_equal_tokens_are_added_together_on_a_cpu_alone(device, tokens):
    """Elsewhere the sum would depend on the order in which threads come, and two runs differ."""
    hidden, weight = torch.zeros(8, D, device=device), torch.zeros(4 * BLOCK, D, device=device)  # [N, D], [V, D]
    rows = torch.cat([torch.arange(n, device=device) for n in (5, 5, 7, 4)])  # [P]
    routing = Routing(rows, None, [0, 5, 10, 17, 21], rows[:0])
    numbers = torch.zeros(8, device=device)  # [N]
    arguments = (hidden, weight, numbers.long(), None, LogitTransform(), numbers, LogitGradient(numbers, numbers))
    with pytest.MonkeyPatch.context() as patch, Additions() as seen:
        patch.setattr(pytorch, "TILE_BYTES", 11 * hidden[0].nbytes)
        patch.setattr(pytorch, "_tiles", lambda *_: ([slice(0, 4 * BLOCK)], [slice(0, 8)]))
        pytorch.backward(*arguments, routing, needs=Needs(True, False, False))
    assert seen.tokens == tokens


@pytest.mark.parametrize("active", [(0, 1, 1), (1, 0, 1), (0, 0, 0), ()], ids=str)
def test_one_pass_writes_all_of_dw(active):
    """Also where no token of its first chunk has a gradient, and without a chunk."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, D, generator=draw), torch.randn(V, D, generator=draw)  # [N, D], [V, D]
    chunks = [slice(4 * i, 4 * i + 4) for i in range(len(active))]
    hidden, targets = hidden[: 4 * len(active)], torch.arange(4 * len(active))  # [N, D], [N]
    c = torch.tensor(active, dtype=torch.float32).repeat_interleave(4)  # [N]
    gradient = lambda rows, _: LogitGradient.of_logprobs(c[rows])  # noqa: E731
    arguments = (hidden, weight, targets, None, LogitTransform(), None, gradient)
    _, found = pytorch.one_pass(*arguments, chunks=chunks, want_entropy=False, needs=Needs(True, True, False))
    dz = c[:, None] * (torch.nn.functional.one_hot(targets, V) - (hidden @ weight.T).softmax(1))  # [N, V]
    torch.testing.assert_close(found.weight, dz.T @ hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.hidden, dz @ weight, rtol=1e-5, atol=1e-6)


RUNS = {
    "a lost pair": ("_runs", "end = min(start + self.most, stop)", "end = min(start + self.most, stop - 1)"),
    "a doubled pair": ("_runs", "begin, parts = start, []", "begin, parts = start - 1, []"),
    "another token": ("_runs", "self.routing.rows[pairs]", "self.routing.rows[pairs].flip(0)"),
    "another pair's scale": ("_runs", "self.routing.scale[pairs]", "self.routing.scale[pairs].flip(0)"),
    "another block's target": ("_runs", "self.first[pairs]", "self.first[pairs].flip(0)"),
    "dW of a block's last pairs": ("_runs", "bool(self.dense) or i > 0", "bool(self.dense)"),
    "dW without dense tokens": ("_runs", "bool(self.dense) or i > 0", "i > 0"),
    "dW of the last dense tokens": ("_runs", "[slab], [i > 0]", "[slab], [False]"),
    "the narrow block among others": ("_runs", " or columns.stop - first < BLOCK", ""),
    "blocks without pairs": ("_runs", "if a == b", "if a > b"),
    "products of the first block": ("_runs", "torch.mm(dz, w, out=out)", "torch.mm(dz, weights[0], out=out)"),
    "dH of the first tokens": ("_runs", "dh.index_add_(0, some, x)", "dh.index_add_(0, rows[: len(x)].flip(0), x)"),
    "dense tokens of the first block": ("_runs", "starts[:, None] + ", "starts[:1, None] + "),
    "pairs before the dense tokens": ("_runs", "len(dense) * (1 + index", "len(dense) * (0 + index"),
    "another dense token": ("_runs", "every[pairs] = rows", "every[pairs] = rows; every[: len(dense)] = dense[:1]"),
    "a dense token's scale": ("_runs", "scale.new_ones(len(every))", "scale.new_zeros(len(every))"),
    "logits of the first block": (
        "",
        "zip(hidden, z.split(sizes), operands)",
        "zip(hidden, z.split(sizes), operands[:1] * len(sizes))",
    ),
    "lse of the first rows": ("", "part.sub_(lse[few])", "part.sub_(lse[: len(part)])"),
    "coefficients of the first rows": (
        "",
        ".add_(gradient.prob[few, None])",
        ".add_(gradient.prob[: len(part), None])",
    ),
}


def check_all(ops) -> None:
    for case in CASES:
        check(ops, **case)


@pytest.mark.parametrize("bug", RUNS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    name, old, new = RUNS[bug]
    ops = mutant = mutate(f"head/pytorch{name}.py", old, new, tmp_path)
    if name:
        ops = mutate("head/pytorch.py", "annotations\n", "annotations\n", tmp_path)  # a copy
        ops.Runs = mutant.Runs
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_all(ops)
