"""attach_fused_head as a patch: attaching, detaching, copies, other libraries' patches, wrappers, compilation."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: attaching is not tested")

from families import IDS, MASK, compare, fused_logprobs, own_logprobs, tiny_model
from transformers import LlamaForCausalLM

from lad_kernels.frameworks.transformers import attach_fused_head


def test_attach_and_detach():
    model = tiny_model("llama").eval()
    signature = inspect.signature(model.forward)
    head = attach_fused_head(model)
    assert attach_fused_head(model) is head
    assert inspect.signature(model.forward) == signature
    before = own_logprobs(model)
    assert model.generate(IDS[:, :3], attention_mask=MASK[:, :3], max_new_tokens=2, do_sample=False).shape == (2, 5)
    fused_logprobs(model)
    head.detach()
    assert model.__dict__.keys() == tiny_model("llama").__dict__.keys()
    assert torch.equal(own_logprobs(model), before)
    attach_fused_head(model)
    compare(model)


def test_copies_use_their_own_weights(tmp_path):
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    before = fused_logprobs(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    compare(twin)
    assert torch.equal(fused_logprobs(model), before) and (fused_logprobs(twin) - before).abs().max() > 0.1
    assert attach_fused_head(twin) is not attach_fused_head(model)
    attach_fused_head(twin).detach()
    assert torch.equal(fused_logprobs(model), before)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "forward" not in loaded.__dict__ and torch.equal(own_logprobs(loaded), own_logprobs(model))
    restored = pickle.loads(pickle.dumps(model))  # without the patch
    torch.testing.assert_close(own_logprobs(restored), own_logprobs(model))
    attach_fused_head(restored)
    compare(restored)


def test_patches_of_others():
    model = tiny_model("llama").eval()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    under = model.forward
    head = attach_fused_head(model)
    compare(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    compare(model)
    assert attach_fused_head(model) is head
    with pytest.raises(RuntimeError, match="patched later by somebody else"):
        head.detach()
    model.forward = ours
    head.detach()
    assert model.forward is under


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: its patch is not tested")
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of another test's trainer
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    torch.testing.assert_close(fused_logprobs(prepared), own_logprobs(prepared), rtol=0, atol=0.02)  # 0.0085 seen
    compare(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
    accelerator.state._reset_state(True)


@pytest.mark.parametrize("first", [True, False])
def test_trl(first):
    trl = pytest.importorskip("trl.trainer.utils", reason="trl is not installed: its patch is not tested")
    if not hasattr(trl, "add_fused_lm_head"):
        pytest.skip("trl is older than 1.15: its fused head is not tested")
    model = tiny_model("llama").eval()
    steps = [attach_fused_head, trl.add_fused_lm_head]
    for step in steps if first else steps[::-1]:
        step(model)
    compare(model)
    labels = IDS.where(MASK > 0, -100)
    theirs = model(input_ids=IDS, attention_mask=MASK, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(theirs, fused_logprobs(model), rtol=0, atol=1e-4)


def test_compiled_model():
    model = tiny_model("llama", num_hidden_layers=1).eval()
    attach_fused_head(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(fused_logprobs(compiled), own_logprobs(model), rtol=0, atol=1e-4)
    model.lm_head.compile(backend="eager")
    torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m.model.norm])
def test_attaching_to_no_model_is_refused(wrap):
    with pytest.raises(TypeError, match="attach before wrapping"):
        attach_fused_head(wrap(tiny_model("llama")))


def test_attaching_to_a_model_without_head_is_refused():
    with pytest.raises(ValueError, match="got LlamaModel without output embeddings"):
        attach_fused_head(tiny_model("llama").model)
