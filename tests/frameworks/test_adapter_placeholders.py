"""What an adapter's masked tokens hold has no effect, whatever it is: not on the loss, its gradient, nor a metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from adapter_stubs import LossInputs, slime_case, stub_slime, stub_torchtitan, stub_verl
from torch import Tensor

from lad_kernels import LADConfig
from lad_kernels.frameworks.distributed import context_parallel_loss
from lad_kernels.frameworks.prime_rl import prime_rl_lad_loss
from lad_kernels.frameworks.slime import slime_lad_loss
from lad_kernels.objective.config import DIVERGENCES

# What stands at masked tokens, given the policy's own log-prob there; 95 nats is beyond float32's exp.
PLACEHOLDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda logp: torch.full_like(logp, math.nan),
    "inf": lambda logp: torch.full_like(logp, math.inf),
    "-inf": lambda logp: torch.full_like(logp, -math.inf),
    "1e4": lambda logp: torch.full_like(logp, 1e4),
    "-1e4": lambda logp: torch.full_like(logp, -1e4),
    "95 nats below": lambda logp: logp - 95,
    "95 nats above": lambda logp: logp + 95,
}
Found = dict[str, Tensor]  # loss, gradients and metrics by name
MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()  # [B, T]


def batch(fill: Callable[[Tensor], Tensor], *filled: str) -> dict[str, Tensor]:
    """logp, old, ref, weights and advantages [B, T]; those of `filled` hold placeholders where masked."""
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(MASK.shape, generator=g)
    data = {name: logp + 0.3 * torch.randn(MASK.shape, generator=g) for name in ("old", "ref")}
    data["weights"] = 0.5 + torch.rand(MASK.shape, generator=g)
    data["advantages"] = torch.randn(len(MASK), 1, generator=g).expand(MASK.shape).clone()
    return {n: torch.where(MASK | (n not in filled), x, fill(logp)) for n, x in {"logp": logp, **data}.items()}


def prime_rl(divergence: str, fill: Callable[[Tensor], Tensor], _: pytest.MonkeyPatch) -> Found:
    data, found = batch(fill, "logp", "old", "ref", "weights", "advantages"), {}
    for i, mask in enumerate(MASK):
        row = {name: x[i] for name, x in data.items()}  # [T]
        for ref, weights, settings in (
            (None, row["weights"], {}),
            (row["ref"], None, {"kl_coef": 0.1, "importance_sampling_level": "sequence"}),
        ):
            leaf = row["logp"].clone().requires_grad_()
            inputs = LossInputs(leaf, row["old"], ref, row["advantages"], mask, weights)
            out = prime_rl_lad_loss(inputs, divergence=divergence, **settings)
            out.loss.backward()
            values = {**out.metrics, "loss": out.loss, "gradient": leaf.grad}
            found |= {f"{i} {settings} {n}": x for n, x in values.items()}
    return found


def slime(divergence: str, fill: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Found:
    stub_slime(monkeypatch)
    args, given, logits, reduce, mask = slime_case(use_tis=False)
    args.lad["divergence"] = divergence
    lengths, mask = given["response_lengths"], mask.bool()
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy as score

    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    logp = torch.cat(score(logits, args=args, **{n: given[n] for n in names})[1]["log_probs"])  # [M]
    for name in ("log_probs", "advantages"):
        given[name] = torch.where(mask, torch.cat(given[name]), fill(logp)).split(lengths)
    leaf = logits.clone().requires_grad_()
    loss, metrics = slime_lad_loss(args, given, leaf, reduce)
    loss.backward()
    return {**metrics, "loss": loss, "gradient": leaf.grad}


def torchtitan(divergence: str, fill: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Found:
    module, data = stub_torchtitan(monkeypatch), batch(fill, "old", "advantages")
    logits = torch.randn(*MASK.shape, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.arange(MASK.numel()).view(MASK.shape) % 9
    loss, metrics = module.LADLoss(module.LADLoss.Config(divergence=divergence))(
        logits, labels, 11.0, generator_logprobs=data["old"], advantages=data["advantages"], loss_mask=MASK
    )
    loss.backward()
    return {**metrics, "loss": loss, "gradient": logits.grad}


def verl(divergence: str, fill: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Found:
    module, data = stub_verl(monkeypatch), batch(fill, "logp", "old", "weights", "advantages")
    found = {}
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        for level in ("token", "sequence"):
            settings = module.LADPolicyLossConfig(divergence=divergence, importance_sampling_level=level)
            leaf = data["logp"].clone().requires_grad_()
            loss, metrics = module.lad_policy_loss(
                data["old"],
                leaf,
                data["advantages"],
                MASK.float(),
                mode,
                SimpleNamespace(policy_loss=settings),
                data["weights"],
            )
            loss.backward()
            numbers = {n: torch.tensor(x) for n, x in metrics.items()}
            found |= {f"{mode} {level} {n}": x for n, x in {**numbers, "loss": loss, "gradient": leaf.grad}.items()}
    return found


def context_parallel(divergence: str, fill: Callable[[Tensor], Tensor], _: pytest.MonkeyPatch) -> Found:
    data, found = batch(fill, "logp", "old", "ref", "weights"), {}
    entropy = torch.where(MASK, 1.0, fill(torch.zeros(MASK.shape)))
    for level in ("token", "sequence", "sequence_sum"):
        leaves = [x.clone().requires_grad_() for x in (data["logp"], entropy)]
        config = LADConfig(divergence=divergence, importance_sampling_level=level, kl_coef=0.1, entropy_coef=0.1)
        out = context_parallel_loss(
            leaves[0],
            data["old"],
            data["advantages"][:, 0],
            group=dist.group.WORLD,
            loss_mask=MASK,
            config=config,
            ref_logprobs=data["ref"],
            entropy=leaves[1],
            rollout_is_weights=data["weights"],
        )
        out.loss.backward()
        values = {**out.metrics, "loss": out.loss, "gradient": leaves[0].grad, "entropy gradient": leaves[1].grad}
        found |= {f"{level} {n}": x for n, x in values.items()}
    return found


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A group of one process, which context_parallel_loss wants."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("adapter", (prime_rl, slime, torchtitan, verl, context_parallel), ids=lambda f: f.__name__)
def test_masked_tokens_have_no_effect(adapter, divergence, monkeypatch):
    """Bit by bit, loss, gradients and metrics are those of a batch with harmless values at masked tokens."""
    expected = adapter(divergence, lambda logp: logp - 0.1, monkeypatch)
    assert all(x.isfinite().all() for x in expected.values())
    assert any(x.count_nonzero() for n, x in expected.items() if "gradient" in n)
    for name, fill in PLACEHOLDERS.items():
        found = adapter(divergence, fill, monkeypatch)
        assert found.keys() == expected.keys()
        assert [n for n in found if not torch.equal(found[n], expected[n])] == [], name
