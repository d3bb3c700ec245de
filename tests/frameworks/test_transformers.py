"""attach_fused_head against the logits of the models themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: nothing about attach_fused_head is tested")

from families import (
    CAUSAL,
    DROP,
    FAMILIES,
    GRADIENT_TOLERANCE,
    HIDDEN,
    IDS,
    MASK,
    VISION,
    VOCABULARY,
    compare,
    fused,
    fused_logprobs,
    gradients,
    own_logprobs,
    tiny_model,
)
from transformers import LlamaForCausalLM

from lad_kernels import LADConfig, linear_lad_loss, linear_logprobs
from lad_kernels.frameworks.transformers import LogitTransform, attach_fused_head
from lad_kernels.head import dispatch


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, record_property):
    model = tiny_model(family).eval()
    attach_fused_head(model)
    errors = compare(model)
    record_property("errors", errors)
    assert own_logprobs(model).std() > 0.1


def head_options(model) -> LogitTransform:
    seen = []

    def function(hidden, weight, *, bias, **transform):
        seen.append(LogitTransform(**transform))
        return hidden.sum()

    model(input_ids=IDS, fused_head=function)
    return seen[-1]


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [
        ("gemma2", 1, 3),
        ("gemma3_text", 1, 4),
        ("recurrent_gemma", 1, 3),
        ("xlstm", 1, 3),
        ("cohere", 0.37, None),
        ("falcon_h1", 0.6, None),
        ("granite", 1 / 1.7, None),
        ("hyperclovax", 0.6, None),
        # configs that mislead
        ("mpt", 1, None),
        ("minicpm3", 1, None),
        ("gemma3", 1, None),
    ],
)
def test_transform(family, scale, softcap):
    model = tiny_model(family).eval()
    attach_fused_head(model)
    found = head_options(model)
    assert found.logit_scale == pytest.approx(scale, rel=1e-6)
    assert found.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))


def test_the_transform_matters():
    for family in ("gemma2", "recurrent_gemma", "xlstm", "cohere", "falcon_h1", "granite", "hyperclovax"):
        model = tiny_model(family).eval()
        attach_fused_head(model)
        plain = model(input_ids=IDS, attention_mask=MASK, fused_head=lambda h, w, **_: fused(h, w)).result
        assert (plain - own_logprobs(model)).abs().max() > 0.05, family


@pytest.mark.parametrize(("family", "first"), [("qwen3", 1), ("gemma2", 1), ("mpt", 2)])
def test_the_first_call_is_repeated_only_if_the_config_misled(family, first):
    model = tiny_model(family).eval()
    attach_fused_head(model)
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    fused_logprobs(model)
    assert len(calls) == first
    fused_logprobs(model)
    assert len(calls) == first + 1


class Llama(LlamaForCausalLM):
    """A family nobody has heard of: its logits go through `after`."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.after(out.logits)
        return out


def unknown_model(after) -> Llama:
    model = tiny_model("llama").eval()
    model.__class__, model.after = Llama, after
    attach_fused_head(model)
    return model


def test_unknown_scale_and_softcap_are_measured():
    compare(unknown_model(lambda z: 2.5 * torch.tanh(0.3 * z / 2.5)))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda z: z.relu(), "scale and a softcap"),
        (lambda z: z + torch.arange(z.shape[-1]) / 100, "scale and a softcap"),
        (lambda z: z.where(torch.arange(z.shape[-1]) != 5, -1e9), "scale and a softcap"),
        (lambda z: z - z.mean(-1, keepdim=True), "scale and a softcap"),
        (lambda z: 3 * z / (3 + z.abs()), "scale and a softcap"),
        (lambda z: z[..., :90], "cut after the head"),
    ],
)
def test_other_transforms_are_refused(after, message):
    with pytest.raises(ValueError, match=f"expected Llama to .*{message}"):
        fused_logprobs(unknown_model(after))


