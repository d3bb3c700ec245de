"""The adapter of prime-rl, beside a stub of the one record that it reads."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

import pytest
import torch
from adapter_checks import (
    BAD,
    MASK,
    PLACE,
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
)
from pages import snippets_of
from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.prime_rl import prime_rl_lad_loss
from lad_kernels.objective.config import DIVERGENCES


@dataclass
class LossInputs:
    """prime-rl 0.8's record of one sequence."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


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


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("weighted", (False, True))
def test_sums_over_sequences(weighted, level):
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


def test_refuses_what_it_cannot_honour():
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


def test_needs_nothing_of_its_framework(monkeypatch):
    absent(monkeypatch, "prime_rl")
    row = sequences()[0]
    inputs = LossInputs(row["logp"], row["old"], None, row["advantages"], row["mask"])
    assert fresh(monkeypatch, prime_rl_lad_loss.__module__).prime_rl_lad_loss(inputs).loss.isfinite()


def test_configuration_of_the_page():
    (snippet,) = snippets_of("docs/frameworks/prime_rl.md", "diff")
    loss = tomllib.loads(snippet.after)["trainer"]["loss"]
    assert loss["import_path"] == f"{prime_rl_lad_loss.__module__}.{prime_rl_lad_loss.__name__}"
    assert LADConfig(**loss["kwargs"]).eta == 0.25


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_have_no_effect(divergence):
    def run(fill: Fill) -> Found:
        data, found = filled(fill, "logp", "old", "ref", "weights", "advantages"), {}
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

    check_masked_tokens(run)


def one_sequence(kl_coef: float) -> Run:
    """The sequence of PLACE, with a reference policy or with weights: the adapter takes one or the other."""

    def run(data: dict[str, Tensor], mask: Tensor) -> Result:
        leaf, row = data["logp"].clone().requires_grad_(), PLACE[0]
        weights = None if kl_coef else data["weights"][row]
        inputs = LossInputs(leaf[row], data["old"][row], data["ref"][row], data["advantages"][row], mask[row], weights)
        out = prime_rl_lad_loss(inputs, kl_coef=kl_coef)
        out.loss.backward()
        return out.loss, leaf.grad, out.metrics["lad/nonfinite_share"] * 3 / 8  # of three tokens in this sequence

    return run


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("kl_coef", "name"), [(0.0, "old"), (0.0, "weights"), (0.1, "old"), (0.1, "ref")])
def test_a_bad_token_is_dropped_and_counted(kl_coef, name, bad):
    check_bad_token(one_sequence(kl_coef), name, bad)


@pytest.mark.parametrize("kl_coef", (0.0, 0.1))
def test_a_nan_of_the_policy_propagates(kl_coef):
    check_nan_of_the_policy(one_sequence(kl_coef))
