"""The README's first screen runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


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
    snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    exec(compile(snippet, "README.md", "exec"), given)
    assert given["out"].loss.isfinite()
    assert model.lm_head.weight.grad.count_nonzero()
    assert model.model.embed_tokens.weight.grad.count_nonzero()