def test_a_transform_that_changes_is_refused():
    scales = iter([2.0, 3.0])
    with pytest.raises(ValueError, match=r"treat its logits alike in every call, got .*=2\.0.* and then .*=3\.0"):
        fused_logprobs(unknown_model(lambda z: z * next(scales)))


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_a_first_call_without_finite_rows_is_checked_later(family):
    model = tiny_model(family).eval()
    head = attach_fused_head(model)
    with torch.no_grad():
        broken = copy.deepcopy(model.get_input_embeddings().weight)
        model.get_input_embeddings().weight.fill_(torch.nan)
        out = model(input_ids=IDS, fused_head=lambda h, w, **_: h.sum()).result
    assert out.isnan() and not head._checked
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(broken)
    compare(model)
    assert head._checked


def test_a_cut_vocabulary_is_refused(monkeypatch):
    changes = {"rel_extent": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
    monkeypatch.setitem(CAUSAL, "inkling_text", {"sliding_window": DROP, "sliding_window_size": 4, **changes})
    model = tiny_model("inkling_text", unpadded_vocab_size=90).eval()
    attach_fused_head(model)
    with pytest.raises(ValueError, match=r"expected InklingForCausalLM to keep its 97 logits, got \[1, 1, 90\]"):
        fused_logprobs(model)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (Doubling(HIDDEN, VOCABULARY), ValueError, "expected the head, Doubling, to be hidden W"),
        (nn.Sequential(nn.Linear(HIDDEN, VOCABULARY)), TypeError, "got torch.nn.modules.container.Sequential"),
        (torch.compile(nn.Linear(HIDDEN, VOCABULARY), backend="eager"), TypeError, "got .*OptimizedModule"),
    ],
)
def test_other_heads_are_refused(head, error, message):
    model = tiny_model("llama").eval()
    model.lm_head = head
    attach_fused_head(model)
    with pytest.raises(error, match=message):
        fused_logprobs(model)


def test_a_model_that_does_not_call_its_head_is_refused():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    unused = nn.Linear(HIDDEN, VOCABULARY)
    model.get_output_embeddings = lambda: unused
    with pytest.raises(ValueError, match="call its output embeddings, it never did"):
        fused_logprobs(model)


def test_a_model_that_calls_its_head_twice_is_refused():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    model.model.norm.register_forward_hook(lambda module, args, out: (model.lm_head(out), out)[1])
    with pytest.raises(ValueError, match="calls its head once, got a second call"):
        fused_logprobs(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": IDS}, "labels: expected None"),
        ({"use_cache": True}, "use_cache: expected False"),
        ({"past_key_values": ()}, "past_key_values: expected None"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(inputs, message):
    model = tiny_model("llama")
    attach_fused_head(model)
    with pytest.raises(ValueError, match=message):
        fused_logprobs(model, **inputs)


@pytest.mark.parametrize("function", [3, lambda h, w, **_: 1.0, lambda h, w, **_: {"a": h, "b": object()}])
def test_functions_that_are_none_or_return_no_tensors_are_refused(function):
    model = tiny_model("llama")
    attach_fused_head(model)
    with pytest.raises(TypeError, match="fused_head: expected a function"):
        model(input_ids=IDS, fused_head=function)


def test_results_keep_their_structure():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    scores = model(input_ids=IDS, fused_head=lambda h, w, **k: linear_logprobs(h, w, IDS, **k)).result
    assert type(scores).__name__ == "LinearLogprobs" and scores.entropy is None
    assert scores.logprobs.shape == IDS.shape and not scores.logprobs._is_view()
    out = model(input_ids=IDS, fused_head=lambda h, w, **_: {"shape": (h.sum(-1), [w.sum()]), "none": None})
    assert out.result["shape"][0].shape == IDS.shape and out.result["none"] is None and out.aux_loss is None


def test_hooks_that_round_outputs_do_not_round_results():
    """FSDP2 casts the outputs of its modules to `output_dtype`."""
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    before = fused_logprobs(model)
    for module in (model, model.lm_head):
        module.register_forward_hook(
            lambda module, args, out: torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, out)
        )
    after = fused_logprobs(model)
    assert after.dtype == torch.float32 and torch.equal(after, before)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "jetmoe", "phimoe", "qwen3_vl_moe"])
