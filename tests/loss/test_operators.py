"""The operators of torch.library: torch.compile, torch.export, selective checkpointing and saved tensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import lad_kernels.reference
from lad_kernels import (
    GRPOConfig,
    LADConfig,
    group_advantages,
    grpo_loss,
    lad_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
    linear_policy_loss,
)
from lad_kernels.head import HeadArguments, dispatch
from lad_kernels.head.records import BLOCK
from lad_kernels.objective import PolicyInputs, flat_inputs
from lad_kernels.testing import FP32_TOLERANCE, relative_error

D, V = 16, 2 * BLOCK + 9
OPS = torch.ops.lad_kernels


class Batch:
    """Inputs of every function, [B, T]; a third of the tokens is masked and their hidden states are NaN."""

    def __init__(self, sequences: int = 4, length: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0):
        gen = torch.Generator().manual_seed(seed)
        shape = (sequences, length)
        self.mask = torch.rand(shape, generator=gen) > 0.3  # [B, T]
        self.hidden = torch.randn(*shape, D, generator=gen).masked_fill(~self.mask[..., None], torch.nan)
        self.hidden = self.hidden.to(dtype).requires_grad_()  # [B, T, D]
        self.weight = (0.4 * torch.randn(V, D, generator=gen)).to(dtype).requires_grad_()  # [V, D]
        self.bias = torch.randn(V, generator=gen).to(dtype).requires_grad_()  # [V]
        self.targets = torch.randint(V, shape, generator=gen)  # [B, T]
        self.old = -4 * torch.rand(shape, generator=gen)  # [B, T]
        self.rewards = torch.randn(sequences, generator=gen)  # [B]
        self.temperature = 0.5 + torch.rand(shape, generator=gen)  # [B, T]

    @property
    def labels(self) -> Tensor:
        return self.targets.masked_fill(~self.mask, -100)

    def head(self, **more) -> HeadArguments:
        given = dict(temperature=1.0, logit_scale=1.0, softcap=None, vocab_group=None, impl="auto", bias=self.bias)
        return HeadArguments(self.hidden, self.weight, self.targets, **(given | more))

    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]


def logprobs(b: Batch):
    out = linear_logprobs(
        b.hidden, b.weight, b.targets, bias=b.bias, temperature=b.temperature, loss_mask=b.mask, return_entropy=True
    )
    return out.logprobs.sum() + out.entropy.square().sum() + out.lse.mean(), out


def lad(b: Batch):
    config = LADConfig(tail_mass=0.3)  # if it is routed
    out = linear_lad_loss(
        b.hidden, b.weight, b.targets, b.old, rewards=b.rewards, group_size=2, loss_mask=b.mask, config=config
    )
    return out.loss, out


def lad_with_everything(b: Batch):
    config = LADConfig("kl", entropy_coef=0.01, kl_coef=0.1, target_norm="group", epsilon_high=0.3)
    given = dict(old_logprobs=b.old, ref_logprobs=b.old - 0.1, rewards=b.rewards, group_size=2, normalizer=7.0)
    head = dict(bias=b.bias, temperature=b.temperature, softcap=9.0, loss_mask=b.mask)
    out = linear_lad_loss(b.hidden, b.weight, b.targets, **given, **head, config=config, return_entropy=True)
    return out.loss, out


def lad_on_policy(b: Batch):
    out = linear_lad_loss(
        b.hidden, b.weight, b.targets, advantages=b.rewards[:, None], loss_mask=b.mask, return_logprobs=False
    )
    return out.loss, out


def grpo(b: Batch):
    config, normalizer = GRPOConfig(loss_agg_mode="seq-mean-token-mean", epsilon_high=0.28), torch.tensor(3.0)
    out = linear_grpo_loss(
        b.hidden,
        b.weight,
        b.targets,
        b.old,
        advantages=b.rewards,
        loss_mask=b.mask,
        config=config,
        normalizer=normalizer,
    )
    return out.loss, out


def cross_entropy(b: Batch, **options):
    out = linear_cross_entropy(b.hidden, b.weight, b.labels, bias=b.bias, return_stats=True, **options)
    return out[0].sum(), out


def given_logprobs(b: Batch, name: str):
    out = linear_logprobs(b.hidden, b.weight, b.targets, loss_mask=b.mask, return_entropy=True)
    given = dict(loss_mask=b.mask, entropy=out.entropy)
    advantages = group_advantages(b.rewards, group_size=2)
    if name == "lad_loss":
        found = lad_loss(out.logprobs, b.old, advantages, **given, config=LADConfig(entropy_coef=0.01))
    else:
        found = grpo_loss(out.logprobs, b.old, advantages[:, None], **given, config=GRPOConfig(entropy_coef=0.01))
    return found.loss, found


CASES = {
    "log-probs": logprobs,
    "LAD": lad,
    "LAD with everything": lad_with_everything,
    "LAD on-policy": lad_on_policy,
    "GRPO": grpo,
    "cross-entropy": cross_entropy,
    "cross-entropy with everything": partial(cross_entropy, label_smoothing=0.1, z_loss=1e-2, reduction="sum"),
    "cross-entropy by token": partial(cross_entropy, label_smoothing=0.1, z_loss=1e-2, reduction="none"),
    "LAD of log-probs": partial(given_logprobs, name="lad_loss"),
    "GRPO of log-probs": partial(given_logprobs, name="grpo_loss"),
}


def results(function, b: Batch, factor: float = 1.0) -> list[tuple[str, Tensor]]:
    """Everything that a call returns, metrics by name, and all gradients."""
    for x in b.parameters():
        x.grad = None
    loss, out = function(b)
    (loss * factor).backward()
    found = [("loss", loss)]
    for i, x in enumerate(out):
        metrics = sorted(x.items()) if isinstance(x, dict) else []
        found += metrics or [(f"{i}.{j}", y) for j, y in enumerate(tree_leaves(x)) if isinstance(y, Tensor)]
    found += [(f"gradient {i}", x.grad) for i, x in enumerate(b.parameters()) if x.grad is not None]
    return [(name, x.detach()) for name, x in found]


def compiled(function, backend: str = "aot_eager"):
    """Compiled in one graph; a second one is an error."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def assert_same(ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, x), (_, y) in zip(ours, theirs):
        assert torch.equal(x.nan_to_num(123.0), y.to(x.dtype).nan_to_num(123.0)), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_compiled_has_the_bits_of_eager_in_one_graph_for_all_shapes(case, dtype):
    step = compiled(CASES[case])
    for shape in ((4, 6), (2, 9), (6, 5)):
        b = Batch(*shape, dtype=dtype)
        assert_same(results(step, b), results(CASES[case], b))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("case", ("LAD with everything", "cross-entropy by token", "LAD of log-probs"))
