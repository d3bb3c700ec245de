"""What TRL's own fused head calls for log-probs, by our head. TRL 1.15.1 to 1.16.

Every trainer of TRL with a fused head calls one autograd Function, `trl.kernels.ChunkedLogProbFunction`, by its
`apply`, which `ChunkedLogProbs` has; `trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbs` replaces it.
"""

from __future__ import annotations

from torch import Tensor

from lad_kernels.head import HeadArguments, token_outputs

__all__ = ("ChunkedLogProbs",)


class ChunkedLogProbs:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, and of `outputs` entropy, log sum_v p_v^2, mean logit and whether the target is likeliest.

        Args:
            weight, bias: are cast to the dtype of the hidden states.
            chunk_size: not used.
            outputs: among "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1"; other names are TRL's own.

        Returns:
            Five [N], float32 (bool for the last), None for what is not asked for. Log-probs and entropy are
            differentiable; the others are not. `is_top1` also holds where the target ties with the largest logit.

        Raises:
            ValueError: mean logits with a softcap; a weight that DeepSpeed ZeRO-3 partitions.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "lm_head_weight: expected a weight that is whole in the backward too, got one that ZeRO-3 partitions "
                "in between; use attach_fused_head, which lets the head's module gather it"
            )
        if final_logit_softcapping is not None and "mean_logits" in outputs:
            raise ValueError(
                f"mean_logits: not built with a softcap, got final_logit_softcapping={final_logit_softcapping!r}; the "
                f"mean of capped logits needs all of them: leave TRL's own function in place for this model"
            )
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        cap = final_logit_softcapping
        head = HeadArguments(hidden, weight, targets, bias, temperature, logit_scale, cap, None, "auto")
        out = token_outputs(
            head,
            None,
            return_entropy="entropy" in outputs,
            return_mean_logit="mean_logits" in outputs,
            return_correct="is_top1" in outputs,
        )
        squares = None
        if "log_sum_sq_probs" in outputs:  # sum of e^2z is that of the logits at half the temperature
            halved = token_outputs(head._replace(temperature=temperature / 2), None)
            squares = halved.lse.detach() - 2 * out.lse.detach()
        mean = None if out.mean_logit is None else out.mean_logit.detach()
        return out.logprobs, out.entropy, squares, mean, out.correct
