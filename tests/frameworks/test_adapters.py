"""Adapters that only need the signature of their framework, held against stubs of it.

verl's adapter is tested against verl itself in with_verl/, TRL's in test_trl.py.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_stubs import LossInputs, get_log_probs_and_entropy, slime_case, stub_slime, stub_torchtitan
from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.prime_rl import prime_rl_lad_loss
from lad_kernels.frameworks.slime import slime_lad_loss

LENGTHS = (5, 0, 3)  # tokens of three sequences


def sequences() -> list[dict[str, Tensor]]:
    """Per sequence: log-probs, old ones (NaN where masked), advantages, mask, weights, each [T]."""
    g = torch.Generator().manual_seed(0)
    found = []
    for kept in LENGTHS:
        length = kept + 2
        mask = torch.arange(length) >= 2  # a prompt of two tokens
        logp = -3 * torch.rand(length, generator=g)
        old = (logp + 0.3 * torch.randn(length, generator=g)).masked_fill(~mask, float("nan"))
        weights = 0.5 + torch.rand(length, generator=g)
        advantages = torch.randn(1, generator=g).expand(length)
        found.append({"logp": logp, "old": old, "advantages": advantages, "mask": mask, "weights": weights})
    return found


def truth(data: list[dict[str, Tensor]], settings: LADConfig, total: float, weighted: bool) -> Tensor:
    """d loss / d log-probs of all sequences [N] in float64, by the specification, as one batch."""
    whole = {name: torch.cat([row[name] for row in data]) for name in data[0]}
    logp = whole["logp"].double().requires_grad_()
    out = lad_loss(
        logp,
        whole["old"].double(),
        whole["advantages"].double(),
        loss_mask=whole["mask"],
        config=settings,
        cu_seqlens=torch.tensor([0, *(len(row["mask"]) for row in data)]).cumsum(0).int(),
        normalizer=total,
        rollout_is_weights=whole["weights"].double() if weighted else None,
        impl="reference",
    )
    return torch.autograd.grad(out.loss, logp)[0]


def close(x: Tensor, expected: Tensor) -> bool:
    return ((x.double() - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("weighted", (False, True))
def test_prime_rl_sums_over_sequences(weighted, level):
    data = sequences()
    settings = {"eta": 0.7, "divergence": "hd", "importance_sampling_level": level}
    logps = [row["logp"].clone().requires_grad_() for row in data]
    outs = [
        prime_rl_lad_loss(
            LossInputs(logp, row["old"], None, row["advantages"], row["mask"], row["weights"] if weighted else None),
            **settings,
        )
        for logp, row in zip(logps, data)
    ]
    total = 29  # what the trainer divides by
    (sum(out.loss for out in outs) / total).backward()
    assert close(torch.cat([x.grad for x in logps]), truth(data, LADConfig(**settings), total, weighted))
    assert logps[1].grad.eq(0).all()  # a fully masked sequence still takes part in backward
    keys = {frozenset(out.metrics) for out in outs}
    assert len(keys) == 1 and all(x.ndim == 0 for out in outs for x in out.metrics.values())


def test_prime_rl_refuses_what_it_cannot_honour():
    row = sequences()[0]
    inputs = LossInputs(row["logp"], row["old"], None, row["advantages"], row["mask"], row["weights"])
    refused = {"loss_agg_mode": "token-mean", "target_norm": "group", "kl_coef": 0.1, "tail_mass": 1e-3}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            prime_rl_lad_loss(inputs, **{name: value})
    for name in ("ref_logprobs", "entropy"):
        inputs = LossInputs(row["logp"], row["old"], None, row["advantages"], row["mask"])
        with pytest.raises(ValueError, match=f"^{name}: needed"):
            prime_rl_lad_loss(inputs, **{"kl_coef" if name == "ref_logprobs" else "entropy_coef": 0.1})


@pytest.fixture
def slime(monkeypatch):
    stub_slime(monkeypatch)


def test_slime_has_lads_gradient_under_its_own_reduction(slime):
    args, batch, logits, reduce, mask = slime_case(entropy_coef=0.0, use_tis=False)
    leaf = logits.clone().requires_grad_()
    loss, log = slime_lad_loss(args, batch, leaf, reduce)
    loss.backward()

    wide = logits.double().requires_grad_()
    scored = get_log_probs_and_entropy(
        wide, args=args, **{k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")}
    )[1]
    logp, old = torch.cat(scored["log_probs"]), torch.cat(batch["log_probs"]).double()
    u = torch.cat(batch["advantages"]).double() / 0.6
    x = (logp - old - u).exp()
    tokens = u.exp() * 0.5 * (x * x.log() - (x + 1) * ((x + 1) / 2).log())  # js, as the paper writes it
    reduce(tokens).backward()
    assert close(leaf.grad, wide.grad)
    assert log["loss"] == loss.detach()
    assert torch.isclose(log["ppo_kl"].double(), reduce(old - logp), rtol=1e-5)

    on_policy = {name: x for name, x in batch.items() if name != "log_probs"}
    assert slime_lad_loss(args, on_policy, logits, reduce)[1]["lad/ratio"] == reduce(torch.ones_like(mask))


def test_slime_refuses_what_it_cannot_honour(slime):
    for name, value in (("entropy_coef", 0.01), ("use_tis", True), ("use_kl_loss", True)):
        args, batch, logits, reduce, _ = slime_case(**{name: value})
        with pytest.raises(ValueError, match=f"^{name}: "):
            slime_lad_loss(args, batch, logits, reduce)
    args, batch, logits, reduce, _ = slime_case()
    args.lad = {"importance_sampling_level": "sequence"}
    with pytest.raises(ValueError, match=r"^importance_sampling_level: "):
        slime_lad_loss(args, batch, logits, reduce)


@pytest.fixture
def torchtitan(monkeypatch):
    return stub_torchtitan(monkeypatch)


def test_torchtitan_chunks_add_up(torchtitan):
    """Chunks of a sequence with the global count give the gradient of the whole; a NaN log-prob drops its token."""
    g = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(2, 6, 9, generator=g), torch.randint(0, 9, (2, 6), generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()
    old = -3 * torch.rand(2, 6, generator=g)
    old[0, 2] = float("nan")
    rest = {"generator_logprobs": old, "advantages": torch.randn(2, 6, generator=g), "loss_mask": mask}
    config = torchtitan.LADLoss.Config(eta=0.7)
    loss = torchtitan.LADLoss(pickle.loads(pickle.dumps(config)))  # configs travel to actors
    total, leaf = 13.0, logits.clone().requires_grad_()
    parts = [
        loss(leaf[:, s], labels[:, s], total, **{k: x[:, s] for k, x in rest.items()})
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    sum(part[0] for part in parts).backward()

    wide = logits.double().requires_grad_()
    logp = wide.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    kept = mask & old.isfinite()
    out = lad_loss(
        logp,
        old.double(),
        rest["advantages"].double(),
        loss_mask=kept,
        config=LADConfig(eta=0.7),
        normalizer=total,
        impl="reference",
    )
    out.loss.backward()
    assert close(leaf.grad, wide.grad)
    assert sum(part[1]["loss/mean"] for part in parts).item() == pytest.approx(out.loss.item(), rel=1e-6)
    whole = lad_loss(logp, old.double(), rest["advantages"].double(), loss_mask=kept, config=LADConfig(eta=0.7))
    dropped = "lad/nonfinite_share/mean"
    assert sum(part[1][dropped] for part in parts).item() == pytest.approx(1 / total)
    for key in parts[0][1].keys() - {"loss/mean", dropped}:
        _, name, kind = key.split("/")
        seen, true = torch.stack([part[1][key] for part in parts]), whole.metrics[name].item()
        found, true = (seen.amax(), true) if kind == "max" else (seen.sum(), true * kept.sum().item() / total)
        assert found.item() == pytest.approx(true, rel=1e-5, abs=1e-7), key
    assert {"lad/ratio_mean/mean", "lad/ratio_max/max"} <= parts[0][1].keys()
    endings = ("/mean", "/max")  # all that torchtitan knows how to reduce
    assert all(key.endswith(endings) for part in parts for key in part[1])


def test_adapters_without_their_frameworks():
    """They can be imported, and say what is missing when they are used."""
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("verl", "torchtitan", "slime"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from lad_kernels.frameworks import prime_rl, slime, torchtitan, verl
loss = lambda: slime.slime_lad_loss(None, {}, None, None)
for use in (torchtitan.LADLoss.Config, verl.LADPolicyLossConfig, loss):
    try: use()
    except ImportError as error: print(error)
"""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 3 and all(name in line for name, line in zip(("torchtitan", "verl", "slime"), lines))
