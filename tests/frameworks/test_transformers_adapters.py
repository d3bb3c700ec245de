"""attach_fused_head with PEFT adapters on the head, against the logits of the models themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: adapters on the head are not tested")
pytest.importorskip("peft", reason="peft is not installed: adapters on the head are not tested")

import peft
from families import IDS, compare, fused_logprobs, gradients, own_logprobs, tiny_model

from lad_kernels.frameworks.transformers import attach_fused_head


def with_peft(config, *, attach_first: bool = False, family: str = "qwen3", **changes):
    model = tiny_model(family, **{"tie_word_embeddings": False} | changes)
    if attach_first:
        attach_fused_head(model)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
    attach_fused_head(model)
    return model


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"]} | options)


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_on_the_head(options, attach_first):
    model = with_peft(lora(**options), attach_first=attach_first).train()
    compare(model)
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(p.requires_grad for name, p in model.named_parameters() if name in names)
    assert any("lm_head" in name for name in names) == ("lm_head" in str(options) or "target_modules" not in options)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["phi", "qwen3"])  # with and without a bias of its own
def test_adapter_with_bias(family):
    model = with_peft(lora(lora_bias=True, target_modules=["lm_head"]), family=family)
    compare(model.eval())


def test_several_adapters_and_merged_ones():
    model = with_peft(lora()).eval()
    fused_logprobs(model)
    one = own_logprobs(model)
    model.add_adapter("second", lora(r=2, lora_alpha=5))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["second"].weight)
    model.base_model.set_adapter(["default", "second"])
    compare(model)
    assert (own_logprobs(model) - one).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("LoraConfig", {"use_dora": True}, "DoraLinearVariant"),
        ("IA3Config", {"feedforward_modules": []}, "IA3"),
        ("VeraConfig", {"r": 4}, "vera"),
        ("LoHaConfig", {}, "LoHa"),
        ("AdaLoraConfig", {"total_step": 9}, "SVDLinear"),
        ("OFTConfig", {"oft_block_size": 4}, "oft"),
    ],
)
def test_other_adapters_on_the_head_are_refused(method, options, message):
    model = with_peft(getattr(peft, method)(**options, target_modules=["lm_head"])).eval()
    with pytest.raises(TypeError, match=f"lm_head: expected .*(?i:{message})"):
        fused_logprobs(model)


TRAINED = sorted({IDS[0, 1].item(), IDS[1, 3].item(), 1})
TOKENS = {
    "of the embedding": lora(target_modules=["q_proj"], trainable_token_indices=TRAINED),
    "of both": lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TRAINED, "lm_head": TRAINED}),
    "alone": peft.TrainableTokensConfig(token_indices=TRAINED),
    "of the head": peft.TrainableTokensConfig(token_indices=TRAINED, target_modules=["lm_head"]),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_trained_token_rows(name, tied):
    """On a tied head the rows of the embedding are the head's too."""
    model = with_peft(copy.deepcopy(TOKENS[name]), tie_word_embeddings=tied)
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    for p in rows:
        nn.init.normal_(p, std=0.5)
    for training in (True, False):
        compare(model.train(training))
        assert all(p.grad.abs().max() > 0 for p in rows) and rows
    with model.disable_adapter():
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-5)


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING; virtual tokens shift"):
        attach_fused_head(peft.get_peft_model(tiny_model("llama"), config))


def test_autocast_keeps_gradients():
    """Casts that the check makes without gradients must not be found by the call itself."""
    model = with_peft(lora()).train()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, fused_logprobs(model)))
    assert found[0].keys() == found[1].keys() and any("lm_head.lora_A" in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_first_call_leaves_no_trace():
    model = with_peft(lora(lora_dropout=0.5)).train()
    model.base_model.model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        out = fused_logprobs(model)
        draws.append((out.detach(), torch.rand(3)))
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


@pytest.mark.parametrize("attach_first", [False, True])
def test_a_forward_that_was_replaced_later_is_named(attach_first):
    model = with_peft(lora(), attach_first=attach_first).eval()
    base = model.get_base_model()

    def another_forward(*args, fused_head=None, **kwargs):
        return type(base).forward(base, *args, **kwargs)

    ours, base.forward = base.forward, another_forward
    with pytest.raises(TypeError, match=r"got .*another_forward, which somebody put in its place"):
        fused_logprobs(model)
    base.forward = ours
    compare(model)
    attach_fused_head(model).detach()
    assert not model._forward_hooks and not base._forward_hooks
