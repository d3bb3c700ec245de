"""The README's snippets run as they stand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: the README's snippets")

README = Path(__file__).resolve().parents[2] / "README.md"


def snippet(heading: str, language: str = "python") -> str:
    """The first block of a language after a heading."""
    text = README.read_text().split(f"\n{heading}\n", 1)[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def run(source: str, given: dict) -> dict:
    exec(compile(source, "README.md", "exec"), given)
    return given


def test_first_snippet_runs(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(device)
    input_ids = torch.randint(0, 64, (8, 10), device=device)
    completion_mask = torch.arange(10, device=device).expand(8, 10) >= 4
    given = dict(
        model=model, input_ids=input_ids, mask=torch.ones_like(input_ids), completion_mask=completion_mask,
        rewards=torch.rand(8, device=device), old_logprobs=-4 * torch.rand(8, 9, device=device),
    )  # fmt: skip
    run(re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1), given)
    assert given["out"].loss.isfinite()
    assert model.lm_head.weight.grad.count_nonzero()
    assert model.model.embed_tokens.weight.grad.count_nonzero()


def test_the_families_are_listed():
    from tests.families import FAMILIES

    text = re.search(r"<summary>The families</summary>\n\n(.*?)\n\n</details>", README.read_text(), re.DOTALL).group(1)
    assert text.replace("\n", " ").split(", ") == FAMILIES
    assert len(FAMILIES) >= 40


def test_transformers_snippet():
    given = run(snippet("### transformers"), {})
    assert given["out"].result.logprobs.shape == (2, 15)
    assert given["model"].lm_head.weight.grad.count_nonzero()


def test_trl_snippet(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the trl extra: trl; lost: the snippet of the TRL section")
    from datasets import Dataset

    from integration.policy import build_policy

    monkeypatch.chdir(tmp_path)
    policy = build_policy(None, "cpu", pretrained=False, hidden_size=32, layers=1)
    dataset = Dataset.from_list([{"prompt": f"{i} {i + 1}="} for i in range(16)])
    given = {"torch": torch, "model": policy.model, "tokenizer": policy.tokenizer, "dataset": dataset}
    before = policy.model.lm_head.weight.detach().clone()
    assert run(snippet("### TRL"), given)["trainer"].state.global_step == 2
    assert (policy.model.lm_head.weight != before).any()


def test_sharded_snippet():
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    given = {
        "model": model, "ids": torch.randint(0, 60, (2, 8)), "old": -4 * torch.rand(2, 7), "mask": torch.ones(2, 7),
        "advantages": torch.tensor([1.0, -1.0]), "hidden": torch.randn(2, 7, 16), "rows": torch.randn(60, 16),
    }  # fmt: skip
    try:
        run(snippet("### Sharded heads"), given)
        assert model.lm_head.weight.grad.full_tensor().count_nonzero()
        assert given["out"].loss.isfinite()
    finally:
        dist.destroy_process_group()


def test_prime_rl_snippet():
    from lad_kernels import LADConfig
    from lad_kernels.frameworks.prime_rl import prime_rl_lad_loss

    loss = tomllib.loads(snippet("### prime-rl, torchtitan, slime", "toml"))["trainer"]["loss"]
    assert loss["import_path"] == f"{prime_rl_lad_loss.__module__}.{prime_rl_lad_loss.__name__}"
    assert LADConfig(**loss["kwargs"]).eta == 0.25
