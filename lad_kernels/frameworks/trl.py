"""TRL: LAD as a trainer, and the fused head for TRL's own trainers. TRL 1.14 to 1.16, except 1.15.0.

from lad_kernels.frameworks.trl import LADConfig, LADTrainer
trainer = LADTrainer(model, reward_funcs, args=LADConfig(eta=0.25), train_dataset=dataset)

`FusedHeadMixin` in front of `trl.GRPOTrainer` or `trl.RLOOTrainer` computes every log-probability with `lad_kernels`
and leaves TRL's loss as it is. `LADTrainer` replaces the loss. Sampling, advantages, the reference model and the logs
remain TRL's in both. The head always runs inside the wrapped model's forward, on the device of its weight; with PEFT's
`modules_to_save=["lm_head"]` under FSDP2, where TRL 1.16's own head has a wrong gradient, ours is right. What is
refused and what was tested is in `docs/frameworks/trl.md`.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lad_kernels import (
    LinearLogprobs,
    LossOutput,
    Tokens,
    lad_loss,
    linear_lad_loss,
    linear_logprobs,
    linear_policy_loss,
)
from lad_kernels.frameworks.distributed import require_sound_ranks
from lad_kernels.frameworks.options import say_bounds
from lad_kernels.frameworks.transformers import attach_fused_head
from lad_kernels.frameworks.trl_options import GRPOTrainer, LADConfig, RLOOTrainer, require_trl, trl_has_fused_head
from lad_kernels.outputs import METRICS

__all__ = ("FusedHeadMixin", "LADConfig", "LADTrainer")

MULTIMODAL = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)

TRL_NAMES = {"entropy": "entropy", "kl_ref": "kl"}  # the others are logged as lad/<name>


class FusedHeadMixin:
    """`class MyTrainer(FusedHeadMixin, trl.GRPOTrainer)`: old, reference and current log-probs without N x V logits.

    Attributes:
        head_options: None, or `tail_mass`, `tail` and `backward` of `linear_policy_loss`, whose objective TRL's loss
            then is: the head's backward is routed where that is faster. Set it in the class; no mixture of experts.

    Raises:
        ImportError: no supported TRL.
        TypeError: not in front of GRPOTrainer or RLOOTrainer.
        ValueError, RuntimeError: an option or package that replaces the same forward.
    """

    head_options: dict[str, Any] | None = None
    _given: tuple | None = None  # what TRL's loss is given while it is an objective

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        require_trl()
        if not isinstance(self, (GRPOTrainer, RLOOTrainer)):
            raise TypeError(
                f"{type(self).__name__}: expected trl.GRPOTrainer or trl.RLOOTrainer after FusedHeadMixin among its "
                f"bases, got {[base.__name__ for base in type(self).__mro__[1:4]]}"
            )
        if "unsloth" in sys.modules:
            raise RuntimeError(
                "unsloth: expected not to be imported, as it rewrites TRL's trainers and the models' forwards; use "
                "one or the other"
            )
        if args is not None and args.use_liger_kernel and not trl_has_fused_head:  # later: only Liger's layers
            raise ValueError(
                "use_liger_kernel: expected False with TRL 1.14, got True; it would replace the model's forward, and "
                "ours with it; TRL 1.15.1 and later apply Liger's layers alone"
            )
        if getattr(args, "cast_lm_head_to_fp32", False) and (args.bf16 or args.fp16):
            raise ValueError(
                "cast_lm_head_to_fp32: expected False under bf16 or fp16 autocast, got True; logits are accumulated "
                "in float32 without it; for a float32 head on a 16-bit body load the model in bfloat16 "
                "(model_init_kwargs={'dtype': 'bfloat16'}) and set bf16=False"
            )
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        require_sound_ranks(self.accelerator, reference_model=self.ref_model is not None)
        if getattr(self, "aux_loss_enabled", False) and self.head_options is not None:
            raise ValueError(
                "head_options: expected None with a mixture of experts' loss, which TRL adds inside its own"
            )
        if getattr(self, "aux_loss_enabled", False) and self._router_coefficient() == 0:
            raise ValueError(
                "router_aux_loss_coef: expected a model whose own coefficient is not 0, got 0; set it in the model's "
                "config before the model is built"
            )
        for module in (self.model, self.ref_model):
            if module is not None:
                attach_fused_head(self.accelerator.unwrap_model(module))

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        """TRL's method with the model replaced by one that scores labels through the fused head."""
        if self._given is not None:
            return self._given
        scored = partial(self._score, model, kwargs.get("compute_entropy", False))
        if trl_has_fused_head:
            return super()._get_per_token_logps_and_entropies(scored, *args, **kwargs)
        return self._score_rows(scored, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss [] of a micro-batch; with `head_options` as an objective inside the model's forward."""
        if self.head_options is None or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        own, ids, called = super()._compute_loss, inputs["completion_ids"], False  # ids [B, T]

        def loss_of_all(logprobs: Tensor, entropy: Tensor) -> Tensor:  # [B, T], [B, T]
            nonlocal called
            self._given, called = (logprobs, entropy, None), True
            try:
                return own(model, inputs)
            finally:
                self._given = None

        def objective(logprobs: Tensor, entropy: Tensor, tokens: Tokens) -> Tensor:  # [m], [m]
            at, blank = tokens.positions, logprobs.new_zeros(ids.numel())  # [m], [B T]
            placed = (blank.index_put((at,), x).view(ids.shape).to(ids.device) for x in (logprobs, entropy))  # [B, T]
            return loss_of_all(*placed).to(logprobs.device)

        loss_of = partial(linear_policy_loss, objective=objective, return_entropy=True, return_logprobs=False)
        out, _ = self._forward(model, inputs, loss_of, loss_mask=inputs["completion_mask"], **self.head_options)
        if called:
            return out.loss
        zeros = out.loss.new_zeros(ids.shape)  # no token counts here: TRL's metrics are still gathered from all ranks
        return out.loss + loss_of_all(zeros, zeros)

    def _score_rows(
        self,
        scored: Callable,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int = 0,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **extra: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For TRL 1.14: [B, T] log-probs and entropies, `batch_size` rows at a time; images go in one batch."""
        images = {k: v for k, v in extra.items() if k in MULTIMODAL and v is not None}
        rows = len(input_ids) if images or not batch_size else batch_size
        parts = []
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows)):  # [b, L]
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            inputs = {"input_ids": ids, "attention_mask": mask, **images}
            if compute_aux_loss:
                inputs["output_router_logits"] = True
            parts.append(scored(labels, **inputs))
        keep = slice(-logits_to_keep, None)
        return (
            torch.cat([part.log_probs[:, keep] for part in parts]),
            torch.cat([part.entropy[:, keep] for part in parts]) if compute_entropy else None,
            torch.stack([part.aux_loss for part in parts]).mean() if compute_aux_loss else None,
        )

    def _score(
        self, model: Any, want_entropy: bool, labels: Tensor, fused_lm_head: bool = True, **inputs: Any
    ) -> SimpleNamespace:
        """log_probs and entropy [B, L - 1] of the labels [B, L] that are not -100, and the auxiliary loss."""

        def head(hidden: Tensor, weight: Tensor, **transform: Any) -> LinearLogprobs:  # [B, L, D], [V, D]
            ids = labels[:, 1:].to(hidden.device)
            return linear_logprobs(
                hidden[:, :-1],
                weight,
                ids,
                loss_mask=ids != -100,
                temperature=self.temperature,
                return_entropy=want_entropy,
                **transform,
            )

        out = model(**inputs, use_cache=False, fused_head=head)
        (logprobs, entropy, _), aux_loss = _on(labels.device, (out.result, out.aux_loss))
        aux_loss = aux_loss / self._router_coefficient() if inputs.get("output_router_logits") else None
        return SimpleNamespace(log_probs=logprobs, entropy=entropy, aux_loss=aux_loss)

    def _forward(self, model: Any, inputs: dict[str, Any], loss_or_logprobs: Callable, **options: Any) -> tuple:
        """`loss_or_logprobs` on the rows that predict the completion, inside the wrapped forward; and the aux loss."""
        completion_ids = inputs["completion_ids"]  # [B, T]

        def head(hidden: Tensor, weight: Tensor, **transform: Any) -> Any:  # [B, L, D], [V, D]
            rows = hidden[:, -completion_ids.shape[1] - 1 : -1]  # [B, T, D]
            ids, given = _on(hidden.device, (completion_ids, options))
            return loss_or_logprobs(rows, weight, ids, temperature=self.temperature, **given, **transform)

        images = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            images["output_router_logits"] = True
        with self.accelerator.autocast():
            out = model(
                input_ids=torch.cat([inputs["prompt_ids"], completion_ids], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                use_cache=False,
                fused_head=head,
                **images,
            )
        result, aux_loss = _on(completion_ids.device, (out.result, out.aux_loss))
        return result, aux_loss / self._router_coefficient() if self.aux_loss_enabled else None

    def _router_coefficient(self) -> float:
        """What the model multiplies its mixture-of-experts loss by; TRL wants the loss without it."""
        of_config = self.model.config.get_text_config().router_aux_loss_coef
        return getattr(self.model, "router_aux_loss_coef", of_config)


class LADTrainer(FusedHeadMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with the LAD loss (arXiv 2602.20132), fused with the head; same arguments, `args: LADConfig`.

    Logs what TRL logs except its clip ratios, and `lad/...`: the metrics of `lad_kernels`, over all ranks. The loss
    itself is dominated by a constant; watch `lad/loss_above_start`, or the reward where it is 0 (ratio exactly 1).

    Raises:
        TypeError: `args` is not a LADConfig.
        ValueError, RuntimeError, ImportError: see `FusedHeadMixin`.
    """

    _tag_names = ("trl", "lad")
    _name = "LAD"
    _paper = {  # noqa: RUF012
        "title": "LAD: Learning Advantage Distribution for Reasoning",
        "id": "2602.20132",
        "citation": (
            "@article{lad2026,\n    title  = {{LAD: Learning Advantage Distribution for Reasoning}},\n"
            "    year   = 2026,\n    eprint = {arXiv:2602.20132},\n}"
        ),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: LADConfig | None = None, *rest: Any, **kwargs: Any):
        require_trl()
        args = LADConfig() if args is None else args
        if not isinstance(args, LADConfig):
            raise TypeError(f"args: expected lad_kernels.frameworks.trl.LADConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.objective = replace(args.objective(), target_norm=None)  # applied to the advantages of whole groups
        if self.accelerator.is_main_process:
            say_bounds("LADTrainer", *args.ratio_bounds(), unset="TRL's default epsilon")
        self.corrects_kl = args.beta != 0 and args.use_bias_correction_kl
        self.needs_logprobs_first = self.corrects_kl or args.top_entropy_quantile < 1 or args.entropy_coef != 0

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """TRL's rollout; with target_norm every group's advantages are shifted so that its target sums to one."""
        out = super()._generate_and_score_completions(inputs)
        if self.args.target_norm is not None:
            size = self.num_generations if self.model.training else self.num_generations_eval
            u = self.accelerator.gather(out["advantages"]) / self.args.eta  # [all ranks' B], groups in order
            log_mean = (u.view(-1, size).logsumexp(1) - math.log(size)).repeat_interleave(size)
            own = log_mean.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]  # [B]
            out["advantages"] = out["advantages"] - self.args.eta * own
        return out

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Loss [] of one of TRL's micro-batches; summed over micro-batches and averaged over ranks it is the batch's.

        Raises:
            ValueError: `return_outputs`.
            RuntimeError: with several ranks, a model other than the wrapped one.
        """
        if return_outputs:
            raise ValueError("return_outputs: expected False, got True; LADTrainer returns the loss alone")
        if torch.is_grad_enabled() and self.accelerator.num_processes > 1 and model is not self.model_wrapped:
            raise RuntimeError(
                "model: expected the wrapped model (trainer.model_wrapped), got another one; gradients would not be "
                "reduced over the ranks"
            )
        chosen = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0  # [B, T]
        weights = inputs.get("importance_sampling_ratio")  # [B, T] or [B, 1]
        mask = chosen  # [B, T] tokens that take part in every term: those whose given numbers are finite
        for x in (inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps"), weights):
            mask = mask if x is None else mask & x.isfinite()
        given = {
            "old_logprobs": inputs.get("old_per_token_logps"),  # [B, T]
            "advantages": inputs["advantages"],  # [B] or [B, T]
            "loss_mask": mask,
            "config": self.objective,
            "normalizer": self._normalizer(inputs),
            "ref_logprobs": inputs.get("ref_per_token_logps"),  # [B, T]
            "rollout_is_weights": None if weights is None else weights.expand_as(mask),
        }
        if self.needs_logprobs_first:
            out, aux_loss = self._loss_after_logprobs(model, inputs, given)
        else:
            wanted = {"return_entropy": self.args.log_entropy, "return_logprobs": False}
            out, aux_loss = self._forward(model, inputs, linear_lad_loss, **wanted, **given)
        loss = out.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._steps()
            self._record("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
        self._record_metrics(out.metrics, mask, chosen.sum(), inputs["advantages"])
        return loss

    def _steps(self) -> int:
        """Micro-batches that are summed before an optimizer step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _normalizer(self, inputs: dict[str, Any]) -> Tensor | int:
        """TRL's divisors: of dapo, grpo, luspo and dr_grpo, in the order of the modes below."""
        if self.args.loss_agg_mode == "token-mean":  # the count is that of the generation batch over all ranks
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes  # []
            return tokens * self._steps() / self.args.steps_per_generation if self.model.training else tokens
        sequences = len(inputs["completion_ids"]) * self._steps()
        return sequences * (self.max_completion_length if self.args.loss_agg_mode.endswith("norm") else 1)

    def _loss_after_logprobs(self, model: Any, inputs: dict[str, Any], given: dict) -> tuple[LossOutput, Tensor | None]:
        """Entropies select tokens or enter the loss, or the ratio weighs the KL term: log-probs come first."""
        mask = given["loss_mask"]  # [B, T]
        scored, aux_loss = self._forward(model, inputs, linear_logprobs, loss_mask=mask, return_entropy=True)
        logprobs, entropy, _ = scored  # [B, T]
        chosen = mask
        if self.args.top_entropy_quantile < 1:
            chosen = self.get_high_entropy_mask(entropy.detach(), mask, 1 - self.args.top_entropy_quantile)  # [B, T]
            weights = given["rollout_is_weights"]
            weights = torch.ones_like(entropy) if weights is None else weights
            given = {**given, "rollout_is_weights": torch.where(chosen, weights, 0.0)}
        out = lad_loss(logprobs, **given)
        loss, metrics = out.loss, {**out.metrics, "entropy": _masked_mean(entropy.detach(), mask)}
        if self.corrects_kl:
            kl = self._corrected_kl(logprobs, given["old_logprobs"], given["ref_logprobs"], mask)  # [B, T]
            per_sequence = mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
            share = per_sequence if self.args.loss_agg_mode == "seq-mean-token-mean" else 1
            loss = loss + self.beta * (kl / share).sum() / given["normalizer"]
            metrics["kl_ref"] = _masked_mean(kl.detach(), mask)
        if self.args.entropy_coef != 0:
            self._record("policy_loss", self.accelerator.gather(loss.detach() * self._steps()).mean().item())
            self._record("entropy_coef", self.args.entropy_coef)
            loss = loss - self.args.entropy_coef * _masked_mean(entropy, chosen) / self._steps()
        return out._replace(loss=loss, metrics=metrics), aux_loss

    def _corrected_kl(self, logprobs: Tensor, old: Tensor | None, ref: Tensor, mask: Tensor) -> Tensor:
        """k3 times the ratio, [B, T], 0 where masked: its gradient is that of KL(pi, pi_ref)."""
        gap = torch.where(mask, ref - logprobs, 0.0)  # [B, T]
        log_ratio = torch.where(mask, logprobs - (logprobs.detach() if old is None else old), 0.0)  # [B, T]
        if self.args.importance_sampling_level != "token":
            log_ratio = log_ratio.sum(1, keepdim=True)  # [B, 1]
        if self.args.importance_sampling_level == "sequence":
            log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
        return (gap.expm1() - gap) * log_ratio.exp()

    def _record(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _record_metrics(self, metrics: dict[str, Tensor], mask: Tensor, chosen: Tensor, advantages: Tensor) -> None:
        """Sums and counts over all ranks, so that a mean is never a mean of means; one host sync.

        Means are over the tokens of mask [B, T]; of `chosen` [], the loss tokens, the others were dropped.
        """
        signs = (advantages if advantages.ndim == 2 else advantages[:, None]).sign() * mask  # [B, T]
        tokens, positive, negative = mask.sum(), (signs > 0).sum(), (signs < 0).sum()
        kinds = ("tokens", "positive tokens", "negative tokens", "loss tokens")
        tokens_of = dict(zip(kinds, (tokens, positive, negative, chosen)))
        metrics = {**metrics, "nonfinite_share": (chosen - tokens) / chosen.clamp(min=1)}
        counts = {name: tokens_of[how] for name, how in METRICS.items() if name in metrics and how in tokens_of}
        above = metrics["loss_above_start"] * self._steps() / self.accelerator.num_processes
        sums = torch.stack([above, *(metrics[name] * count for name, count in counts.items()), *counts.values()])
        sums = self.accelerator.reduce(sums.float(), reduction="sum").tolist()
        self._record("lad/loss_above_start", sums[0])
        for name, total, count in zip(counts, sums[1:], sums[1 + len(counts) :]):
            self._record(TRL_NAMES.get(name, f"lad/{name}"), total / max(count, 1))
        largest = [name for name, how in METRICS.items() if how == "max" and name in metrics]
        values = self.accelerator.gather(torch.stack([metrics[name] for name in largest])[None]).amax(0)
        for name, value in zip(largest, values.tolist()):
            self._record(f"lad/{name}", value)


def _on(device: torch.device, tree: Any) -> Any:
    """The tree with its tensors on the device: with `device_map` a model's head is on the device of its weight."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, T] where mask is not 0; 0 if it is nowhere."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


if __name__ == "__main__":
    runpy.run_module("lad_kernels.frameworks.trl_script", run_name="__main__")