def test_inductor(case):
    b = Batch()
    ours, theirs = results(compiled(CASES[case], "inductor"), b), results(CASES[case], b)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, x), (_, y) in zip(ours, theirs):
        torch.testing.assert_close(x, y.to(x.dtype), msg=name)


def test_kernels_run_inside_the_operator(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    b = Batch(2, 4)

    def step(b: Batch):
        out = linear_lad_loss(
            b.hidden, b.weight, b.targets, b.old, rewards=b.rewards, group_size=2, loss_mask=b.mask, impl="triton"
        )
        return out.loss, out

    assert_same(results(compiled(step), b), results(step, b))


@pytest.mark.parametrize("case", ("LAD", "log-probs", "cross-entropy"))
def test_a_transposed_weight_and_no_token(case):
    """Gradients have the strides that the compiler was promised."""
    b = Batch()
    b.weight = b.weight.detach().T.contiguous().T.requires_grad_()
    step = compiled(CASES[case], "inductor")
    for mask in (b.mask, torch.zeros_like(b.mask)):
        b.mask = mask
        assert_same(results(step, b), results(CASES[case], b))


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_every_path_is_taken_inside(path):
    b, step = Batch(6, 9), compiled(lad)
    with dispatch.force(path):
        assert_same(results(step, b), results(lad, b))


def test_a_loss_scaler_meets_gradients_in_float32():
    """Gradients of 1e-9 vanish in float16; times 2^16 afterwards they do not, as without torch.compile."""
    b = Batch(dtype=torch.float16)

    def step(b: Batch):
        out = linear_lad_loss(
            b.hidden, b.weight, b.targets, b.old, rewards=b.rewards, group_size=2, loss_mask=b.mask, normalizer=1e9
        )
        return out.loss, out

    ours, theirs = results(compiled(step), b, 2.0**16), results(step, b, 2.0**16)
    assert dict(theirs)["gradient 1"].abs().max() > 0
    assert_same(ours, theirs)


def test_a_factor_multiplies_finished_gradients():
    b = Batch()
    with dispatch.force("two_pass"):
        ours, theirs = dict(results(compiled(lad), b, 1 / 3)), dict(results(lad, b, 1 / 3))
    for name in ("gradient 0", "gradient 1"):
        assert 0 < relative_error(ours[name], theirs[name].double()) <= FP32_TOLERANCE  # 3.2e-7 measured


OWN = torch.tensor(0.7, requires_grad=True)


def own(b: Batch, **head):
    def objective(logprobs: Tensor, entropy: Tensor, tokens: lad_kernels.Tokens):  # [m], [m]
        ratio = (logprobs - tokens.take(b.old)).exp()
        loss = -(OWN * ratio * tokens.expand(b.rewards)).mean() - 0.01 * entropy.mean()
        return loss, {"ratio": ratio.mean()}

    hidden = b.hidden.masked_fill(~b.mask[..., None], 0.0)
    out = linear_policy_loss(hidden, b.weight, b.targets, objective, return_entropy=True, **head)
    return out.loss, out


@pytest.mark.parametrize("masked", (False, True))
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_an_objective_is_compiled_with_the_rest(masked):
    function = (lambda b: own(b, loss_mask=b.mask)) if masked else own
    step = compiled(function)
    for shape in ((4, 6), (2, 9), (6, 5)):
        b = Batch(*shape)
        OWN.grad = None
        ours = results(step, b)
        of_parameter, OWN.grad = OWN.grad, None
        theirs = {name: x for name, x in results(function, b) if name not in ("kept_share", "head_flops")}
        assert {name for name, _ in ours} <= set(theirs)
        for name, x in ours:
            torch.testing.assert_close(x, theirs[name], rtol=2e-6, atol=2e-7, msg=name)
        torch.testing.assert_close(of_parameter, OWN.grad)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("masked", (False, True))
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_an_objective_gets_no_token_beyond_the_last_bound(masked):
    b, bounds = Batch(1, 12), torch.tensor([0, 3, 9], dtype=torch.int32)
    hidden, targets = b.hidden[0].detach().nan_to_num(0.0), b.targets[0].clone()
    targets[9:] = -100
    hidden[9:] = torch.nan
    hidden.requires_grad_()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(
            hidden, weight, targets, lambda logprobs, entropy, tokens: (logprobs * (1 + tokens.sequences)).mean(),
            cu_seqlens=bounds, loss_mask=b.mask[0] if masked else None,
        ).loss  # fmt: skip

    found = []
    for call in (compiled(step), step):
        loss = call(hidden, b.weight)
        found.append((loss, *torch.autograd.grad(loss, (hidden, b.weight))))
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs.double()) <= FP32_TOLERANCE


