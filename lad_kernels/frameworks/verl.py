"""LAD in verl: the policy loss `lad`, its configuration, and the fused head as backend `lad_kernels`.

verl loads this module in every worker, through the entry-point group `verl.plugins` if the package is installed, else
with VERL_USE_EXTERNAL_MODULES=lad_kernels.frameworks.verl. Nothing of verl changes unless it is asked for, by the
settings of `docs/frameworks/verl.md`. `python -m lad_kernels.frameworks.verl` says whether a worker would load it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lad_kernels import LADConfig, LinearLogprobs, lad_loss, linear_logprobs
from lad_kernels.frameworks.options import ratio_bounds, say_bounds
from lad_kernels.frameworks.transformers import attach_fused_head

logger = logging.getLogger(__name__)
try:
    from verl.models.transformers import monkey_patch
    from verl.models.transformers.dense_common import CausalLMOutputForPPO
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.workers.config import PolicyLossConfig
except Exception as error:
    if getattr(error, "name", None) != "verl":  # verl is there; it reports a plugin that fails at debug level only
        logger.error("lad_kernels: cannot register with this verl: %s: %s", type(error).__name__, error)
        raise
    monkey_patch, PolicyLossConfig = None, object

BACKEND = "lad_kernels"
CLIP_RATIO = 0.2  # verl's default of clip_ratio, clip_ratio_low and clip_ratio_high, which sets no bound here


@dataclass
class LADPolicyLossConfig(PolicyLossConfig):
    """verl's policy loss configuration plus LAD's own fields, with their meaning in `LADConfig`.

    Aggregation, KL and entropy terms are verl's own (`actor.loss_agg_mode`, `use_kl_loss`, `entropy_coeff`), and so are
    the bounds that it puts on its KL estimates.

    Raises:
        ImportError: verl is not installed.
        ValueError, TypeError: a field that `LADConfig` refuses.
    """

    loss_mode: str = "lad"
    divergence: str = LADConfig.divergence
    eta: float = LADConfig.eta
    importance_sampling_level: str = LADConfig.importance_sampling_level
    centered: bool = LADConfig.centered
    log_ratio_clamp: float | None = LADConfig.log_ratio_clamp
    target_clamp: float | None = LADConfig.target_clamp
    epsilon_low: float | None = LADConfig.epsilon_low
    epsilon_high: float | None = LADConfig.epsilon_high

    def __post_init__(self) -> None:
        if monkey_patch is None:
            raise ImportError("LADPolicyLossConfig: verl is not installed; pip install 'verl>=0.9'")
        self.lad_config()

    def lad_config(self, loss_agg_mode: str = "token-mean", actor: Any = None) -> LADConfig:
        """The same settings for `lad_loss`, with verl's clip range where the actor has one that is not its default."""
        both = getattr(actor, "clip_ratio", CLIP_RATIO)
        bounds = [getattr(actor, name, None) for name in ("clip_ratio_low", "clip_ratio_high")]
        low, high = (both if x is None else x for x in bounds)
        if both != CLIP_RATIO and low == high == CLIP_RATIO and None not in bounds:
            raise ValueError(
                f"clip_ratio: expected clip_ratio_low and clip_ratio_high to go with it, got {both!r} while they are "
                f"{low!r}, which is what verl reads; set these two"
            )
        own = {name: getattr(self, name) for name in LADPolicyLossConfig.__annotations__ if name != "loss_mode"}
        bounds = ratio_bounds((self.epsilon_low, self.epsilon_high), (low, high), CLIP_RATIO, "the actor's clip_ratio")
        own["epsilon_low"], own["epsilon_high"] = bounds
        return LADConfig(loss_agg_mode=loss_agg_mode, **own)


