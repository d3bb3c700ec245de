"""The TRL trainers on changed models: a float32 head by TRL, layers or a forward by Liger."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="TRL is not installed; the trainers go untested on models that it has patched")

from test_trl_loss import run_lad, truth
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3
from trl_cases import ON_CPU, SIZES, FusedGRPOTrainer, assert_same_runs, build, history, load, options, save_model, trl

import lad_kernels.frameworks.trl as adapter
from lad_kernels.frameworks.trl import LADConfig, LADTrainer
from lad_kernels.frameworks.trl_options import trl_has_fused_head

pytestmark = ON_CPU


@pytest.fixture(scope="module")
def folders(tmp_path_factory, one_thread) -> dict[bool, str]:
    """A saved model by whether its head is tied."""
    root = tmp_path_factory.mktemp("models")
    configs = {tied: Qwen3Config(**SIZES, tie_word_embeddings=tied) for tied in (False, True)}
    return {tied: save_model(root / str(tied), config) for tied, config in configs.items()}


@pytest.mark.parametrize("tied", (False, True))
def test_a_float32_head_on_a_16_bit_body(tied, folders, tmp_path):
    """ScaleRL's recipe, and both cures that the refusal under autocast names."""
    folder, cast = folders[tied], dict(cast_lm_head_to_fp32=True, max_steps=1)
    for kind, config in ((LADTrainer, LADConfig), (FusedGRPOTrainer, trl.GRPOConfig)):
        with pytest.raises(ValueError, match="cast_lm_head_to_fp32: expected False under bf16 or fp16 autocast"):
            build(kind, config(**options(tmp_path, bf16=True, **cast)), load(folder))
    history(build(LADTrainer, LADConfig(**options(tmp_path, bf16=True, max_steps=1)), load(folder)))
    # What TRL loads itself, from model_init_kwargs; its body rounds to 2^-9, in both alike but for ties.
    given = options(tmp_path, bf16=False, beta=0.1, model_init_kwargs={"dtype": "bfloat16"}, **cast)
    mine = history(build(FusedGRPOTrainer, trl.GRPOConfig(**given), folder))[0]
    theirs = history(build(trl.GRPOTrainer, trl.GRPOConfig(**given), folder))[0]
    assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=1e-6)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2**-9)


@pytest.mark.parametrize("tied", (False, True))
def test_gradient_of_a_float32_head_is_that_of_stored_logits(tied, folders, tmp_path):
    given = dict(cast_lm_head_to_fp32=True, beta=0.1, num_iterations=2)
    trainer, steps = run_lad(folders[tied], tmp_path, dtype=torch.bfloat16, **given)
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert trainer.model.model.norm.weight.dtype == torch.bfloat16
    for grads, weights, batches, _ in steps:

        def gradient(model, names=tuple(grads), weights=weights, batches=batches):
            model.load_state_dict(weights, strict=False)  # tied: one of the two names
            model.zero_grad()
            truth(trainer, model, batches)[0].backward()
            return torch.cat([model.get_parameter(n).grad.double().flatten() for n in names])

        exact, stored = gradient(load(folders[tied], torch.float64)), gradient(trainer.model)
        ours = torch.cat([g.double().flatten() for g in grads.values()])
        print(f"{tied}: ours {(ours - exact).norm() / exact.norm():.1e}, {(stored - exact).norm() / exact.norm():.1e}")
        assert (ours - exact).norm() <= 1.02 * (stored - exact).norm()
        assert (ours - stored).norm() <= 2**-9 * exact.norm()


@pytest.fixture
def own_layers(monkeypatch):
    """Liger replaces functions and classes of the module that models are made of; afterwards they come back."""
    for name in ("apply_rotary_pos_emb", "Qwen3MLP", "Qwen3RMSNorm"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))


@pytest.mark.usefixtures("own_layers")
@pytest.mark.skipif(not trl_has_fused_head, reason="TRL 1.14 applies more of Liger than its layers")
def test_ligers_layers(folders, tmp_path):
    """Its rotary embedding alone: Triton's interpreter runs no other of its kernels."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: TRL's use_liger_kernel goes untested")
    plain = options(tmp_path, max_steps=1, max_completion_length=2)
    before = history(build(LADTrainer, LADConfig(**plain), load(folders[False])))[0]
    layers = dict(use_liger_kernel=True, liger_kernel_config=dict(rms_norm=False, swiglu=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = trl.GRPOConfig(**plain, **layers)
        assert_same_runs(FusedGRPOTrainer, trl.GRPOTrainer, config, folders[False])
        after = history(build(LADTrainer, LADConfig(**plain, **layers), load(folders[False])))[0]
    assert modeling_qwen3.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
    fused = layers | dict(liger_kernel_config={"fused_linear_cross_entropy": True})
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"fused_linear_cross_entropy.*not supported"):
        build(LADTrainer, LADConfig(**plain, **fused), load(folders[False]))


def test_liger_is_refused_where_trl_would_apply_its_loss(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "trl_has_fused_head", False)
    for kind, config in ((LADTrainer, LADConfig), (FusedGRPOTrainer, trl.GRPOConfig)):
        with pytest.raises(ValueError, match=r"use_liger_kernel: expected False with TRL 1\.14, got True"):
            build(kind, config(**options(tmp_path, use_liger_kernel=True)), load(folders[False]))


@pytest.mark.usefixtures("own_layers")
def test_a_library_that_patches_the_forward(folders, tmp_path):
    """Before the trainer is built it works; afterwards the message says so, as it does for attach_fused_head."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed: nothing patches")
    options_of = dict(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True)

    def patch(model: nn.Module) -> nn.Module:
        liger.apply_liger_kernel_to_qwen3(model=model, **options_of)
        return model

    config = LADConfig(**options(tmp_path, max_steps=1, num_iterations=2))
    expected = history(build(LADTrainer, config, load(folders[False])))[0]
    assert history(build(LADTrainer, config, patch(load(folders[False]))))[0] == pytest.approx(expected, rel=1e-6)
    late = build(LADTrainer, config, load(folders[False]))
    patch(late.model)
    with pytest.raises(TypeError, match="attach after that library has patched the model"):
        late.train()