def test_a_routed_objective_is_refused():
    with pytest.raises(Exception, match=r"backward: 'routed' is not built for linear_policy_loss under torch.compile"):
        compiled(lambda b: own(b, backward="routed"))(Batch())


def step_arguments(b: Batch, needs: list[bool], **head) -> tuple:
    inputs = PolicyInputs(old_logprobs=b.old, rewards=b.rewards, group_size=2, loss_mask=b.mask)
    return (*b.head(**head).flat(), *flat_inputs(inputs, LADConfig()), True, True, needs)


def token_arguments(b: Batch, **head) -> tuple:
    return (*b.head(**head).flat(), b.mask, True, True, True, [x.requires_grad for x in b.parameters()])


def calls() -> dict[str, tuple]:
    b, all_needed = Batch(), [True, True, True]
    frozen = Batch()
    frozen.weight.requires_grad_(False)
    frozen.bias.requires_grad_(False)
    tokens = dict(temperature=b.temperature)
    cross_entropy = (*b.head()._replace(target_ids=b.labels).flat(), -100, "mean", 0.1, 1e-2, None, "auto", None)
    inputs = PolicyInputs(old_logprobs=b.old, advantages=b.rewards, loss_mask=b.mask, entropy=-b.old)
    given = (*flat_inputs(inputs, GRPOConfig(entropy_coef=0.1)), "auto")
    logp = (b.old - 0.1).requires_grad_()
    return {
        "linear_logprobs": (OPS.linear_logprobs, token_arguments(b, **tokens)),
        "linear_logprobs, frozen head": (OPS.linear_logprobs, token_arguments(frozen)),
        "linear_lad_loss": (OPS.linear_lad_loss, step_arguments(b, all_needed, **tokens)),
        "linear_lad_loss, frozen head": (OPS.linear_lad_loss, step_arguments(frozen, [True, False, False])),
        "linear_cross_entropy": (OPS.linear_cross_entropy, (*cross_entropy, "unbiased", True, all_needed)),
        "grpo_loss": (OPS.grpo_loss, (logp, *given)),
        "group_advantages": (OPS.group_advantages, (b.rewards, 2, None, "group", 1e-4, "auto")),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    """Schema, values without data, registration with autograd, and what AOTAutograd makes of it."""
    operator, arguments = calls()[name]
    assert torch.Tag.cudagraph_unsafe in operator.default.tags  # Inductor captures none of them
    found = torch.library.opcheck(operator.default, arguments)
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, targets: Tensor, old: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        out = linear_lad_loss(hidden, self.lm_head.weight, targets, old, advantages=rewards)
        return out.loss, linear_logprobs(hidden, self.lm_head.weight, targets).logprobs


def test_export():
    b, model = Batch(), Scorer()
    given = (b.hidden.detach().nan_to_num(0.0), b.targets, b.old, b.rewards)
    with torch.no_grad():
        program = torch.export.export(model, given)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"lad_kernels.linear_lad_loss.default", "lad_kernels.linear_logprobs.default"} <= names
    with torch.no_grad():
        for ours, theirs in zip(program.module()(*given), model(*given)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ("LAD", "GRPO", "log-probs"))