def lad_policy_loss(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, T]
) -> tuple[Tensor, dict[str, float]]:
    """`lad_loss` with the signature of verl's policy losses, registered there as `lad`.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T], padded responses; the mask is nonzero on loss tokens.
        loss_agg_mode: any of verl's five modes.
        config: verl's ActorConfig; `policy_loss` holds the LAD settings (a plain PolicyLossConfig means the defaults)
            and `global_batch_info` what makes micro-batches and data parallelism exact.
        rollout_is_weights: [B, T] importance weights of the rollout engine, constants.

    Returns:
        The loss [], scaled as `agg_loss` scales it, and metrics as Python floats, means over this micro-batch. A token
        whose old log-prob or weight is not finite is dropped and counted in `actor/lad/nonfinite_share`; verl's counts,
        by which the loss is scaled, contain it.

    Raises:
        ValueError: an unknown mode, or dp_size > 1 without the global counts.
        TypeError: `policy_loss` is not one of the two configurations.
    """
    settings = getattr(config, "policy_loss", None)
    if settings is None or type(settings) is PolicyLossConfig:
        settings = LADPolicyLossConfig()
    if not isinstance(settings, LADPolicyLossConfig):
        raise TypeError(
            f"config.policy_loss: expected LADPolicyLossConfig, got {type(settings).__name__}; set "
            "actor_rollout_ref.actor.policy_loss._target_=lad_kernels.frameworks.verl.LADPolicyLossConfig"
        )
    mask = response_mask.bool()  # [B, T]
    here, share, width = _counts(loss_agg_mode, mask, dict(getattr(config, "global_batch_info", {})))
    objective = settings.lad_config("token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode, config)
    if not dist.is_initialized() or dist.get_rank() == 0:
        say_bounds("lad", objective.epsilon_low, objective.epsilon_high, unset="verl's default clip_ratio")
    out = lad_loss(
        log_prob,
        old_log_prob,
        advantages,
        loss_mask=mask,
        config=objective,
        normalizer=here * width,
        rollout_is_weights=rollout_is_weights,
    )
    values = torch.stack([x.float() for x in out.metrics.values()]).tolist()  # one host sync
    metrics = {f"actor/lad/{name}": value for name, value in zip(out.metrics, values)}
    return out.loss * share, {"actor/ppo_kl": metrics["actor/lad/approx_kl_k1"], **metrics}


def _counts(mode: str, mask: Tensor, info: dict[str, Any]) -> tuple[Tensor, Tensor, int]:  # [B, T]
    """Tokens or sequences of this micro-batch [], its share [] of the global batch times dp_size, and the divisor of
    `seq-mean-token-sum-norm`."""
    by_token, dp_size = mode in ("token-mean", "token-sum"), info.get("dp_size", 1)
    here = (mask if by_token else mask.any(-1)).sum().clamp(min=1)  # []
    key = "batch_num_tokens" if by_token else "global_batch_size"
    total = 1 if mode == "token-sum" else info.get(key)
    if total is None:
        if dp_size > 1:
            raise ValueError(f"config.global_batch_info: expected {key} because dp_size is {dp_size}, got None")
        total = here
    width = (info.get("loss_scale_factor") or mask.shape[-1]) if mode == "seq-mean-token-sum-norm" else 1
    return here, here * dp_size / total, width


def linear_cross_entropy(
    hidden: Tensor,  # [N, D] or [B, T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] or [B, T]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` with the signature of verl's kernel of this name.

    It is called with the weight alone, so it cannot apply a head bias, a logit scale or a softcap. The backend
    `lad_kernels` reads them from the model and applies them. With a group, weight holds this rank's consecutive
    rows, labels are ids of the whole vocabulary, and dH is already summed over the ranks, unlike with verl's kernel.

    Returns:
        (log-probs, entropy), both contiguous float32 [N] (float64 for float64 input), differentiable.

    Raises:
        ValueError: a reduction other than `none`.
    """
    if reduction != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}; reduce the returned [N] log-probs")
    h, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)  # [N, D], [N]
    out = linear_logprobs(h, weight, ids, temperature=temperature, return_entropy=True, vocab_group=dist_process_group)
    return out.logprobs.contiguous(), out.entropy.contiguous()


def fuse_head(model: nn.Module) -> None:
    """Let `model.forward`, when verl calls it with `temperature`, return log-probs and entropy without logits.

    Args:
        model: a transformers causal or vision-language model, before PEFT, FSDP or DDP wraps it. Head bias, logit
            scale and softcap are read from it and checked by `attach_fused_head`. Calls without `temperature` stay as
            they are.

    Raises:
        ValueError: at first use, where the model's logits are not what its head and config say.
    """
    attach_fused_head(model)
    inner = model.forward

    def forward(*args: Any, temperature: float | None = None, **inputs: Any) -> Any:
        if temperature is None:
            return inner(*args, **inputs)
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels", None)  # [B, T]
        if targets is None:  # the last column has no target; verl drops it
            ids = labels if labels is not None else args[0] if args else inputs["input_ids"]
            targets = ids.roll(-1, -1)  # [B, T]

        def score(hidden: Tensor, weight: Tensor, **head: Any) -> LinearLogprobs:  # [B, T, D], [V, D]
            ids = targets.to(hidden.device)  # the head's device, if the model is on several
            return linear_logprobs(hidden, weight, ids, temperature=temperature, return_entropy=True, **head)

        out = inner(*args, **inputs, fused_head=score).result
        return CausalLMOutputForPPO(log_probs=out.logprobs, entropy=out.entropy)

    model.forward = forward


def choose_head(model: nn.Module, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None) -> None:
    """verl's `patch_forward_with_backends`, which skips backends it does not know, extended by ours."""
    if use_fused_kernels and fused_kernels_backend == BACKEND:
        fuse_head(model)
    else:
        patch_forward_with_backends(model, use_fused_kernels, fused_kernels_backend)


def register() -> None:
    """Make the loss `lad` and the backend `lad_kernels` known to verl in this process."""
    register_policy_loss("lad")(lad_policy_loss)
    monkey_patch.patch_forward_with_backends = choose_head
    logger.info("verl: policy loss 'lad' and fused kernels backend %r registered", BACKEND)


def status() -> str:
    """Whether a fresh process has the plugin after `import verl`, as one line; verl hides failures of plugins."""
    probe = (
        "import verl\nfrom verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses\n"
        "from verl.models.transformers.monkey_patch import patch_forward_with_backends as patch\n"
        "print('lad' in losses, patch.__name__ == 'choose_head', verl.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if run.returncode:
        return f"verl: not usable here: {run.stderr.strip().splitlines()[-1]}"
    loss, head, version = run.stdout.split()[-3:]
    if loss == head == "True":
        return f"verl {version}: policy loss 'lad' and fused kernels backend 'lad_kernels' are registered"
    return (
        f"verl {version}: NOT registered (loss: {loss}, backend: {head}); install the package with pip, or set "
        "VERL_USE_EXTERNAL_MODULES=lad_kernels.frameworks.verl, and see that VERL_USE_EXTERNAL_PLUGINS does not "
        "exclude it"
    )


if __name__ == "__main__":
    print(status())
elif monkey_patch is not None:
    register()
