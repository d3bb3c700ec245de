"""lad_kernels/frameworks/trl.py and train_trl.py: TRL's own losses through our head, runs, resuming, bad use."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from trl_cases import (
    ON_CPU,
    PROMPTS,
    SIZES,
    TOKENIZER,
    FusedGRPOTrainer,
    FusedRLOOTrainer,
    assert_same_runs,
    build,
    history,
    load,
    options,
    save_model,
    trl,
)

import lad_kernels.frameworks.trl as adapter
from integration import train_trl
from lad_kernels.frameworks.distributed import require_sound_ranks
from lad_kernels.frameworks.trl import FusedHeadMixin, LADConfig, LADTrainer

pytestmark = ON_CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


STOCK = {
    "dapo": dict(loss_type="dapo"),
    "dapo, accumulation, steps per generation": dict(
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=3
    ),
    "grpo, reference": dict(loss_type="grpo", beta=0.1),
    "grpo, sequence, iterations": dict(
        loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, learning_rate=1e-5
    ),
    "bnpo, delta, iterations": dict(loss_type="bnpo", delta=1.5, num_iterations=2, learning_rate=1e-2),
    "dr_grpo, accumulation": dict(loss_type="dr_grpo", gradient_accumulation_steps=2),
    "cispo, iterations": dict(loss_type="cispo", epsilon_high=5.0, num_iterations=2),
    "sapo, high entropy": dict(loss_type="sapo", top_entropy_quantile=0.5, num_iterations=2),
    "vespo, iterations": dict(loss_type="vespo", num_iterations=2),
    "luspo, entropy bonus": dict(loss_type="luspo", importance_sampling_level="sequence", entropy_coef=0.1),
    "dapo, truncated, micro-batches without a token": dict(mask_truncated_completions=True, max_completion_length=25),
    "dapo, temperature, off-policy mask": dict(temperature=0.7, off_policy_mask_threshold=0.01, num_iterations=2),
}


def assert_off_policy_step_counts(rows):
    """Where every ratio is clipped, the gradient is zero and says nothing."""
    assert rows[1]["grad_norm"] > 1e-3 and abs(rows[1]["loss"]) > 1e-4


@pytest.mark.parametrize("name", STOCK)
def test_stock_trainer_logs_the_same_with_our_head(name, folder, tmp_path):
    config = trl.GRPOConfig(**options(tmp_path, **STOCK[name]))
    rows = assert_same_runs(FusedGRPOTrainer, trl.GRPOTrainer, config, folder)
    if config.num_iterations > 1:
        assert_off_policy_step_counts(rows)
    if "without a token" in name:
        assert None in {x for row in rows for x in row.values()}  # a mean over no token


class RoutedGRPOTrainer(FusedGRPOTrainer):
    head_options = {"tail_mass": 1e-12, "backward": "routed"}  # noqa: RUF012


class ExactRLOOTrainer(FusedRLOOTrainer):
    head_options = {"tail_mass": 0.0}  # noqa: RUF012


@pytest.mark.parametrize("name", STOCK)
def test_stock_losses_are_objectives_of_the_routed_head(name, folder, tmp_path):
    """All of TRL's loss types inside `linear_policy_loss`, with a tail mass that drops nothing."""
    assert_same_runs(RoutedGRPOTrainer, trl.GRPOTrainer, trl.GRPOConfig(**options(tmp_path, **STOCK[name])), folder)


def test_rloo_is_an_objective_too(folder, tmp_path):
    config = trl.RLOOConfig(**options(tmp_path, beta=0.1, num_iterations=2, learning_rate=1e-5))
    assert_same_runs(ExactRLOOTrainer, trl.RLOOTrainer, config, folder)


def test_rloo_logs_the_same_with_our_head(folder, tmp_path):
    config = trl.RLOOConfig(**options(tmp_path, beta=0.1, num_iterations=2, learning_rate=1e-5))
    rows = assert_same_runs(FusedRLOOTrainer, trl.RLOOTrainer, config, folder)
    assert_off_policy_step_counts(rows)


def test_mixture_of_experts_loss_keeps_trl_coefficient(tmp_path):
    from transformers import Qwen3MoeConfig

    experts = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    folder = save_model(tmp_path / "model", Qwen3MoeConfig(**SIZES, **experts))
    given = options(tmp_path, router_aux_loss_coef=0.2, gradient_accumulation_steps=2)
    config = trl.GRPOConfig(**given)
    theirs = assert_same_runs(FusedGRPOTrainer, trl.GRPOTrainer, config, folder)
    lad = history(build(LADTrainer, LADConfig(**given), load(folder)))
    with_more = history(build(LADTrainer, LADConfig(**given | {"router_aux_loss_coef": 0.7}), load(folder)))
    assert lad[0]["aux_loss"] == pytest.approx(theirs[0]["aux_loss"], rel=1e-5)
    assert with_more[0]["loss"] - lad[0]["loss"] == pytest.approx(0.5 * lad[0]["aux_loss"], rel=1e-4)
    assert with_more[0]["grad_norm"] != pytest.approx(lad[0]["grad_norm"], rel=1e-4)
    silent = load(folder)
    silent.router_aux_loss_coef = 0
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected a model whose own coefficient is not 0"):
        build(LADTrainer, LADConfig(**given), silent)
    with pytest.raises(ValueError, match="head_options: expected None with a mixture of experts' loss"):
        build(RoutedGRPOTrainer, config, load(folder))


