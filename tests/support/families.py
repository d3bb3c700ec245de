"""Tiny random models of the transformers families that `attach_fused_head` is tested on, and how they are compared.

Transforms of the logits have values that matter, and weights are large enough that logits differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lad_kernels import linear_logprobs

VOCABULARY, HIDDEN = 97, 32

# Set where a family's config has the name; a family's own value wins, and DROP leaves the config's default.
DROP = object()
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "attention_dropout": 0.0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": 4, "state_size": 8,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "mamba_d_state": 8,
}  # fmt: skip
LATENT = {"head_dim": DROP, "num_key_value_heads": 4}

CAUSAL: dict[str, dict[str, Any]] = {
    # softcap
    "gemma2": {"final_logit_softcapping": 3.0}, "gemma3_text": {"final_logit_softcapping": 4.0},
    "nanochat": {"final_logit_softcapping": 5.0}, "vaultgemma": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "num_hidden_layers": 3, "head_dim": DROP},
    "xlstm": {"output_logit_soft_cap": 3.0, "v_head_dim": DROP, "num_heads": 4, "num_blocks": 2, "embedding_dim": 32},
    # scale
    "cohere": {"logit_scale": 0.37}, "cohere2": {"logit_scale": 0.37}, "cohere2_moe": {"logit_scale": 0.37},
    "falcon_h1": {"lm_head_multiplier": 0.6, "mamba_d_ssm": 64}, "granite": {"logits_scaling": 1.7},
    "granite_swa": {"logits_scaling": 1.7}, "granitemoe": {"logits_scaling": 1.7},
    "granitemoehybrid": {"logits_scaling": 1.7, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"logits_scaling": 1.7}, "hyperclovax": {"logits_scaling": 0.6},
    "minicpm3": {"dim_model_base": 16, **LATENT}, "mpt": {"logit_scale": 0.5},
    # bias of the head
    "codegen": {"rotary_dim": 8}, "ctrl": {"n_positions": 64, "dff": 64}, "ernie4_5_moe": {"use_bias": True},
    "gptj": {"rotary_dim": 8}, "phi": {}, "phimoe": {"lm_head_bias": True}, "bert": {"is_decoder": True}, "xlm": {},
    # mixtures of experts
    "afmoe": {}, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "flex_olmo": {}, "glm4_moe": {}, "gpt_oss": {},
    "hunyuan_v1_moe": {}, "jetmoe": {}, "llama4_text": {}, "minimax": {}, "minimax_m2": {}, "mixtral": {}, "olmoe": {},
    "qwen2_moe": {}, "qwen3_moe": {},
    # state-space models and hybrids
    "bamba": {"attn_layer_indices": [1]}, "falcon_mamba": {}, "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {}, "mamba": {}, "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "olmo_hybrid": {},
    # the rest
    "apertus": {}, "arcee": {}, "biogpt": {}, "bitnet": {}, "bloom": {}, "cwm": {}, "diffllama": {}, "ernie4_5": {},
    "exaone4": {}, "falcon": {"head_dim": DROP}, "gemma": {}, "glm": {}, "glm4": {}, "gpt2": {}, "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "gpt_neox": {}, "helium": {}, "llama": {},
    "ministral3": {}, "mistral": {}, "nemotron": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "openai-gpt": {}, "opt": {},
    "persimmon": {}, "phi3": {}, "qwen2": {}, "qwen3": {}, "seed_oss": {}, "smollm3": {}, "stablelm": {},
    "starcoder2": {},
}  # fmt: skip

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT_EXPERTS = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
WIDE_TOWER = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": HIDDEN}
DEEP_TOWER = QWEN_TOWER | WIDE_TOWER | {"deepstack_visual_indexes": [0]}

VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT | {"final_logit_softcapping": 3.0}, "vision_config": TOWER, "mm_tokens_per_image": 4,
               "image_token_index": 90},
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER, "image_token_id": 90,
                 "scale_factor": 1},
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "image_token_index": 90, "vision_feature_layer": -1,
              "vision_config": TOWER | {"model_type": "clip_vision_model"}},
    "qwen2_vl": {"text_config": TEXT | ROPE, **TOKENS,
                 "vision_config": QWEN_TOWER | {"embed_dim": 16, "hidden_size": HIDDEN}},
    "qwen2_5_vl": {"text_config": TEXT | ROPE, **TOKENS, "vision_config": QWEN_TOWER | WIDE_TOWER},
    "qwen3_vl": {"text_config": TEXT | ROPE, **TOKENS, "vision_config": DEEP_TOWER},
    "qwen3_vl_moe": {"text_config": TEXT_EXPERTS | ROPE, **TOKENS, "vision_config": DEEP_TOWER},
}  # fmt: skip

FAMILIES = sorted([*CAUSAL, *VISION])


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in training mode; `changes` go to its config."""
    torch.manual_seed(0)
    if family in VISION:
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **VISION[family] | changes))
    else:
        default = AutoConfig.for_model(family)
        values = {k: v for k, v in COMMON.items() if hasattr(default, k)} | CAUSAL[family] | changes
        config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if v is not DROP})
        model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.3)
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=0.5)
    if head.bias is not None:
        nn.init.normal_(head.bias, std=0.5)
    return model


# Largest seen over all families: 1.0e-7 and 8.8e-7.
LOGPROB_TOLERANCE = 1e-6  # over 1 + max abs(log-prob)
GRADIENT_TOLERANCE = 1e-5  # over the largest gradient of the model

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))  # [B, T]
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
WEIGHTS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)) * MASK[:, 1:]  # [B, T - 1]


def fused(hidden, weight, **head):
    return linear_logprobs(hidden[:, :-1], weight, IDS[:, 1:], loss_mask=MASK[:, 1:], **head).logprobs  # [B, T - 1]


def fused_logprobs(model, **inputs):
    return model(input_ids=IDS, attention_mask=MASK, fused_head=fused, **inputs).result


def own_logprobs(model, **inputs):
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False, **inputs).logits[:, :-1]  # [B, T - 1, V]
    return logits.float().log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0] * MASK[:, 1:]


def gradients(model, logprobs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (logprobs * WEIGHTS).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, **inputs) -> tuple[float, float]:
    """Assert that log-probs and all gradients agree with the model's own logits; returns the errors."""
    torch.manual_seed(0)
    own = own_logprobs(model, **inputs)
    truth = gradients(model, own)
    torch.manual_seed(0)
    ours = fused_logprobs(model, **inputs)
    found = gradients(model, ours)
    assert truth.keys() == found.keys()
    error = ((ours - own).abs().max() / (1 + own.abs().max())).item()
    apart = torch.stack([(found[name] - g).abs().max() for name, g in truth.items()])  # Python's max passes NaN over
    worst = (apart.max() / torch.stack([g.abs().max() for g in truth.values()]).max()).item()
    assert error < LOGPROB_TOLERANCE and worst < GRADIENT_TOLERANCE, (error, worst)
    return error, worst
