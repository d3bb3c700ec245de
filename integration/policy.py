"""A causal language model as the losses see it: backbone, head, packed sequences, and a sampler.

The head's matrix product never happens here except for the few rows that are sampled from: a function of the caller
takes its place inside the model's own forward (`integration.transformers`).

Samples are packed, prompt and completion of each one after the other: N tokens in all, B samples, `cu_seqlens` as in
flash-attention. With flash-attention the model runs on the packed tokens; otherwise it runs right-padded, which a
causal model cannot notice, and the rows are packed before the head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import logging

from integration.tasks import build_tokenizer
from integration.transformers import attach_fused_head
from lad_kernels import LinearLogprobs, linear_logprobs

logging.disable_progress_bar()  # the terminal belongs to the trainer's own progress


@dataclass
class Policy:
    """A model with `attach_fused_head`, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed_attention: bool  # flash-attention: the model takes packed tokens
    pretrained: bool

    def autocast(self) -> Any:
        """bf16 on CUDA, nothing on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def build_policy(
    path: str | None,
    device: str,
    *,
    pretrained: bool,
    seed: int = 0,
    hidden_size: int = 128,
    layers: int = 2,
) -> Policy:
    """Load `path`, or build the small decoder; a head that cannot be fused raises here, before anything is trained."""
    device = torch.device(device)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if path is None:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = AutoModelForCausalLM.from_config(small_decoder(tokenizer, hidden_size, layers))
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        attention = "flash_attention_2" if flash else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel import transformers as liger

        apply = getattr(liger, "_apply_liger_kernel_to_instance", lambda *_, **__: None)  # private: it may go
        apply(model, cross_entropy=False, fused_linear_cross_entropy=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if pretrained:
        model.gradient_checkpointing_enable()
    policy = Policy(model.to(device), tokenizer, device, flash and path is not None, pretrained)
    attach_fused_head(policy.model)
    with torch.no_grad():  # the first call compares with the model's own head
        logprobs_of(policy, pack([[0]], [list(range(1, 16))], device), 1.0)
    return policy


def small_decoder(tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int) -> Qwen3Config:
    """About half a million parameters at the default size."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Packed(NamedTuple):
    """Samples one after the other, prompt then completion."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N], starts at 0 in every sample
    target_ids: Tensor  # [N], the next token of the same sample; arbitrary where the mask is False
    loss_mask: Tensor  # [N] bool, rows that predict a completion token
    cu_seqlens: Tensor  # [B + 1] int32


def pack(prompts: list[list[int]], completions: list[list[int]], device: torch.device) -> Packed:
    """Concatenate samples; row i of a sample predicts its token i + 1."""
    samples = [prompt + completion for prompt, completion in zip(prompts, completions)]
    lengths = [len(sample) for sample in samples]
    target = [token for sample in samples for token in (*sample[1:], 0)]
    mask = [
        len(prompt) - 1 <= i < len(prompt) + len(completion) - 1
        for prompt, completion in zip(prompts, completions)
        for i in range(len(prompt) + len(completion))
    ]
    return Packed(
        torch.tensor([token for sample in samples for token in sample], device=device),
        torch.tensor([i for length in lengths for i in range(length)], device=device),
        torch.tensor(target, device=device),
        torch.tensor(mask, device=device),
        nn.functional.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int(),
    )


def through_head(policy: Policy, batch: Packed, function: Callable[..., Any]) -> Any:
    """What `function(hidden [N, D], lm_head_weight [V, D], **head)` returns, called in the head's place."""
    inputs: dict[str, Tensor] = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}  # [1, N]
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool)  # [1, N]
    if not policy.packed_attention:
        lengths = batch.cu_seqlens.diff()  # [B]
        valid = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [B, T]
        padded = torch.full(valid.shape, policy.tokenizer.pad_token_id, device=lengths.device)  # [B, T]
        padded[valid] = batch.input_ids
        inputs = {"input_ids": padded}  # causal: padding on the right is never seen

    def packed(hidden: Tensor, weight: Tensor, **head: Any) -> Any:  # [B, T, D], [V, D]
        return function(hidden[valid], weight, **head)

    with policy.autocast():
        return policy.model(**inputs, fused_head=packed).result


def logprobs_of(policy: Policy, batch: Packed, temperature: float, return_entropy: bool = False) -> LinearLogprobs:
    """`linear_logprobs` of a packed batch; [N] fields, 0 where masked."""
    options = {"loss_mask": batch.loss_mask, "temperature": temperature, "return_entropy": return_entropy}

    def score(hidden: Tensor, weight: Tensor, **head: Any) -> LinearLogprobs:  # [N, D], [V, D]
        return linear_logprobs(hidden, weight, batch.target_ids, **options, **head)

    return through_head(policy, batch, score)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """`group_size` completions per prompt by plain sampling; the prompt is processed once per group."""
    model, tokenizer = policy.model.eval(), policy.tokenizer
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(policy.device)  # left-padded
    mask = padded["attention_mask"]  # [P, T]
    position = (mask.cumsum(-1) - 1).clamp_min(0)  # [P, T]
    cache = DynamicCache(config=model.config)
    arguments = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    with policy.autocast():
        out = model(padded["input_ids"], attention_mask=mask, position_ids=position, **arguments)
        cache.batch_repeat_interleave(group_size)
        logits = out.logits[:, -1].repeat_interleave(group_size, 0)  # [B, V]
        mask = mask.repeat_interleave(group_size, 0)  # [B, T]
        position = position[:, -1:].repeat_interleave(group_size, 0)  # [B, 1]
        done = torch.zeros(len(logits), dtype=torch.bool, device=policy.device)
        tokens = []
        for _ in range(max_new_tokens):
            probabilities = torch.softmax(logits.float() / temperature, -1)  # [B, V]
            token = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]
            tokens.append(token.masked_fill(done[:, None], tokenizer.pad_token_id))
            done = done | (token[:, 0] == tokenizer.eos_token_id)
            if done.all():
                break
            mask = nn.functional.pad(mask, (0, 1), value=1)
            position = position + 1
            logits = model(tokens[-1], attention_mask=mask, position_ids=position, **arguments).logits[:, -1]
    rows = torch.cat(tokens, 1).tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]
