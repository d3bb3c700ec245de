"""The TRL trainers on two ranks, where TRL and accelerate wrap the model: DDP, FSDP2, ZeRO-3, PEFT inside them.

Gradients, losses and logs are compared with one process that reads the model's stored logits, in float64.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; the trainers go untested under DDP, FSDP2 and ZeRO-3")

from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from test_distributed import needs
from test_trl_loss import Recorder, TamperedTrainer, assert_equals_truth, assert_scored_alike, joined, truth
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config
from trl import GRPOConfig
from trl_cases import ON_CPU, SIZES, FusedGRPOTrainer, build, history, load, options, save_model

from lad_kernels.frameworks.trl import LADConfig

pytestmark = ON_CPU

LAYERS, NO_LAYERS = dict(auto_wrap_policy="TRANSFORMER_BASED_WRAP"), dict(auto_wrap_policy="NO_WRAP")
FSDP2 = {
    "layers, micro-batches without tokens": (
        "untied",
        LAYERS,
        dict(extras=("tools",), gradient_accumulation_steps=4, per_device_train_batch_size=1),
    ),
    "layers, tied, loaded by rank 0": (
        "tied",
        LAYERS | dict(cpu_ram_efficient_loading=True),
        dict(num_iterations=2, target_norm="group"),
    ),
    "one group, tied, reference": (
        "tied",
        NO_LAYERS,
        dict(beta=0.1, gradient_accumulation_steps=2, gradient_checkpointing=True),
    ),
}
LORA = dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
FLOAT32 = 2e-5  # relative error of a gradient in float32, in which ZeRO-3 computes; measured: 2e-6
PLAIN = dict(learning_rate=1e-2, max_grad_norm=0.0, lr_scheduler_type="constant")


class FullRecorder(Recorder):
    """Gradients and weights as whole tensors under their own names."""

    def record(self, grads, weights, micro_batches):
        """`micro_batches` counts those that were seen since the run began, this one included."""
        args, rollout = self.trainer.args, self.trainer._buffered_inputs
        window = args.gradient_accumulation_steps
        first = (micro_batches - window) % args.steps_per_generation
        self.steps.append((grads, weights, rollout[first : first + window], rollout))

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        grads = {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        weights = {n: full(p.detach()).clone() for n, p in model.named_parameters(remove_duplicate=False)}
        self.record(grads, weights, self.trainer._step)


class ZeroRecorder(FullRecorder):
    """The same for ZeRO-3, whose engine steps before Trainer calls back."""

    def on_train_begin(self, *_, **__):
        import deepspeed
        from deepspeed.utils import safe_get_full_grad

        engine = self.trainer.model_wrapped
        step = engine.step

        def recorded_step(*args, **kwargs):
            named = dict(engine.module.named_parameters(remove_duplicate=False))
            grads = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
            with deepspeed.zero.GatheredParameters(list(named.values())):
                weights = {n: p.detach().clone() for n, p in named.items()}
            self.record(grads, weights, self.trainer._step + 1)
            return step(*args, **kwargs)

        engine.step = recorded_step

    def on_pre_optimizer_step(self, *_, **__):
        pass


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(kind, config, model, recorder, extras=(), peft_config=None):
    trainer = build(kind, config, model, callbacks=[recorder], peft_config=peft_config)
    recorder.trainer, trainer.extras = trainer, extras
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert len(recorder.steps) == config.max_steps
    return trainer, recorder.steps


def run_fsdp2(kind, config_kind, model, out, wrapping, extras=(), peft_config=None, **given):
    config = config_kind(**options(out, fsdp=True, fsdp_config=dict(wrapping), **PLAIN | given))
    # accelerate drops its FSDP plugin where there is no accelerator; from here on it takes its way on GPUs.
    assert config.distributed_state.distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer, steps = run(kind, config, model, FullRecorder(), extras, peft_config)
    assert isinstance(trainer.model_wrapped, FSDPModule)
    return trainer, steps


def lad(folder, out):
    models = [load(f"{folder}/{tied}", torch.float64) for tied, *_ in FSDP2.values()]  # on all ranks: no config yet
    for (tied, wrapping, given), model in zip(FSDP2.values(), models):
        trainer, steps = run_fsdp2(TamperedTrainer, LADConfig, model, out, wrapping, **given)
        units = [n for n, m in trainer.model.named_modules() if isinstance(m, FSDPModule)]
        assert ("model.layers.0" in units) == (wrapping is not NO_LAYERS)
        assert "lm_head" in units
        assert_equals_truth(trainer, steps, load(f"{folder}/{tied}", torch.float64))


def assert_gradients(steps, model, loss_of, allowed=1e-9):
    """Every trainable parameter's gradient equals that of `loss_of(model, both ranks' batches, untrained)`."""
    for step, (grads, weights, batches, _) in enumerate(steps):
        model.load_state_dict(weights)
        model.zero_grad()
        loss_of(model, gather_object(batches), step == 0).backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == grads.keys()
        for n, x in trained.items():
            assert (grads[n] - x).norm() <= allowed * x.norm(), n
            assert x.count_nonzero(), n


def lad_loss(trainer, model, batches, untrained):
    return truth(trainer, model, batches, untrained=untrained)[0]


def grpo_loss(model, batches, untrained):
    """TRL's default loss where every ratio is 1: its gradient is that of the mean over tokens of -A log p."""
    batch = joined(batches)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # [B, L]
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    log_p = model(ids, attention_mask=attention).logits[:, -length - 1 : -1].log_softmax(-1)  # [B, T, V]
    log_p = log_p.gather(2, batch["completion_ids"][..., None])[..., 0]  # [B, T]
    if untrained:
        assert_scored_alike(batch, log_p)
    mask = batch["completion_mask"]
    return -(batch["advantages"][:, None] * log_p * mask).sum() / mask.sum()


def saved_head(folder, out):
    """accelerate finds no final norm inside PEFT and shards the head, a trained copy, in a unit of its own."""
    import peft

    for kind, config_kind in ((TamperedTrainer, LADConfig), (FusedGRPOTrainer, GRPOConfig)):
        config = peft.LoraConfig(**LORA)
        model = load(f"{folder}/untied", torch.float64)
        same = peft.get_peft_model(copy.deepcopy(model), config)
        trainer, steps = run_fsdp2(
            kind, config_kind, model, out, LAYERS, peft_config=config, gradient_accumulation_steps=2
        )
        head = trainer.model.get_base_model().lm_head
        assert isinstance(head, FSDPModule)
        loss = grpo_loss if kind is FusedGRPOTrainer else lambda *a, t=trainer: lad_loss(t, *a)
        assert_gradients(steps, same, loss)


def ddp(folder, out):
    """TRL's own loss with our head; LADTrainer under DDP is in test_trl_loss.py."""
    config = GRPOConfig(**options(out, **PLAIN, gradient_accumulation_steps=2))
    trainer, steps = run(FusedGRPOTrainer, config, load(f"{folder}/untied", torch.float64), Recorder())
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert_gradients(steps, load(f"{folder}/untied", torch.float64), grpo_loss)
    logs = []
    for head_options in (None, {"tail_mass": 0.0}):
        kind = type("Own", (LastRankWithoutTokens, FusedGRPOTrainer), {"head_options": head_options})
        logs.append(history(build(kind, config, load(f"{folder}/untied", torch.float64))))
    for plain, own in zip(*logs, strict=True):
        assert own == pytest.approx(plain, rel=1e-5)


class LastRankWithoutTokens:
    """As where TRL masks truncated completions: the others' gathers wait for this rank."""

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        if self.accelerator.is_last_process:
            rollout["completion_mask"] = torch.zeros_like(rollout["completion_mask"])
        return rollout


def zero3(folder, out):
    import peft

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    automatic = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    zero = {"zero_optimization": stage, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, **automatic}
    reference = dict(gradient_accumulation_steps=2, beta=0.1, num_iterations=2, gradient_checkpointing=True)
    empty = dict(gradient_accumulation_steps=4, per_device_train_batch_size=1)
    cases = [
        ("untied", TamperedTrainer, LADConfig, (), reference, None),
        ("tied", TamperedTrainer, LADConfig, ("tools",), empty, None),
        ("untied", FusedGRPOTrainer, GRPOConfig, (), {}, peft.LoraConfig(**LORA)),
    ]
    truths = [load(f"{folder}/{name}", torch.float64) for name, *_ in cases]  # whole, as no config exists yet
    truths[2] = peft.get_peft_model(truths[2], cases[2][-1])
    for (name, kind, config_kind, extras, given, lora), same in zip(cases, truths):
        config = config_kind(**options(out, deepspeed=zero, **PLAIN | given))
        trainer, steps = run(kind, config, load(f"{folder}/{name}"), ZeroRecorder(), extras, lora)
        assert trainer.model_wrapped.zero_optimization_stage() == 3
        loss = grpo_loss if kind is FusedGRPOTrainer else lambda *a, t=trainer: lad_loss(t, *a)
        assert_gradients(steps, same, loss, FLOAT32)


CASES = {f.__name__: f for f in (lad, saved_head, ddp, zero3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread) -> str:
    root = tmp_path_factory.mktemp("models")
    for name in ("untied", "tied"):
        save_model(root / name, Qwen3Config(**SIZES, tie_word_embeddings=name == "tied"))
    return str(root)


ACCELERATE = ["accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]


def launch(arguments: list[str], *given: str) -> None:
    command = [sys.executable, "-m", *arguments, __file__, *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]


@needs("peft", "the trainers go unchecked under FSDP2, with and without PEFT")
def test_fsdp2(folder, tmp_path):
    launch([*ACCELERATE, "--use_fsdp", "--fsdp_version=2"], folder, str(tmp_path), "lad", "saved_head")


def test_ddp(folder, tmp_path):
    launch(["torch.distributed.run", "--standalone", "--nproc-per-node=2"], folder, str(tmp_path), "ddp")


@needs("deepspeed", "the trainers go unchecked under ZeRO-3; see test_distributed.py for what its installation takes")
def test_zero3(folder, tmp_path):
    launch([*ACCELERATE, "--use_deepspeed", "--zero_stage=3"], folder, str(tmp_path), "zero3")


if __name__ == "__main__":
    for case in sys.argv[3:]:
        CASES[case](*sys.argv[1:3])
