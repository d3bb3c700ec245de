"""A causal language model for training: backbone, head, packed sequences, and a sampler.

The head's product is computed here only for the few rows that are sampled from: otherwise a function of the caller
replaces it inside the model's own forward (`lad_kernels.frameworks.transformers`).

Completions come from transformers' `generate` under `sampling_config`. For training, N tokens of B samples are packed,
`cu_seqlens` as in flash-attention. With flash-attention the model runs on the packed tokens; otherwise it runs
right-padded, which does not change a causal model's outputs, and the rows are packed before the head.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import logging

from integration.tasks import build_tokenizer
from lad_kernels import LinearLogprobs, linear_logprobs
from lad_kernels.frameworks.transformers import attach_fused_head

logging.disable_progress_bar()  # the trainer shows its own progress

# Options of a generation configuration that change the distribution of the same logits, and their neutral values.
SET_ASIDE = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
}
# Options that depend on position, force or forbid tokens, or need more than one pass, and their neutral values.
REFUSED = {
    "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {},
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "watermarking_config": None, "num_beams": 1,
    "stop_strings": [], "max_time": None, "prompt_lookup_num_tokens": None, "token_healing": False,
}  # fmt: skip


@dataclass
class Policy:
    """A model with `attach_fused_head`, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed_attention: bool  # flash-attention: the model takes packed tokens
    pretrained: bool
    sampling: GenerationConfig  # see `sampling_config`

    @property
    def set_aside(self) -> str:
        """Options of the model's generation configuration that sampling ignores: `name=value, ...`, or empty."""
        own = {name: getattr(self.model.generation_config, name, None) for name in SET_ASIDE}
        return ", ".join(f"{k}={v}" for k, v in own.items() if v not in (None, SET_ASIDE[k]))

    def autocast(self) -> Any:
        """bf16 on CUDA, and on a CPU that is fast in it for a pretrained model; else nothing."""
        if self.device.type == "cuda" or (self.pretrained and fast_bf16()):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices by AMX; by AVX-512's bf16 instructions alone float32 is faster."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def build_policy(
    path: str | None, device: str, *, pretrained: bool, seed: int = 0, hidden_size: int = 128, layers: int = 2
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

        apply = getattr(liger, "_apply_liger_kernel_to_instance", lambda *_, **__: None)  # private: it may be removed
        apply(model, cross_entropy=False, fused_linear_cross_entropy=False)
    sampling = sampling_config(model.generation_config, tokenizer)
    if set(model.generation_config.to_diff_dict()) & set(SET_ASIDE):
        model.generation_config.do_sample = True  # transformers loads them without it and then refuses to save
    if pretrained:
        model.gradient_checkpointing_enable()
    policy = Policy(model.to(device), tokenizer, device, flash and path is not None, pretrained, sampling)
    attach_fused_head(policy.model)
    logprobs_of(policy, pack([[0]], [list(range(1, 16))], device), 1.0)  # compares with the model's own head
    return policy


def sampling_config(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's generation configuration, changed to sample exactly the distribution that is trained.

    End-of-sequence ids are its own and the tokenizer's. Padding is recognised by the attention mask and the
    length of a completion, never by its id, so that any id will do and the tokenizer is not changed.

    Raises:
        ValueError: an option that scoring a completion cannot reproduce; see `REFUSED`.
    """
    for name, neutral in REFUSED.items():
        value = getattr(own, name, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"generation_config.{name}: expected it unset, got {value!r}; completions would not follow the "
                f"distribution that is trained: remove it from the model's generation_config.json"
            )
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ends) if i is not None))
    pad = next(i for i in (tokenizer.pad_token_id, own.pad_token_id, *ends, 0) if i is not None)
    config = copy.deepcopy(own)
    config.update(
        **SET_ASIDE, eos_token_id=ends, pad_token_id=pad, do_sample=True, disable_compile=True, max_length=None
    )
    return config


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
    mask = [len(prompt) - 1 <= i < length - 1 for prompt, length in zip(prompts, lengths) for i in range(length)]
    return Packed(
        torch.tensor([token for sample in samples for token in sample], device=device),
        torch.tensor([i for length in lengths for i in range(length)], device=device),
        torch.tensor([token for sample in samples for token in (*sample[1:], 0)], device=device),
        torch.tensor(mask, device=device),
        nn.functional.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int(),
    )


def through_head(policy: Policy, batch: Packed, function: Callable[..., Any]) -> Any:
    """The result of `function(hidden [N, D], lm_head_weight [V, D], **head)`, called instead of the head."""
    inputs: dict[str, Tensor] = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}  # [1, N]
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool)  # [1, N]
    if not policy.packed_attention:
        lengths = batch.cu_seqlens.diff()  # [B]
        valid = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [B, T]
        padded = torch.full(valid.shape, policy.sampling.pad_token_id, device=lengths.device)  # [B, T]
        padded[valid] = batch.input_ids
        inputs = {"input_ids": padded}  # causal: no token attends to padding on its right

    def packed(hidden: Tensor, weight: Tensor, **head: Any) -> Any:  # [B, T, D], [V, D]
        return function(hidden[valid], weight, **head)

    with policy.autocast():
        return policy.model(**inputs, fused_head=packed).result


@torch.no_grad()
def logprobs_of(policy: Policy, batch: Packed, temperature: float, return_entropy: bool = False) -> LinearLogprobs:
    """`linear_logprobs` of a packed batch, without gradients; [N] fields, 0 where masked."""
    options = {"loss_mask": batch.loss_mask, "temperature": temperature, "return_entropy": return_entropy}
    return through_head(policy, batch, partial(linear_logprobs, target_ids=batch.target_ids, **options))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Make `generator` its device's default one, the only one that `generate` uses."""
    if generator.device.type == "cpu":
        module, where = torch, ()
    else:
        module, where = torch.get_device_module(generator.device), (generator.device,)
    before = module.get_rng_state(*where)
    module.set_rng_state(generator.get_state(), *where)
    try:
        yield
    finally:
        generator.set_state(module.get_rng_state(*where))
        module.set_rng_state(before, *where)


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
    """`group_size` completions per prompt by `generate`, each up to and including its first end-of-sequence id."""
    width, pad = max(map(len, prompts)), policy.sampling.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])  # [P, T], padded on the left
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [P, T]
    model = policy.model.eval()
    own = mock.patch.object(model, "generation_config", policy.sampling)  # from it `generate` fills in unset options
    with policy.autocast(), drawing_from(generator), own:
        out = model.generate(
            ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            max_new_tokens=max_new_tokens,
            num_return_sequences=group_size,
            temperature=float(temperature),
        )  # [B, T + new]
    return [up_to_end(row, policy.sampling.eos_token_id) for row in out[:, width:].tolist()]


def up_to_end(tokens: list[int], end_ids: list[int]) -> list[int]:
    """Tokens up to and including the first that is in `end_ids`."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in end_ids), tokens)
