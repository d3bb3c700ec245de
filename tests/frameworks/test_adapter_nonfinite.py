"""A loss token whose old or reference log-prob or rollout weight is not finite: dropped and counted, in every adapter.

The divisor is the framework's: torchtitan's leaves such tokens out, those of prime-rl, slime and verl count them. A NaN
of the policy itself is not hidden. TRL's part is in test_trl_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from adapter_stubs import LossInputs, slime_case, stub_slime, stub_torchtitan, stub_verl
from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.distributed import context_parallel_loss
from lad_kernels.frameworks.prime_rl import prime_rl_lad_loss
from lad_kernels.frameworks.slime import slime_lad_loss

BAD = (math.nan, -math.inf, math.inf)
MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()  # [B, T]
PLACE = (0, 2)  # one of the eight loss tokens
Result = tuple[Tensor, Tensor, Tensor | float]  # loss, gradient, share of dropped tokens


def batch() -> dict[str, Tensor]:
    """logp, old, ref, weights and advantages, each [B, T]."""
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(MASK.shape, generator=g)
    data = {name: logp + 0.3 * torch.randn(MASK.shape, generator=g) for name in ("old", "ref")}
    data["weights"] = 0.5 + torch.rand(MASK.shape, generator=g)
    data["advantages"] = torch.randn(len(MASK), 1, generator=g).expand(MASK.shape).clone()
    return {"logp": logp, **data}


def prime_rl(kl_coef: float) -> Callable[..., Result]:
    def loss(data: dict[str, Tensor], mask: Tensor, _: pytest.MonkeyPatch) -> Result:
        leaf, row = data["logp"].clone().requires_grad_(), PLACE[0]
        weights = None if kl_coef else data["weights"][row]  # the adapter takes one or the other
        inputs = LossInputs(leaf[row], data["old"][row], data["ref"][row], data["advantages"][row], mask[row], weights)
        out = prime_rl_lad_loss(inputs, kl_coef=kl_coef)
        out.loss.backward()
        return out.loss, leaf.grad, out.metrics["lad/nonfinite_share"] * 3 / 8  # of three tokens in this sequence

    return loss


def torchtitan(data: dict[str, Tensor], mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> Result:
    module = stub_torchtitan(monkeypatch)
    monkeypatch.setattr(module, "compute_logprobs", lambda logits, labels: logits)
    leaf = data["logp"].clone().requires_grad_()
    loss, metrics = module.LADLoss(module.LADLoss.Config())(
        leaf, mask, 8.0, generator_logprobs=data["old"], advantages=data["advantages"], loss_mask=mask
    )
    loss.backward()
    return loss, leaf.grad, metrics["lad/nonfinite_share/mean"]


def verl(data: dict[str, Tensor], mask: Tensor, monkeypatch: pytest.MonkeyPatch, mode: str = "token-mean") -> Result:
    module = stub_verl(monkeypatch)
    leaf = data["logp"].clone().requires_grad_()
    counts = {"dp_size": 2, "batch_num_tokens": 20, "global_batch_size": 6}
    config = SimpleNamespace(policy_loss=module.LADPolicyLossConfig(), global_batch_info=counts)
    loss, metrics = module.lad_policy_loss(data["old"], leaf, data["advantages"], mask, mode, config, data["weights"])
    loss.backward()
    return loss, leaf.grad, metrics["actor/lad/nonfinite_share"]


def verl_by_sequence(data: dict[str, Tensor], mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> Result:
    return verl(data, mask, monkeypatch, "seq-mean-token-mean")


def context_parallel(level: str) -> Callable[..., Result]:
    def loss(data: dict[str, Tensor], mask: Tensor, _: pytest.MonkeyPatch) -> Result:
        leaf = data["logp"].clone().requires_grad_()
        config = LADConfig(importance_sampling_level=level, kl_coef=0.1, loss_agg_mode="seq-mean-token-mean")
        out = context_parallel_loss(
            leaf,
            data["old"],
            data["advantages"][:, 0],
            group=dist.group.WORLD,
            loss_mask=mask,
            config=config,
            ref_logprobs=data["ref"],
            rollout_is_weights=data["weights"],
        )
        out.loss.backward()
        return out.loss, leaf.grad, out.metrics["nonfinite_share"]

    return loss


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A group of one process, which context_parallel_loss wants."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


INPUTS = {  # what each adapter is given
    "prime_rl": (prime_rl(0.0), ("old", "weights")),
    "prime_rl, reference": (prime_rl(0.1), ("old", "ref")),
    "torchtitan": (torchtitan, ("old",)),
    "verl": (verl, ("old", "weights")),
    "verl, by sequence": (verl_by_sequence, ("old", "weights")),
    "context_parallel": (context_parallel("token"), ("old", "ref", "weights")),
    "context_parallel, by sequence": (context_parallel("sequence"), ("old", "ref", "weights")),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("adapter", "name"), [(a, name) for a, (_, names) in INPUTS.items() for name in names])
def test_the_token_is_dropped_and_counted(adapter, name, bad, monkeypatch):
    """Loss and gradient are those of the batch in which the token is masked."""
    run, data = INPUTS[adapter][0], batch()
    data[name][PLACE] = bad
    loss, gradient, share = run(data, MASK, monkeypatch)
    without = MASK.clone()
    without[PLACE] = False
    expected_loss, expected_gradient, none = run(data, without, monkeypatch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
    assert gradient[PLACE] == 0 and gradient.count_nonzero() >= 2
    assert float(share) == pytest.approx(1 / 8) and none == 0


@pytest.mark.parametrize("adapter", INPUTS)
def test_a_nan_of_the_policy_propagates(adapter, monkeypatch):
    data = batch()
    data["logp"][PLACE] = math.nan
    loss, gradient, share = INPUTS[adapter][0](data, MASK, monkeypatch)
    assert loss.isnan() and gradient[PLACE].isnan() and share == 0


@pytest.mark.parametrize("bad", BAD)
def test_slime_drops_and_counts_the_token(bad, monkeypatch):
    stub_slime(monkeypatch)

    def run(masks):
        args, given, logits, _, _ = slime_case()
        given["log_probs"][0][1] = bad
        lengths, leaf = given["response_lengths"], logits.clone().requires_grad_()

        def reduce(x):
            return (x.split(lengths)[0] * masks[0]).sum() / 5 + (x.split(lengths)[1] * masks[1]).sum() / 5

        loss, log = slime_lad_loss(args, given, leaf, reduce)
        loss.backward()
        return loss.detach(), leaf.grad, log

    masks = torch.tensor([1.0, 1, 0, 1]), torch.tensor([1.0, 1])
    loss, gradient, log = run(masks)
    expected_loss, expected_gradient, expected_log = run((torch.tensor([1.0, 0, 0, 1]), masks[1]))
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient) and loss.isfinite()
    assert log["lad/nonfinite_share"] == 1 / 5  # in the reducer's own terms
    assert all(torch.equal(log[n], expected_log[n]) for n in log if n != "lad/nonfinite_share")


def test_slime_propagates_a_nan_of_the_policy(monkeypatch):
    stub_slime(monkeypatch)
    args, given, logits, reduce, _ = slime_case()
    leaf = logits.clone()
    leaf[0, 2] = math.nan  # the row that predicts the first loss token
    for log_probs in (given["log_probs"], None):
        loss, _ = slime_lad_loss(args, {**given, "log_probs": log_probs}, leaf.requires_grad_(), reduce)
        assert loss.isnan()


@pytest.mark.parametrize("level", ("token", "sequence", "sequence_sum"))
def test_context_parallel_loss_drops_what_lad_loss_drops(level):
    data = batch()
    for name, place in (("old", (0, 2)), ("ref", (2, 1)), ("weights", (2, 3))):
        data[name][place] = math.nan
    config = LADConfig(importance_sampling_level=level, kl_coef=0.1, loss_agg_mode="seq-mean-token-sum")
    given = {"loss_mask": MASK, "config": config, "ref_logprobs": data["ref"]}
    found = context_parallel_loss(data["logp"], data["old"], data["advantages"][:, 0], group=dist.group.WORLD, **given)
    whole = lad_loss(data["logp"], data["old"], data["advantages"][:, 0], **given)
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.equal(found.logprobs, whole.logprobs)
    for name in found.metrics:
        if "_mean_" not in name and "loss_above" not in name:
            assert found.metrics[name].item() == pytest.approx(whole.metrics[name].item(), rel=1e-5, abs=1e-6), name


def test_context_parallel_loss_bounds_the_kl_term_as_lad_loss():
    data, config = batch(), LADConfig(kl_coef=0.1, kl_clamp=0.05)
    for name in ("logp", "old"):  # the reference is 95 nats above the policy
        data[name][PLACE] -= 95
    found = {}
    given = {"loss_mask": MASK, "config": config, "ref_logprobs": data["ref"]}
    for loss, group in ((context_parallel_loss, {"group": dist.group.WORLD}), (lad_loss, {})):
        leaf = data["logp"].clone().requires_grad_()
        out = loss(leaf, data["old"], data["advantages"][:, 0], **given, **group)
        out.loss.backward()
        found[loss] = torch.cat([out.loss.detach()[None], out.metrics["kl_ref"][None], leaf.grad.flatten()])
    torch.testing.assert_close(found[context_parallel_loss], found[lad_loss], rtol=1e-6, atol=1e-7)
    assert found[lad_loss].isfinite().all()