def test_aux_loss(family):
    model = tiny_model(family).eval()
    attach_fused_head(model)
    config = model.config.get_text_config()
    name = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    for owner in (config, model):
        if hasattr(owner, name):
            setattr(owner, name, 0.7)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with_aux, without = (model(**inputs, labels=IDS, output_router_logits=x).loss for x in (True, False))
    out = model(**inputs, fused_head=fused, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, with_aux - without, rtol=1e-4, atol=1e-5)
    assert out.aux_loss > 0.1 and model(**inputs, fused_head=fused, output_router_logits=False).aux_loss is None
    config.output_router_logits = True
    out.aux_loss.backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0
        for n, p in model.named_parameters()
        if "router" in n or "gate" in n
    )


def test_aux_loss_that_the_model_cannot_compute_is_refused():
    model = tiny_model("granitemoe").eval()
    attach_fused_head(model)
    with pytest.raises(ValueError, match="GraniteMoeForCausalLM to compute a tensor aux_loss, got 0"):
        fused_logprobs(model, output_router_logits=True)
    compare(model, output_router_logits=False)


@pytest.mark.parametrize("path", ["two_pass", "one_pass"])
def test_a_frozen_head_costs_no_dw(path):
    model = tiny_model("llama").eval()
    attach_fused_head(model)

    def loss(hidden, weight, **head):
        return linear_lad_loss(
            hidden[:, :-1],
            weight,
            IDS[:, 1:],
            None,
            rewards=torch.tensor([0.0, 1.0]),
            group_size=2,
            config=LADConfig(backward="dense"),
            **head,
        )

    flops = []
    for trained in (True, False):
        model.lm_head.requires_grad_(trained)
        with dispatch.force(path):
            out = model(input_ids=IDS, fused_head=loss).result
            out.loss.backward()
        flops.append(out.metrics["head_flops"].item())
    product = 2 * 16 * HIDDEN * VOCABULARY
    assert flops[0] - flops[1] == pytest.approx(product)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "phi", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(family, dtype):
    model = tiny_model(family).eval().to(dtype)
    attach_fused_head(model)
    logits = model(input_ids=IDS).logits
    error = (fused_logprobs(model) - own_logprobs(model)).abs().max()
    assert error < 2 * torch.finfo(dtype).eps * (1 + logits.abs().max())  # at most 0.5 seen


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary(tied):
    model = tiny_model("qwen3", tie_word_embeddings=tied).eval()
    model.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert len(model.lm_head.weight) == 128 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    attach_fused_head(model)
    compare(model)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_images(family):
    model = tiny_model(family).eval()
    attach_fused_head(model)
    ids = torch.cat([torch.full((2, 4), 90), IDS], 1)  # an image is 4 tokens
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    own = model(input_ids=ids, pixel_values=pixels).logits[:, 4:].log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    other = model(input_ids=ids, pixel_values=-pixels).logits[:, 4:]
    assert (other.log_softmax(-1).gather(-1, IDS[..., None])[..., 0] - own).abs().max() > 1e-3

    def function(hidden, weight, **head):
        return linear_logprobs(hidden[:, 4:], weight, IDS, **head).logprobs

    ours = model(input_ids=ids, pixel_values=pixels, fused_head=function).result
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-4)
    truth, found = gradients(model, own[:, 1:]), gradients(model, ours[:, 1:])
    assert truth.keys() == found.keys() and any("vision" in name for name in truth)
    largest = torch.stack([g.abs().max() for g in truth.values()]).max().item()
    for name, g in truth.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=GRADIENT_TOLERANCE * largest, msg=name)


def test_a_changed_head_is_checked_anew():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    fused_logprobs(model)
    model.lm_head.__class__ = Doubling
    model.lm_head = copy.deepcopy(model.lm_head)
    with pytest.raises(ValueError, match="expected the head, Doubling"):
        fused_logprobs(model)


def test_every_family_is_listed_once():
    assert sorted({*CAUSAL, *VISION}) == FAMILIES and len(FAMILIES) >= 90
