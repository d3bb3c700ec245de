"""What the pages say others refuse, and where: PyTorch's FSDP2 on tied models, and TRL."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pages import snippets_of
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers", reason="needs the train extra; lost: whether the pages name the right refusals")

from transformers import AutoModelForCausalLM, Qwen3Config


def test_fsdp2_refuses_a_tied_head_alone():
    """docs/frameworks/distributed.md; its snippet has the way that works."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=60, tie_word_embeddings=True, **sizes))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.lm_head)
        fully_shard(model)
        with pytest.raises(ValueError, match="shared with a parameter already managed"):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Those of the TRL page's snippet, up to the trainer."""
    pytest.importorskip("trl", reason="TRL is not installed; lost: whether the TRL page names the right refusals")
    (snippet,) = snippets_of("docs/frameworks/trl.md", "python")
    return snippet._replace(source=snippet.source.split("\nconfig = ", 1)[0]).run()


def build(names: dict, tmp_path, options: dict, **given) -> None:
    config = names["LADConfig"](
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        num_generations=4,
        per_device_train_batch_size=4,
        report_to="none",
        **options,
    )
    data = {"train_dataset": names["dataset"], "processing_class": names["tokenizer"]}
    names["LADTrainer"](names["model"], names["digits"], args=config, **data, **given)


def test_trl_wants_a_folder_for_the_reference_policy(names, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="Repo id"):
        build(names, tmp_path, {"beta": 0.1})


def test_trl_refuses_lora_on_the_head(names, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed; lost: LoRA on the head under TRL")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        build(names, tmp_path, {}, peft_config=lora)
