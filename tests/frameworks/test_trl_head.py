"""lad_kernels/frameworks/trl_head.py beside the function that it stands in for, alone and under TRL's fused head."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed; ChunkedLogProbs goes untested")

import trl.trainer.utils as trl_utils
from transformers import CohereConfig, LlamaConfig, MixtralConfig
from trl_cases import ON_CPU, SIZES, load, save_model

from lad_kernels.frameworks.trl_head import ChunkedLogProbs
from lad_kernels.frameworks.trl_options import trl_has_fused_head

pytestmark = [
    ON_CPU,
    pytest.mark.skipif(not trl_has_fused_head, reason="TRL 1.14 has no such function; lost: ChunkedLogProbs"),
]
N, D, V = 23, 16, 300
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
NEAR = 5e-6  # relative, in float32; 1.7e-6 was measured


def stock():
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction


def near(x: Tensor, truth: Tensor) -> bool:
    return bool((x.double() - truth.double()).norm() <= NEAR * truth.double().norm())


def inputs(dtype: torch.dtype = torch.float32, biased: bool = True) -> list[Tensor | None]:
    gen = torch.Generator().manual_seed(0)
    sizes = ((N, D), (V, D), (V,))
    found = [torch.randn(*size, generator=gen).to(dtype).requires_grad_() for size in sizes]
    return [*found[:2], found[2] if biased else None, torch.randint(V, (N,), generator=gen)]


def results(function, given: list, options: tuple, outputs: tuple[str, ...]) -> tuple[list, list]:
    """Outputs, and the gradients of hidden states, weight and bias through those that have one."""
    leaves = [x for x in given[:3] if x is not None]
    out = function.apply(*given, *options, outputs)
    loss = (out[0] * torch.linspace(-1, 2, N)).sum()
    if out[1] is not None:
        loss = loss + out[1].square().sum()
    return [x if x is None else x.detach() for x in out], list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("biased", (True, False))
@pytest.mark.parametrize("transform", ((1.0, None, 1.0), (0.7, None, 0.25), (1.3, 30.0, 1.0), (0.9, 5.0, 0.5)), ids=str)
def test_values_and_gradients_are_trls(transform, biased):
    temperature, softcap, scale = transform
    names = ALL if softcap is None else tuple(n for n in ALL if n != "mean_logits")
    for count in range(len(names) + 1):
        for outputs in itertools.combinations(names, count):
            given = inputs(biased=biased)
            options = (temperature, 64, softcap, scale)
            ours, theirs = (results(f, given, options, outputs) for f in (ChunkedLogProbs, stock()))
            for x, y in zip(ours[0], theirs[0], strict=True):
                assert (x is None) == (y is None)
                assert x is None or (torch.equal(x, y) if x.dtype == torch.bool else near(x, y))
            assert all(near(x, y) for x, y in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("autocast", (True, False))
def test_bfloat16_is_closer_to_float64_than_trls(autocast):
    """TRL rounds logits to bfloat16, in autocast too; weights in float32 are cast."""
    given = inputs(torch.float32 if autocast else torch.bfloat16)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in given[:3]] + [given[3]]
    truth = results(stock(), exact, (1.0, 64, None, 1.0), ("entropy",))[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (results(f, given, (1.0, 64, None, 1.0), ("entropy",))[0] for f in (ChunkedLogProbs, stock()))
    for x, y, true in zip(ours[:2], theirs[:2], truth[:2]):
        assert x.dtype == torch.float32
        assert (x.double() - true).norm() <= 0.1 * (y.double() - true).norm()  # 0.056; without autocast 8e-5


@pytest.mark.parametrize(
    "config", (None, LlamaConfig, CohereConfig, MixtralConfig), ids=lambda c: getattr(c, "__name__", "Qwen3")
)
def test_under_trls_fused_head(config, monkeypatch, tmp_path):
    """One line of TRL changed: what trainers read of a model is the same, and so are the model's gradients."""
    more = dict(num_local_experts=3, output_router_logits=True) if config is MixtralConfig else {}
    sizes = {k: v for k, v in SIZES.items() if config in (None, LlamaConfig) or k != "head_dim"}
    folder = save_model(tmp_path, None if config is None else config(**sizes, **more))
    labels = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids = labels.clone()
    labels[0, :4] = labels[1, 7:] = -100
    found = []
    for function in (None, ChunkedLogProbs):
        model = load(folder).train()
        if function is not None:
            monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", function)
        trl_utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *ALL))
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.mean()).backward()
        fields = [out.loss, out.log_probs, out.entropy, out.log_sum_sq_probs, out.mean_logits]
        assert out.is_top1.dtype == torch.bool
        found.append(([x.detach() for x in fields], [p.grad for p in model.parameters() if p.grad is not None]))
    for theirs, ours in zip(*found, strict=True):
        assert all(near(x, y) for x, y in zip(ours, theirs, strict=True))


def test_what_is_refused():
    given = inputs()
    with pytest.raises(ValueError, match=r"mean_logits: not built with a softcap, got final_logit_softcapping=30\.0"):
        ChunkedLogProbs.apply(*given, 1.0, 64, 30.0, 1.0, ("mean_logits",))
    given[1].ds_id = 3
    with pytest.raises(ValueError, match=r"lm_head_weight: .* that ZeRO-3 partitions"):
        ChunkedLogProbs.apply(*given, 1.0, 64)
