"""Every option of TRL's GRPOConfig is honoured by LADTrainer, by TRL's code or by ours, or refused by name."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; its options go unchecked")

import test_trl
import test_trl_loss
import test_trl_patched
from test_trl_loss import LAD
from trl_cases import ON_CPU, PROMPTS, build, load, options, save_model, trl

import lad_kernels
from lad_kernels.frameworks.trl import LADConfig
from lad_kernels.frameworks.trl_options import LOSS_TYPES, REFUSED, grpo_config

pytestmark = ON_CPU

# What our loss reads, and where it is shown to be read: a case of test_trl_loss.LAD that sets it, or a test.
OURS = {
    "beta": "reference",
    "use_bias_correction_kl": "reference",
    "entropy_coef": "entropy bonus, accumulation",
    "top_entropy_quantile": "high entropy",
    "importance_sampling_level": "sequence, iterations",
    "temperature": "kl, centered, temperature",
    "epsilon": "bounds of TRL",
    "epsilon_high": "bounds",
    "num_iterations": "clamps",
    "gradient_accumulation_steps": "token-mean, accumulation",
    "steps_per_generation": "steps per generation",
    "generation_batch_size": "steps per generation",
    "max_completion_length": "seq-mean-token-sum-norm",
    "gradient_checkpointing": "checkpointing",
    "router_aux_loss_coef": "test_mixture_of_experts_loss_keeps_trl_coefficient",
    "bf16": "test_gradient_under_bf16_autocast_is_no_worse_than_that_of_stored_logits",
    "cast_lm_head_to_fp32": "test_a_float32_head_on_a_16_bit_body",
    "use_liger_kernel": "test_ligers_layers",
    "liger_kernel_config": "test_ligers_layers",
}
# What TRL does before our loss, or after it, in code that is not replaced: rollouts, advantages, the reference, logs.
TRLS = """
model_init_kwargs trust_remote_code disable_dropout num_generations num_generations_eval ds3_gather_for_generation
shuffle_dataset pad_to_multiple_of top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
vllm_max_model_length vllm_tensor_parallel_size reward_weights multi_objective_aggregation scale_rewards
mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps max_tool_calling_iterations
vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min vllm_importance_sampling_cap log_completions log_multimodal num_completions_to_print
log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
use_transformers_paged
"""
# What transformers' Trainer does around the loss: the loop, the optimizer, wrapping, evaluation, logs, checkpoints.
TRAINERS = """
accelerator_config adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices
batch_eval_metrics bf16_full_eval data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
eval_on_start eval_steps eval_strategy eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names learning_rate
length_column_name load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step
logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir
parallelism_config per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub
remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
save_on_each_node save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_compile
torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
trackio_static_space_id train_sampling_strategy use_cache use_cpu warmup_steps weight_decay
"""
LISTS = {"ours": list(OURS), "TRL's": TRLS.split(), "Trainer's": TRAINERS.split(), "refused": list(REFUSED)}


def test_every_option_stands_in_exactly_one_list():
    """A new option of TRL fails here until somebody has decided what it means for LAD."""
    for field in fields(trl.GRPOConfig):
        found = [name for name, names in LISTS.items() for n in names if n == field.name]
        assert len(found) == 1, (field.name, found)
    if trl.__version__ == "1.16.0":
        known = {field.name for field in fields(trl.GRPOConfig)}
        assert [n for names in LISTS.values() for n in names if n not in known] == []


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours_is_tested(name):
    where = OURS[name]
    if where.startswith("test_"):
        assert any(hasattr(module, where) for module in (test_trl, test_trl_loss, test_trl_patched))
        return
    default = next(f.default for f in fields(trl.GRPOConfig) if f.name == name)
    if name == "max_completion_length":  # every run sets it; this average divides by it
        assert LAD[where]["loss_agg_mode"] == "seq-mean-token-sum-norm"
    elif name == "generation_batch_size":  # the other way to say it
        assert LAD[where]["steps_per_generation"] == 4
    else:
        assert LAD[where][name] != default or default is MISSING or name == "gradient_checkpointing"


OTHER = {"loss_type": "grpo", "use_adaptive_entropy": True}


@pytest.mark.parametrize("name", [n for n in REFUSED if n in {f.name for f in fields(trl.GRPOConfig)}])
def test_what_has_no_meaning_is_refused(name, tmp_path):
    default = next(f.default for f in fields(trl.GRPOConfig) if f.name == name)
    given = OTHER[name] if name in OTHER else 0.5 + (default or 0)
    with pytest.raises(ValueError, match=f"^{name}: expected ") as caught:
        LADConfig(**options(tmp_path, **{name: given}))
    assert repr(given) in str(caught.value) and repr(default) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, (None, None)),
        (dict(epsilon=0.3), (0.3, 0.3)),
        (dict(epsilon=0.1, epsilon_high=0.28), (0.1, 0.28)),
        (dict(epsilon_high=0.28), (0.2, 0.28)),
        (dict(epsilon_low=0.2), (0.2, None)),
        (dict(epsilon_low=0.2, epsilon_high=0.2), (0.2, 0.2)),
        (dict(epsilon_low=1.0, epsilon_high=0.28), (1.0, 0.28)),
        (dict(epsilon=0.3, epsilon_low=0.3), (0.3, 0.3)),
    ],
)
def test_which_bounds_are_in_effect(given, bounds, tmp_path):
    args = LADConfig(**options(tmp_path, **given))
    assert args.ratio_bounds() == bounds == (args.objective().epsilon_low, args.objective().epsilon_high)


TRANSLATED = {name: dict(loss_type=name) for name in LOSS_TYPES} | {
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "cispo, without effect of epsilon and delta": dict(loss_type="cispo", epsilon_high=5.0, epsilon=0.01, delta=9.0),
    "clip higher": dict(epsilon=0.1, epsilon_high=0.28),
    "delta": dict(epsilon=0.05, delta=1.06),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-3, epsilon_high=4e-3),
    "reference": dict(beta=0.3, use_bias_correction_kl=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", TRANSLATED)
def test_grpo_config_is_trls_loss(name, folder, tmp_path):
    """Loss and gradient of `grpo_loss` with the translated options are those of TRL's own loss, where ratios clip."""
    args = trl.GRPOConfig(**options(tmp_path, num_iterations=2, **TRANSLATED[name]))
    trainer = build(trl.GRPOTrainer, args, load(folder, torch.float64))
    trainer.current_gradient_accumulation_steps = 1
    rollout = trainer._generate_and_score_completions(list(PROMPTS.select([0] * 4)))
    g, shape = torch.Generator().manual_seed(0), rollout["completion_ids"].shape  # [B, T]
    for given in rollout.keys() & {"old_per_token_logps", "ref_per_token_logps"}:
        rollout[given] = rollout[given] + 0.15 * torch.randn(shape, generator=g)

    def gradient(loss):
        trainer.model.zero_grad()
        loss.backward()
        return trainer.model.lm_head.weight.grad.clone()

    theirs = trainer.compute_loss(trainer.model, rollout)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    logits = trainer.model(ids, attention_mask=attention).logits[:, -shape[1] - 1 : -1]  # [B, T, V]
    logprobs = logits.log_softmax(-1).gather(2, rollout["completion_ids"][..., None])[..., 0]  # [B, T]
    config = grpo_config(args)
    out = lad_kernels.grpo_loss(
        logprobs,
        rollout["old_per_token_logps"],
        rollout["advantages"],
        loss_mask=rollout["completion_mask"],
        config=config,
        ref_logprobs=rollout.get("ref_per_token_logps"),
    )
    assert "without effect" in name or name in ("sapo", "vespo") or out.metrics["clip_share"] > 0
    assert out.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = gradient(theirs)
    assert (gradient(out.loss) - expected).norm() < 1e-5 * expected.norm()
    assert config.advantage_scale == args.scale_rewards


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(loss_type="cispo"), "^epsilon_high: expected at least 1 with cispo"),
        (dict(delta=1.1), "^delta: expected at least 1 \\+ epsilon_high = 1.2, got 1.1"),
        (dict(beta=0.1), "^use_bias_correction_kl: expected False with beta"),
        (dict(off_policy_mask_threshold=0.5), "^off_policy_mask_threshold: "),
        (dict(top_entropy_quantile=0.5), "^top_entropy_quantile: "),
        (dict(entropy_coef=0.1), "^entropy_coef: "),
        (dict(use_adaptive_entropy=True), "^use_adaptive_entropy: "),
    ],
)
def test_grpo_config_refuses_what_has_no_counterpart(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        grpo_config(trl.GRPOConfig(**options(tmp_path, **given)))
