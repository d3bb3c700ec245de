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
from lad_kernels.frameworks.trl import FusedHeadMixin

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


def assert_same_runs(ours, theirs, config, folder) -> list[dict[str, float]]:
    """Trainers of both kinds log the same; returns what `theirs` logged.

    A loss adds up advantages times ratios near 1, and the advantages of a group cancel: what rounding does to it goes
    by the size of the terms, not of their sum. Measured with the kernels of three instruction sets: 1.2e-6 of the terms
    for losses, 5e-6 of the value for the rest (a gradient norm).
    """
    mine = history(build(ours, config, load(folder)))
    trainer = build(theirs, config, load(folder))
    other, advantages = history(trainer), list(trainer._logs["advantages"])  # of the last rollout
    terms = sum(map(abs, advantages)) / len(advantages)
    assert len(mine) == len(other)
    for row, expected in zip(mine, other):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            allowed = 5e-6 * terms if name in ("loss", "train_loss") else 1e-6
            if value is None:  # of a batch without a token
                assert row[name] is None, name
            else:
                assert row[name] == pytest.approx(value, rel=1e-5, abs=allowed, nan_ok=True), name
    return other


class FusedGRPOTrainer(FusedHeadMixin, trl.GRPOTrainer):
    pass


class FusedRLOOTrainer(FusedHeadMixin, trl.RLOOTrainer):
    pass
