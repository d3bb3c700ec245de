"""The adapter of torchtitan, beside a stub of its loss module."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from adapter_checks import (
    BAD,
    MASK,
    Fill,
    Found,
    Result,
    Run,
    absent,
    check_bad_token,
    check_masked_tokens,
    check_nan_of_the_policy,
    close,
    filled,
    fresh,
    put,
)
from pages import snippets_of
from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.objective.config import DIVERGENCES

ADAPTER = "lad_kernels.frameworks.torchtitan"


@dataclass
class WrapperConfig:
    num_chunks: int
    loss_fn: object


def stub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The adapter beside the stub."""

    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            pass

    class ChunkedLossWrapper:
        Config = WrapperConfig

    def compute_logprobs(logits, labels):
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    members = {"BaseLoss": BaseLoss, "ChunkedLossWrapper": ChunkedLossWrapper, "compute_logprobs": compute_logprobs}
    put(monkeypatch, "torchtitan.components.loss", **members)
    return fresh(monkeypatch, ADAPTER)


@pytest.fixture
def torchtitan(monkeypatch):
    return stub(monkeypatch)


def test_change_of_the_page(torchtitan):
    (snippet,) = snippets_of("docs/frameworks/torchtitan.md", "diff")
    names: dict = {}
    exec(snippet.after, names)
    assert names["LADLoss"](names["loss"].loss_fn).config == LADConfig(eta=0.25)


def test_chunks_add_up(torchtitan):
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


def test_says_what_is_missing_without_its_framework(monkeypatch):
    absent(monkeypatch, "torchtitan")
    adapter = fresh(monkeypatch, ADAPTER)
    with pytest.raises(ImportError, match="torchtitan"):
        adapter.LADLoss.Config()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_have_no_effect(divergence, torchtitan):
    def run(fill: Fill) -> Found:
        data = filled(fill, "old", "advantages")
        logits = torch.randn(*MASK.shape, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
        labels = torch.arange(MASK.numel()).view(MASK.shape) % 9
        loss, metrics = torchtitan.LADLoss(torchtitan.LADLoss.Config(divergence=divergence))(
            logits, labels, 11.0, generator_logprobs=data["old"], advantages=data["advantages"], loss_mask=MASK
        )
        loss.backward()
        return {**metrics, "loss": loss, "gradient": logits.grad}

    check_masked_tokens(run)


@pytest.fixture
def of_logprobs(torchtitan, monkeypatch) -> Run:
    """The loss of log-probs in place of logits; torchtitan's own divisor would leave dropped tokens out."""
    monkeypatch.setattr(torchtitan, "compute_logprobs", lambda logits, labels: logits)

    def run(data: dict[str, Tensor], mask: Tensor) -> Result:
        leaf = data["logp"].clone().requires_grad_()
        loss, metrics = torchtitan.LADLoss(torchtitan.LADLoss.Config())(
            leaf, mask, 8.0, generator_logprobs=data["old"], advantages=data["advantages"], loss_mask=mask
        )
        loss.backward()
        return loss, leaf.grad, metrics["lad/nonfinite_share/mean"]

    return run


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_is_dropped_and_counted(bad, of_logprobs):
    check_bad_token(of_logprobs, "old", bad)


def test_a_nan_of_the_policy_propagates(of_logprobs):
    check_nan_of_the_policy(of_logprobs)
