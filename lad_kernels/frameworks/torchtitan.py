"""LAD as a loss of torchtitan's RL trainer, next to its GRPOLoss.

loss=ChunkedLossWrapper.Config(num_chunks=8, loss_fn=LADLoss.Config(eta=0.25))  # in a config registry
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lad_kernels import LADConfig, lad_loss
from lad_kernels.outputs import METRICS

try:
    from torchtitan.components.loss import BaseLoss, compute_logprobs
except ModuleNotFoundError as error:
    if error.name != "torchtitan":
        raise

    class BaseLoss:  # so that LADLoss.Config can be defined
        class Config:
            def __post_init__(self) -> None:
                raise ImportError("LADLoss: torchtitan is not installed; pip install torchtitan")


class LADLoss(BaseLoss):
    """LAD with torchtitan's mask and divisor: tokens without a finite generator log-prob are dropped, and the sum is
    divided by `global_valid_tokens`. Ratios are per token, because a chunk does not hold whole completions.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Fields of `LADConfig`."""

        divergence: str = LADConfig.divergence
        eta: float = LADConfig.eta
        centered: bool = LADConfig.centered
        log_ratio_clamp: float | None = LADConfig.log_ratio_clamp
        target_clamp: float | None = LADConfig.target_clamp
        epsilon_low: float | None = LADConfig.epsilon_low
        epsilon_high: float | None = LADConfig.epsilon_high

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.config = LADConfig(**{name: getattr(config, name) for name in LADLoss.Config.__annotations__})

    def __call__(
        self,
        logits: Tensor,  # [B, T, V] or [T, V]
        labels: Tensor,  # [B, T] or [T], like all that follow
        global_valid_tokens: float | Tensor | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [], metrics): shares that sum over chunks, micro-batches and ranks to means over tokens; and maxima."""
        mask = loss_mask & generator_logprobs.isfinite()  # [B, T] or [T]
        logprobs = compute_logprobs(logits, labels)  # [B, T] or [T]
        out = lad_loss(logprobs, generator_logprobs, advantages, loss_mask=mask, config=self.config)
        total = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        share = mask.sum() / total  # []
        loss, metrics = out.loss * share, {}
        for name, value in out.metrics.items():
            if METRICS[name] == "max":
                metrics[f"lad/{name}/max"] = value
            elif METRICS[name] in ("tokens", "sum"):  # what chunks of a token's share add up to
                metrics[f"lad/{name}/mean"] = value * share
        metrics["lad/nonfinite_share/mean"] = (loss_mask & ~mask).sum() / total  # as its own nan_frac
        return loss, {"loss/mean": loss.detach(), **metrics}
