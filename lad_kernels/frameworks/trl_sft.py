"""TRL's supervised trainer with the fused head. TRL 1.15.1 to 1.16.

`class MyTrainer(FusedLossMixin, trl.SFTTrainer)`: TRL's head gives SFTTrainer log-probs, entropies and which labels are
the likeliest tokens, chunk by chunk in two passes; here they and the gradient come from `linear_cross_entropy`, in one
pass, or routed with its `tail_mass`. Loss, metrics and everything else remain TRL's.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lad_kernels import linear_cross_entropy
from lad_kernels.frameworks.distributed import require_sound_ranks
from lad_kernels.frameworks.transformers import attach_fused_head
from lad_kernels.frameworks.trl_options import SFTTrainer, require_trl, trl_has_fused_head

__all__ = ("FusedLossMixin",)


class FusedLossMixin:
    """The head of `trl.SFTTrainer`, without N x V logits; stands in front of it among the bases.

    Attributes:
        head_options: `tail_mass`, `tail` and `backward` of `linear_cross_entropy`; set them in the class.

    Raises:
        ImportError: no supported TRL.
        TypeError: not in front of SFTTrainer.
        ValueError, RuntimeError: an option or package that replaces the same forward.
    """

    head_options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, model: Any, args: Any = None, *rest: Any, **kwargs: Any):
        require_trl()
        if not isinstance(self, SFTTrainer):
            raise TypeError(
                f"{type(self).__name__}: expected trl.SFTTrainer after FusedLossMixin among its bases, got "
                f"{[base.__name__ for base in type(self).__mro__[1:4]]}"
            )
        if not trl_has_fused_head:
            raise ImportError("trl: expected 1.15.1 or later for FusedLossMixin; use patch_loss with older ones")
        if unknown := self.head_options.keys() - {"tail_mass", "tail", "backward"}:
            names = ", ".join(sorted(unknown))
            raise TypeError(
                f"head_options: expected tail_mass, tail or backward, got {names}; the loss itself is TRL's"
            )
        if "unsloth" in sys.modules:
            raise RuntimeError("unsloth: expected not to be imported, as it rewrites TRL's trainers; use one of them")
        super().__init__(model, args, *rest, **kwargs)
        require_sound_ranks(self.accelerator, reference_model=False)
        attach_fused_head(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, of a model that scores its labels by `linear_cross_entropy`."""

        def scored(*args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
            return self._score(model, args, given) if fused_lm_head else model(*args, **given)

        return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)

    def _score(self, model: Any, args: tuple, given: dict[str, Any]) -> SimpleNamespace:
        """What TRL's head returns: per-token fields [B, L - 1] of the labels [B, L], or [B, L] of shifted ones."""
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        given.pop("num_items_in_batch", None)
        targets = labels[:, 1:] if shifted is None else shifted
        # Its plain loss weighs all labels alike: then the gradient is known before the head, but for a common factor.
        alike = self.args.loss_type == "nll" and self.compute_loss_func is None and torch.is_grad_enabled()

        def head(hidden: Tensor, weight: Tensor, **transform: Any) -> tuple:  # [B, L, D], [V, D]
            rows = hidden[:, :-1] if shifted is None else hidden
            ids = targets.to(hidden.device)  # [B, L - 1] or [B, L]
            options = {"reduction": "sum", **self.head_options} if alike else {"reduction": "none"}
            loss, stats = linear_cross_entropy(rows, weight, ids, return_stats=True, **options, **transform)
            logprobs = _AlikeLogprobs.apply(loss, stats.logprobs, ids != -100) if alike else -loss
            return logprobs, stats.entropy, stats.correct

        out = model(*args, **given, fused_head=head)
        logprobs, entropy, correct = (x.to(targets.device) for x in out.result)
        aux_loss = out.aux_loss / self.router_aux_loss_coef if given.get("output_router_logits") else None
        return SimpleNamespace(
            log_probs=logprobs, entropy=entropy, is_top1=correct, label_mask=targets != -100, aux_loss=aux_loss
        )


class _AlikeLogprobs(torch.autograd.Function):
    """Log-probs [B, L] whose upstream gradient is one number wherever `mask` is set, from the loss [] of their sum."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return logprobs.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # [B, L]
        (mask,) = ctx.saved_tensors
        some = torch.where(mask, grad, -torch.inf).amax()  # []
        same = ((grad == some) | ~mask | grad.isnan()).all()  # []
        if grad.device.type != "cpu":
            torch._assert_async(same)  # without waiting for the device
        elif not same:
            raise RuntimeError("loss_type: 'nll' was to weigh all labels alike, and does not; is this a later TRL?")
        return torch.where(mask.any(), -some, 0.0), None, None
