"""The README: one page, its two snippets are the same loss, and its numbers and names are those of docs/."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from pages import README, ROOT, section, snippets_of

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: the README's snippets")

from transformers import LlamaConfig, LlamaForCausalLM

from lad_kernels.frameworks.transformers import attach_fused_head

LINES, WORDS = 150, 1100
NEAR = 5e-6  # relative error in float32; 5e-7 was measured


def tiny_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(device)


def batch(device: str) -> dict[str, torch.Tensor]:
    """What both snippets take: B = 8, T = 9; old log-probs so far from the policy's that some ratios are clipped."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(0, 64, (8, 10), generator=generator),  # [B, T + 1]
        "completion_mask": torch.arange(10).expand(8, 10) >= 4,  # [B, T + 1]
        "old_logprobs": -4.2 + 0.4 * torch.randn(8, 9, generator=generator),  # [B, T]
        "advantages": torch.randn(8, generator=generator),  # [B]
    }
    return {name: x.to(device) for name, x in inputs.items()}


def snippet_functions() -> list:
    """`grpo_step` of "You have" and of "Write"."""
    have, write = snippets_of("README.md", "python")
    return [have.run()["grpo_step"], write.run()["grpo_step"]]


def loss_and_gradients(step, model, inputs) -> list[torch.Tensor]:
    loss = step(model, **inputs)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def test_one_page():
    text = README.read_text()
    assert text.count("\n") <= LINES
    assert len(text.split()) <= WORDS


def test_what_you_have_and_what_you_write_are_the_same_loss(device):
    model, inputs = tiny_model(device), batch(device)
    have, write = snippet_functions()
    truth = loss_and_gradients(have, copy.deepcopy(model), inputs)
    attach_fused_head(model)
    for ours, expected in zip(loss_and_gradients(write, model, inputs), truth):
        assert (ours - expected).norm() <= NEAR * expected.norm()
    ids, old = inputs["input_ids"], inputs["old_logprobs"]
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, T]
    inside = ((logprobs - old).exp() - 1).abs() < 0.2
    assert 0.1 < inside.float().mean() < 0.9  # the clip decides about a part of the tokens


def test_what_you_write_is_right_under_fsdp2():
    """One rank, so that averaging over ranks does not matter; tests/loss/test_distributed.py has several."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, inputs = tiny_model("cpu"), batch("cpu")
    have, write = snippet_functions()
    truth = loss_and_gradients(have, copy.deepcopy(model), inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        attach_fused_head(model)
        fully_shard(model.lm_head)
        fully_shard(model)
        assert hasattr(model.lm_head.weight, "placements")
        for ours, expected in zip(loss_and_gradients(write, model, inputs), truth):
            assert (ours - expected).norm() <= NEAR * expected.norm()
    finally:
        dist.destroy_process_group()


def test_numbers_of_the_first_table_are_measured_ones():
    """Those of a cell with results, and those of the lines about the H100."""
    screen = README.read_text().split("\n## ", 1)[0]
    rows = re.findall(r"^\|.*\|$", screen, re.MULTILINE)[2:]
    measured = [cell for row in rows for cell in row.split("|")[2:]] + [screen.split("a step takes")[1]]
    numbers = [n.rstrip(",.") for text in measured for n in re.findall(r"\d[\d,.e-]*", text)]
    assert len(numbers) >= 24
    results = {n.rstrip(",.") for n in re.findall(r"\d[\d,.e-]*", (ROOT / "docs" / "results.md").read_text())}
    assert set(numbers) <= results
    assert "27.4" not in results


def test_losing_rows_are_those_of_the_page():
    """The bullets of "When it does not help" quote numbers that docs/when_it_helps.md has."""
    bullets = section("README.md", "## When it does not help")
    page = (ROOT / "docs" / "when_it_helps.md").read_text()
    for number in ("1.00", "1.14", "1.19", "34 %", "1.09", "1 to 3 %"):
        assert number in bullets, number
        assert number in page, number
