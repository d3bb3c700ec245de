"""A causal language model as the losses see it: backbone, head, packed sequences, and a sampler.

The head's matrix product never happens here except for the few rows that are sampled from: the backbone's hidden states
go to `lad_kernels` together with the head's weight and whatever the model does to its logits afterwards (bias, scale,
softcap). `check_head` compares the two on a few tokens before anything is trained.

Samples are packed, prompt and completion of each one after the other: N tokens in all, B samples, `cu_seqlens` as in
flash-attention. With flash-attention the backbone runs on the packed tokens; otherwise it runs right-padded, which a
causal model cannot notice, and its rows are packed afterwards.
"""

from __future__ import annotations

import importlib.util
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
from lad_kernels import LinearLogprobs, linear_logprobs

logging.disable_progress_bar()  # the terminal belongs to the trainer's own progress


@dataclass
class Policy:
    """A model, its tokenizer, and what its head does to the logits after the matrix product."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed_attention: bool  # flash-attention: the backbone takes packed tokens
    pretrained: bool

    def autocast(self) -> Any:
        """bf16 on CUDA, nothing on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def head(self) -> dict[str, Any]:
        """`lm_head_weight`, `bias`, `logit_scale` and `softcap` for the functions of `lad_kernels`."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        dtype = torch.bfloat16 if self.device.type == "cuda" else head.weight.dtype
        bias = getattr(head, "bias", None)
        return {
            "lm_head_weight": head.weight.to(dtype),  # [V, D]
            "bias": None if bias is None else bias.to(dtype),  # [V]
            "logit_scale": getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0),
            "softcap": getattr(config, "final_logit_softcapping", None),
        }


def logits(hidden: Tensor, head: dict[str, Any]) -> Tensor:
    """Logits of a few rows, for sampling: [B, D] -> [B, V] in fp32; `head` as `Policy.head` returns it."""
    weight = head["lm_head_weight"]
    z = nn.functional.linear(hidden.to(weight.dtype), weight, head["bias"]).float() * head["logit_scale"]
    return z if head["softcap"] is None else head["softcap"] * torch.tanh(z / head["softcap"])


def build_policy(
    path: str | None,
    device: str,
    *,
    pretrained: bool,
    temperature: float,
    seed: int = 0,
    hidden_size: int = 128,
    layers: int = 2,
) -> Policy:
    """Load `path`, or build the small decoder; refuse a head that the public arguments cannot express."""
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
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if pretrained:
        model.gradient_checkpointing_enable()
    policy = Policy(model.to(device), tokenizer, device, flash and path is not None, pretrained)
    check_head(policy, temperature)
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


@torch.no_grad()
def check_head(policy: Policy, temperature: float) -> None:
    """Compare `linear_logprobs` with the model's own logits on a few tokens; raise where they disagree."""
    ids = torch.arange(16, device=policy.device)[None] % len(policy.tokenizer)  # [1, 16]
    policy.model.eval()
    with policy.autocast():
        own = policy.model(ids).logits[0].float() / temperature  # [16, V]
        hidden = policy.model.base_model(ids).last_hidden_state[0]  # [16, D]
        head = policy.head()
        ours = linear_logprobs(
            hidden.to(head["lm_head_weight"].dtype), target_ids=ids[0], temperature=temperature, **head
        ).logprobs  # [16]
    expected = own.log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]  # [16]
    error = (ours - expected).abs().max().item()
    tolerance = 1e-3
    if policy.device.type == "cuda":  # the model's own logits are rounded to bf16: 2^-9 each, and lse adds as much
        tolerance = max(tolerance, 2.0**-7 * own.abs().max().item())
    if not error <= tolerance:
        name = type(policy.model).__name__
        raise ValueError(
            f"model {name}: log-probabilities from its hidden states and head differ by {error:.3g} from its logits, "
            f"expected at most {tolerance:g}; bias, logit_scale and softcap do not express what it does to them, "
            "so it cannot be trained here"
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


def hidden_states(policy: Policy, batch: Packed) -> Tensor:
    """The backbone's last hidden states in packed order: [N, D]."""
    backbone = policy.model.base_model
    if policy.packed_attention:
        hidden = backbone(batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
        return hidden.last_hidden_state[0]
    lengths = batch.cu_seqlens.diff()  # [B]
    valid = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [B, T]
    padded = torch.full(valid.shape, policy.tokenizer.pad_token_id, device=lengths.device)  # [B, T]
    padded[valid] = batch.input_ids
    return backbone(padded, use_cache=False).last_hidden_state[valid]  # causal: padding on the right is never seen


def logprobs_of(policy: Policy, batch: Packed, temperature: float, return_entropy: bool = False) -> LinearLogprobs:
    """`linear_logprobs` of a packed batch; [N] fields, 0 where masked."""
    with policy.autocast():
        head = policy.head()
        hidden = hidden_states(policy, batch).to(head["lm_head_weight"].dtype)  # [N, D]
        return linear_logprobs(
            hidden,
            target_ids=batch.target_ids,
            loss_mask=batch.loss_mask,
            temperature=temperature,
            return_entropy=return_entropy,
            **head,
        )


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
    arguments = dict(past_key_values=cache, use_cache=True)
    with policy.autocast():
        out = model.base_model(padded["input_ids"], attention_mask=mask, position_ids=position, **arguments)
        cache.batch_repeat_interleave(group_size)
        head = policy.head()
        hidden = out.last_hidden_state[:, -1].repeat_interleave(group_size, 0)  # [B, D]
        mask = mask.repeat_interleave(group_size, 0)  # [B, T]
        position = position[:, -1:].repeat_interleave(group_size, 0)  # [B, 1]
        done = torch.zeros(len(hidden), dtype=torch.bool, device=policy.device)
        tokens = []
        for _ in range(max_new_tokens):
            probabilities = torch.softmax(logits(hidden, head) / temperature, -1)  # [B, V]
            token = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]
            tokens.append(token.masked_fill(done[:, None], tokenizer.pad_token_id))
            done = done | (token[:, 0] == tokenizer.eos_token_id)
            if done.all():
                break
            mask = nn.functional.pad(mask, (0, 1), value=1)
            position = position + 1
            out = model.base_model(tokens[-1], attention_mask=mask, position_ids=position, **arguments)
            hidden = out.last_hidden_state[:, -1]
    rows = torch.cat(tokens, 1).tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]