def test_capturable_changes_no_gradient(case):
    """Masked tokens cannot be left out, so their advantage is 0 here; only the path is another."""
    b = Batch()
    hidden = b.hidden.detach().nan_to_num(0.0).requires_grad_()
    advantages = b.rewards[:, None] * b.mask  # [B, T]
    found = []
    for capturable in (True, False):
        if case == "log-probs":
            loss = (linear_logprobs(hidden, b.weight, b.targets, capturable=capturable).logprobs * advantages).sum()
        else:
            function = linear_lad_loss if case == "LAD" else linear_grpo_loss
            config = LADConfig() if case == "LAD" else GRPOConfig(epsilon_low=1.0, epsilon_high=1e3)
            given = dict(advantages=advantages, config=config, capturable=capturable)
            loss = function(hidden, b.weight, b.targets, b.old, **given).loss
        found.append(torch.autograd.grad(loss, (hidden, b.weight)))
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs.double()) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("loss_mask", dict(loss_mask=torch.ones(4, 6, dtype=torch.bool))),
        ("config.backward='routed'", dict(config=LADConfig(backward="routed"))),
        ("impl", dict(impl="reference")),
    ],
)
def test_what_cannot_be_captured_is_refused(argument, given):
    b = Batch()
    with pytest.raises(ValueError, match=f"capturable: expected False with {argument}"):
        linear_lad_loss(b.hidden, b.weight, b.targets, b.old, advantages=b.rewards, capturable=True, **given)


def test_the_reference_cannot_be_captured():
    b = Batch()
    with pytest.raises(ValueError, match="capturable: expected False, got True; the reference"):
        lad_kernels.reference.linear_logprobs(b.hidden, b.weight, b.targets, capturable=True)