def test_images_reach_the_model(folder, tmp_path):
    trainer = build(LADTrainer, LADConfig(**options(tmp_path)), load(folder))
    ids, seen = torch.ones(2, 3, dtype=torch.long), {}
    inputs = {n: ids for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    inputs |= {"advantages": torch.ones(2), "num_items_in_batch": torch.tensor(6), "num_images": [1, 1]}
    images = {name: torch.ones(2) for name in adapter.MULTIMODAL}

    def model(**given):
        seen.update(given)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer.compute_loss(model, inputs | images)
    assert seen.keys() - {"input_ids", "attention_mask", "use_cache", "fused_head"} == images.keys()
    assert all(seen[name] is images[name] for name in images)


@pytest.mark.parametrize("way", [{}, dict(entropy_coef=0.1), dict(beta=0.1)])
@pytest.mark.parametrize("kind", [LADTrainer, FusedGRPOTrainer])
def test_what_the_loss_is_given_follows_the_head(kind, way, folder, tmp_path, monkeypatch):
    """A model spread over devices; "meta" stands for the head's. What comes back goes to the rollout's device."""
    config = LADConfig if kind is LADTrainer else trl.GRPOConfig
    trainer = build(kind, config(**options(tmp_path, num_iterations=2, **way)), load(folder))
    trainer.current_gradient_accumulation_steps = 1
    rollout = trainer._generate_and_score_completions(list(PROMPTS.select([0] * 4)))
    rollout |= {"importance_sampling_ratio": torch.ones(4, 1), "tool_mask": torch.ones_like(rollout["completion_mask"])}
    names = {}

    def called(hidden, weight, ids, **given):
        names.update({n: x.device.type for n, x in given.items() if isinstance(x, torch.Tensor)}, ids=ids.device.type)
        result = torch.empty(ids.shape, device="meta") if "return_entropy" in given else None
        return adapter.LinearLogprobs(result, result, result)

    monkeypatch.setattr(adapter, "linear_logprobs", called)
    monkeypatch.setattr(adapter, "linear_lad_loss", called)

    def model(input_ids, fused_head, **_):
        hidden = torch.empty(*input_ids.shape, SIZES["hidden_size"], device="meta")
        found = fused_head(hidden, torch.empty(SIZES["vocab_size"], SIZES["hidden_size"], device="meta"), bias=None)
        return SimpleNamespace(result=found, aux_loss=None)

    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on its way back
        trainer.compute_loss(model, rollout)
    assert set(names.values()) == {"meta"}
    assert names.keys() >= ({"ids", "loss_mask"} if way or kind is FusedGRPOTrainer else {"ids", *OF_THE_ROLLOUT})


OF_THE_ROLLOUT = ("loss_mask", "old_logprobs", "advantages", "normalizer", "rollout_is_weights")


def even_digits(completions, **_) -> list[float]:
    return [float(text[:1] in tuple("02468")) for text in completions]


def test_a_run_raises_the_reward(folder, tmp_path):
    config = LADConfig(
        **options(
            tmp_path,
            max_steps=60,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=1,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
        )
    )
    trainer = LADTrainer(load(folder), even_digits, args=config, train_dataset=PROMPTS, processing_class=TOKENIZER)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-10:]) / 10
    assert last > 0.9  # 0.98 measured
    assert last - first > 0.4  # 0.63


def resumed(kind, config, folder, tmp_path):
    whole = history(
        build(kind, config(**options(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)), load(folder))
    )
    second = build(kind, config(**options(tmp_path, max_steps=6)), load(folder))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    return whole, second.state.log_history


