"""What the TRL tests share: a tiny saved model, options of a tiny run, and what a run logs."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
pytest.importorskip("trl", reason="TRL is not installed; the TRL adapter goes untested")

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config

from integration.tasks import build_tokenizer
from integration.trl import FusedHeadMixin

TOKENIZER = build_tokenizer()
PROMPTS = Dataset.from_list([{"prompt": f"{i}+{2 * i}="} for i in range(16)])
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
    eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
)  # fmt: skip
ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the runs are pinned to the CPU; on a GPU nothing here tests a kernel"
)


def save_model(folder, config=None) -> str:
    """TRL loads the reference policy from where the policy came from, so the model has to live in a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config or Qwen3Config(**SIZES)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def reward(completions, **_) -> list[float]:
    return [sum(c in "2468" for c in text) + 0.1 * len(text) for text in completions]


def options(tmp_path, **given) -> dict:
    return dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, max_steps=2, learning_rate=1e-3, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False, seed=1,
    ) | given  # fmt: skip


def build(kind, config, model, **given):
    given = {"train_dataset": PROMPTS, "processing_class": TOKENIZER} | given
    return kind(model, reward, args=config, **given)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def history(trainer) -> list[dict[str, float]]:
    """Everything that TRL logged except clocks."""
    trainer.train()
    clocks = ("runtime", "per_second", "step_time", "flos")
    return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in trainer.state.log_history]


def assert_same_history(ours, theirs, rel, abs=1e-6):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name] == pytest.approx(other[name], rel=rel, abs=abs, nan_ok=True), name


class FusedGRPOTrainer(FusedHeadMixin, trl.GRPOTrainer):
    pass


class FusedRLOOTrainer(FusedHeadMixin, trl.RLOOTrainer):
    pass
