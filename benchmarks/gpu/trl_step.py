"""One micro-batch of GRPO in TRL, with TRL's head and with ours: time, memory, largest micro-batch, log-prob error.

Synthetic rollouts without padding go through `training_step` (loss and gradient; no generation, no optimizer) of
`trl.GRPOTrainer`, the same behind `FusedHeadMixin`, and `LADTrainer`, around one model of Qwen2.5-0.5B's shape with
random float32 weights, under TRL's defaults: bf16 autocast, checkpointing, ratio 1. "peaked" scales the final norm to a
mean entropy of 0.4 nats; with random targets, the rounding of its large logits counts for more than in a real policy.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.run import Run
from benchmarks.harness.data import ENTROPY
from benchmarks.harness.measure import describe, quartiles
from benchmarks.harness.providers import PROMISE
from lad_kernels import grpo_loss, lad_loss
from lad_kernels.frameworks import trl as adapter
from lad_kernels.frameworks import trl_options
from lad_kernels.testing import relative_error

STOCK, FUSED, LAD = "TRL", "TRL, our head", "LADTrainer"
SIZES = {  # Qwen2Config, tokens of a sequence and of a micro-batch; "tiny" is for dry runs
    "0.5B": (dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                  num_attention_heads=14, num_key_value_heads=2), 1024, (2048, 8192, 32_768)),
    "tiny": (dict(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2), 32, (64, 128)),
}  # fmt: skip
DRIFT = 0.05  # abs(logprobs - old_logprobs) in the gate: a rounded log-prob seldom leaves the clip range
# float32 keeps a log-prob near -100 to 8e-6; measured on a CPU: 1.4e-6 on peaked, 4e-7 on flat data. The matrix units
# of an H100 cut off what they add: 8.4e-5 and 1.6e-7, where the rounded logits of stock TRL give 3.5e-2 and 3.4e-4.
LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-4}


def trl_steps(run: Run) -> None:
    """Gate, steps, largest micro-batch; LAD_KERNELS_TRL_SIZE chooses from SIZES."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    if trl_options.unusable:
        run.missing({"TRL steps": f"no supported TRL, but {trl_options.unusable}"})
        return
    torch.manual_seed(0)
    size = os.environ.get("LAD_KERNELS_TRL_SIZE", "tiny" if run.dry_run else "0.5B")
    shape, length, micro_batches = SIZES[size]
    trainers = make_trainers(run, shape)
    for data, entropy in ENTROPY.items():
        if entropy is not None:
            sharpen(trainers[STOCK], rollouts(trainers, 1, min(length, 256))["completion_ids"], entropy)
        inside = {n: passes(run, data, n, t, rollouts(trainers, 2, min(length, 160))) for n, t in trainers.items()}
        if not (inside[FUSED] and inside[LAD]):
            raise SystemExit(f"outside the tolerance on {data} data, see the table TRL gate; it is not timed")
        for tokens in micro_batches:
            steps(run, data, trainers, rollouts(trainers, tokens // length, length))
    if run.device == "cuda":
        largest(run, trainers, micro_batches[-1], length)


def make_trainers(run: Run, shape: dict[str, int]) -> dict[str, Any]:
    """The three trainers around one model: weights, gradients and hidden states are the same."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    options = dict(output_dir=str(run.path.parent / "trl"), use_cpu=run.device == "cpu", bf16=True, report_to="none")
    injected = {"_prepare_inputs": lambda self, batch: batch}  # where TRL would generate
    kinds = {
        STOCK: (trl_options.GRPOConfig, trl_options.GRPOTrainer),
        FUSED: (trl_options.GRPOConfig, adapter.FusedHeadMixin, trl_options.GRPOTrainer),
        LAD: (adapter.LADConfig, adapter.LADTrainer),
    }
    for name, (config, *bases) in kinds.items():
        kinds[name] = type("InjectedTrainer", tuple(bases), injected)(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args=config(**options),
            train_dataset=Dataset.from_list([{"prompt": "<eos>"}]),
            processing_class=tokenizer,
        )
        kinds[name].current_gradient_accumulation_steps = kinds[name].args.steps_per_generation = 1
    return kinds


def rollouts(trainers: dict[str, Any], sequences: int, length: int) -> dict[str, Tensor]:
    """What `compute_loss` of TRL takes: tokens [B, P] and [B, T], an eighth of them prompt."""
    model, gen = trainers[STOCK].model, torch.Generator().manual_seed(sequences)
    ids = torch.randint(2, model.config.vocab_size, (sequences, length), generator=gen).to(model.device)  # [B, L]
    prompts, completions = ids[:, : length // 8], ids[:, length // 8 :]
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": (mask := torch.ones_like(completions)),
        "num_items_in_batch": mask.sum(),
        "advantages": torch.randn(sequences, generator=gen).to(model.device),  # [B]
    }


def sharpen(trainer: Any, ids: Tensor, entropy: float) -> None:
    """Scale the final norm until the mean entropy after ids [1, K] is `entropy` nats."""
    backbone, weight = trainer.model.model, trainer.model.lm_head.weight.detach()  # [V, D]
    low, high = 0.0, 1e3
    with torch.no_grad():
        logits = backbone(input_ids=ids).last_hidden_state[0] @ weight.T  # [K, V]
        for _ in range(30):
            middle = (low + high) / 2
            mean = torch.distributions.Categorical(logits=middle * logits).entropy().mean().item()
            low, high = (middle, high) if mean > entropy else (low, middle)
        backbone.norm.weight.mul_(high)


def logprobs_of(trainer: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """[B, T] from stored logits, in the dtype of hidden [B, L, D]; ids are [B, T]."""
    weight = trainer.model.lm_head.weight.detach().bfloat16().to(hidden.dtype)  # [V, D], rounded as by autocast
    logits = hidden[:, -ids.shape[1] - 1 : -1] @ weight.T  # [B, T, V]
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def passes(run: Run, data: str, name: str, trainer: Any, batch: dict) -> bool:
    """Loss and dH against float64 from the same hidden states; the error of the log-probs is only reported."""
    ids, mask, seen = batch["completion_ids"], batch["completion_mask"], []  # [B, T], [B, T]
    mask[1, -5:] = 0
    batch |= {"advantages": torch.tensor([1.0, -0.5], device=ids.device), "num_items_in_batch": mask.sum()}
    whole = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))  # [B, L] each
    norm = trainer.model.model.norm
    norm_out = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with norm_out, norm.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0])):
        with torch.no_grad():
            logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, *whole, ids.shape[1])[0]
            far = (logprobs - logprobs_of(trainer, seen[-1].bfloat16().double(), ids)).abs()[mask != 0]
        batch["old_per_token_logps"] = old = logprobs + DRIFT * (2 * (ids % 2) - 1)
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, dict(batch), None)
    hidden, dh = seen[-2].detach().bfloat16().double().requires_grad_(), seen[-1]  # [B, L, D]
    objective, given = lad_loss if name == LAD else grpo_loss, (old.double(), batch["advantages"].double())
    exact = objective(logprobs_of(trainer, hidden, ids), *given, loss_mask=mask).loss
    exact.backward()
    loss_error, dh_error = relative_error(loss, exact.detach()), relative_error(dh, hidden.grad)
    inside = loss_error <= LOSS_TOLERANCE[run.device] and dh_error <= PROMISE
    run.add(
        "TRL gate",
        data=data,
        trainer=name,
        loss_error=loss_error,
        dH_error=dh_error,
        inside=inside,
        rows=len(far),
        logprob_error_mean=far.mean().item(),
        logprob_error_max=far.max().item(),
    )
    return inside


def seconds(trainer: Any, batch: dict) -> float:
    """Of one loss and gradient, host work included."""
    trainer.model.zero_grad()
    start = time.perf_counter()
    trainer.training_step(trainer.model, batch, None).item()  # waits for the backward too: one stream
    return time.perf_counter() - start


def steps(run: Run, data: str, trainers: dict[str, Any], batch: dict) -> None:
    """Rounds whose order rotates, after one that warms up; memory is the most allocated in any later one."""
    names, samples, peaks = list(trainers), {name: [] for name in trainers}, dict.fromkeys(trainers, 0.0)
    for count in range(1 + min(5, run.repeats)):
        if count >= 3 and run.time_left() < 30:  # is left for the largest micro-batch
            break
        for name in names[count % 3 :] + names[: count % 3]:
            if run.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(trainers[name], batch)
            if count:
                samples[name].append(taken)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 2**20)
    tokens = sum(batch[part].numel() for part in ("prompt_ids", "completion_ids"))
    for name, trainer in trainers.items():
        run.add(
            "TRL steps",
            data=data,
            tokens=tokens,
            trainer=name,
            tokens_per_s=tokens / statistics.median(samples[name]),
            ms=quartiles(samples[name]),
            rounds=len(samples[name]),
            time_over_TRL=statistics.median(ours / stock for ours, stock in zip(samples[name], samples[STOCK])),
            peak_mib=peaks[name] or None,
            kept_share=trainer._metrics["train"].get("lad/kept_share", [None])[-1],
            weights_and_gradients_mib=2 * sum(p.nbytes for p in trainer.model.parameters()) / 2**20,
        )


def largest(run: Run, trainers: dict[str, Any], tokens: int, length: int) -> None:
    """Double the micro-batch until memory or time runs out, one step each."""
    fits, stopped, longest = dict.fromkeys(trainers, tokens), {}, 0.0
    while len(stopped) < len(trainers):
        tokens *= 2
        for name in [name for name in trainers if name not in stopped]:
            try:
                if 2.5 * longest > run.time_left():
                    raise TimeoutError("this experiment's time is up")
                longest = max(longest, seconds(trainers[name], rollouts(trainers, tokens // length, length)))
                fits[name] = tokens
            except Exception as error:  # out of memory, or what a kernel says of such a size: a result
                stopped[name] = describe(error)
            trainers[name].model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
    for name in trainers:
        run.add("largest TRL micro-batch", trainer=name, tokens_that_fit=fits[name], stopped_by=stopped[name])