def test_resuming_continues_as_trl_does(folder, tmp_path):
    for kind, config in ((trl.GRPOTrainer, trl.GRPOConfig), (LADTrainer, LADConfig)):
        whole, continued = resumed(kind, config, folder, tmp_path / kind.__name__)
        for step in (3, 4, 5):
            for name in ("loss", "grad_norm", "reward", "entropy"):
                assert continued[step][name] == whole[step][name], (kind, step, name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(loss_type="grpo"), ["loss_type", "'dapo'", "'grpo'", "loss_agg_mode"]),
        (dict(epsilon=0.3, epsilon_low=0.1), ["epsilon_low", "0.3", "0.1"]),
        (dict(epsilon_high=-0.28), ["epsilon_high", "-0.28", ">= 0"]),
        (dict(delta=2.0), ["delta", "2.0", "epsilon_high"]),
        (dict(off_policy_mask_threshold=0.1), ["off_policy_mask_threshold", "None", "0.1"]),
        (dict(use_adaptive_entropy=True), ["use_adaptive_entropy", "True", "entropy_coef"]),
        (dict(divergence="j5"), ["divergence", "'js'", "'j5'"]),
        (dict(eta=0.0), ["eta", "> 0", "0.0"]),
        (dict(importance_sampling_level="word"), ["importance_sampling_level", "'word'", "'sequence_sum'"]),
        (dict(loss_agg_mode="mean"), ["loss_agg_mode", "'token-mean'", "'mean'"]),
        (dict(target_norm="batch"), ["target_norm", "'group'", "'batch'"]),
        (dict(tail_mass=-1.0), ["tail_mass", ">= 0", "-1.0"]),
    ],
)
def test_config_refuses_by_name(given, words, tmp_path):
    with pytest.raises(ValueError, match=words[0]) as caught:
        LADConfig(**options(tmp_path, **given))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("kind", "config", "given", "error", "words"),
    [
        (LADTrainer, LADConfig, dict(bf16=True, cast_lm_head_to_fp32=True), ValueError, "cast_lm_head_to_fp32"),
        (
            LADTrainer,
            trl.GRPOConfig,
            {},
            TypeError,
            "args: expected lad_kernels.frameworks.trl.LADConfig, got GRPOConfig",
        ),
    ],
)
def test_trainer_refuses_by_name(kind, config, given, error, words, folder, tmp_path):
    with pytest.raises(error, match=words):
        build(kind, config(**options(tmp_path, **given)), load(folder))


def test_mixin_refuses_other_trainers(folder, tmp_path):
    class Fused(FusedHeadMixin, trl.SFTTrainer):
        pass

    with pytest.raises(TypeError, match=r"expected trl\.GRPOTrainer or trl\.RLOOTrainer"):
        Fused(load(folder))


def test_unsloth_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    with pytest.raises(RuntimeError, match="unsloth: expected not to be imported"):
        build(LADTrainer, LADConfig(**options(tmp_path)), load(folder))


def test_compute_loss_refuses_outputs_and_unwrapped_models(folder, tmp_path, monkeypatch):
    trainer = build(LADTrainer, LADConfig(**options(tmp_path)), load(folder))
    with pytest.raises(ValueError, match="return_outputs: expected False"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    with pytest.raises(RuntimeError, match="expected the wrapped model"):
        trainer.compute_loss(trainer.model, {})


def reloaded():
    """The adapter's source executed again, as under another installation."""
    spec = importlib.util.spec_from_file_location("adapter_again", adapter.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", [None, "1.13.0", "1.15.0", "1.17.0"])
def test_imports_without_a_supported_trl_and_says_so_on_use(version, monkeypatch):
    if version is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.delitem(sys.modules, "adapter_again", raising=False)
    monkeypatch.delitem(sys.modules, "lad_kernels.frameworks.trl_options")
    module = reloaded()
    for use in (module.LADConfig, lambda: module.LADTrainer(None), lambda: module.FusedHeadMixin(None)):
        with pytest.raises(ImportError, match=r"trl: expected 1\.14 to 1\.16 and not 1\.15\.0") as caught:
            use()
        assert (version or "cannot be imported") in str(caught.value)


def test_the_example_script_runs_from_flags_and_yaml(tmp_path):
    sizes = dict(max_steps=1, warm_steps=1, train_size=40, held_out_size=2, per_device_train_batch_size=8)
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in sizes.items()) + f"output_dir: {tmp_path}\ndivergence: hd\n")
    trainer = train_trl.main(["--config", str(file), "--eta", "0.5", "--use_cpu", "--per_device_eval_batch_size", "8"])
    assert (trainer.objective.divergence, trainer.objective.eta) == ("hd", 0.5)
    assert any("eval_reward" in row for row in trainer.state.log_history)
    assert (tmp_path / "model.safetensors").exists()


def test_ranks_that_do_not_train_together_are_refused(folder, tmp_path, monkeypatch):
    """torchrun on CPUs without use_cpu starts trainings that know nothing of each other."""
    args = LADConfig(**options(tmp_path))
    assert args.world_size == 1  # from here on accelerate knows that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE: expected 2 processes that train together"):
        build(LADTrainer, args, load(folder))


def test_a_reference_that_fsdp2_would_not_load_is_refused():
    """TRL 1.16 with beta > 0: the second model stays uninitialised on all ranks but the first."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(num_processes=2, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(RuntimeError, match="cpu_ram_efficient_loading: expected False with a reference model"):
        require_sound_ranks(accelerator, reference_model=True)
    require_sound_ranks(accelerator, reference_model=False)
    plugin.cpu_ram_efficient_loading = False
    require_sound_ranks(accelerator, reference_model=True)


def test_the_example_refuses_an_evaluation_that_would_fail_at_the_end(tmp_path):
    flags = ["--per_device_eval_batch_size", "20", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(ValueError, match="per_device_eval_batch_size: expected a multiple of 8 "):
        train_trl.main(flags)
    assert not any(tmp_path.iterdir())
