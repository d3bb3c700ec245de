"""TRL's options: supported versions, LAD's own options, and those of TRL that are refused.

Every field of `trl.GRPOConfig` is honoured, by TRL's code or by ours, or refused by name, and
tests/frameworks/test_trl_options.py says which.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import lad_kernels
from lad_kernels.frameworks.options import ratio_bounds
from lad_kernels.objective import DIVERGENCES, SETTINGS

try:
    import trl
    import trl.trainer.utils
    from packaging.version import Version
    from trl import GRPOConfig, GRPOTrainer, RLOOTrainer, SFTTrainer

    known = Version("1.14") <= Version(trl.__version__) < Version("1.17") and trl.__version__ != "1.15.0"
    unusable = None if known else f"TRL {trl.__version__}"
    trl_has_fused_head = hasattr(trl.trainer.utils, "add_fused_lm_head")  # since 1.15
except (ImportError, RuntimeError) as error:  # RuntimeError: TRL lacks a package of its own
    GRPOConfig = GRPOTrainer = RLOOTrainer = SFTTrainer = object
    unusable, trl_has_fused_head = f"one that cannot be imported ({error})", False

# Options of TRL that have no meaning for LAD: refused unless they keep TRL's default.
ADAPTIVE = "only a constant entropy_coef is supported"
REFUSED = {
    "loss_type": "LAD is the loss; loss_agg_mode chooses the average ('token-mean' averages as TRL's dapo does)",
    "delta": "LAD has no dual clip; epsilon_low and epsilon_high bound the ratio",
    **dict.fromkeys(SETTINGS["sapo"], "TRL's loss_type='sapo' alone reads it; drop it"),
    **dict.fromkeys(SETTINGS["vespo"], "TRL's loss_type='vespo' alone reads it; drop it"),
    "off_policy_mask_threshold": "LAD drops no sequences; log_ratio_clamp stops the gradient of those far off",
    "use_adaptive_entropy": ADAPTIVE,
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"), ADAPTIVE),
    "label_smoothing_factor": "there are no labels to smooth, in TRL's losses neither; drop it",
}

# TRL's loss types as lad_kernels.GRPOConfig has them: policy_loss and loss_agg_mode.
LOSS_TYPES = {
    "dapo": ("ppo", "token-mean"),
    "bnpo": ("ppo", "token-mean"),
    "grpo": ("ppo", "seq-mean-token-mean"),
    "luspo": ("ppo", "seq-mean-token-sum"),
    "dr_grpo": ("ppo", "seq-mean-token-sum-norm"),
    "cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "vespo": ("vespo", "token-mean"),
}

# Fields of lad_kernels.LADConfig that are options under the same name; TRL has options of its own for the others.
OF_TRL = ("advantage_scale", "kl_coef", "kl_clamp", "entropy_coef", "epsilon_low", "epsilon_high")
OBJECTIVE = tuple(f.name for f in fields(lad_kernels.LADConfig) if f.name not in OF_TRL)


def require_trl() -> None:
    """Raise ImportError unless a supported TRL is installed."""
    if unusable is not None:
        raise ImportError(f"trl: expected 1.14 to 1.16 and not 1.15.0, got {unusable}; pip install 'trl<1.17'")


def _option(name: str, text: str) -> Any:
    """A field of `lad_kernels.LADConfig`, with its default."""
    return field(default=getattr(lad_kernels.LADConfig, name), metadata={"help": text})


@dataclass
class LADConfig(GRPOConfig):
    """`trl.GRPOConfig` plus LAD's own options, with their meaning in `lad_kernels.LADConfig`.

    Taken from TRL: `importance_sampling_level` (which may also be `sequence_sum`), `beta` (with
    `use_bias_correction_kl`), `entropy_coef`, `top_entropy_quantile`, `scale_rewards`, `temperature`.

    The bound on the ratio: TRL's default `epsilon=0.2` alone sets none, which is the paper's objective. `epsilon` at
    another value, or `epsilon_high`, sets both sides as TRL reads them (`epsilon_high` None: `epsilon`). `epsilon_low`
    sets the lower side whatever the default `epsilon` is: alone no upper one, with `epsilon_high=0.2` both.

    Raises:
        ImportError: no supported TRL.
        ValueError, TypeError: an option out of range, or one of TRL's that has no meaning for LAD.
    """

    divergence: str = _option("divergence", f"f-divergence: {', '.join(DIVERGENCES[:-1])} or {DIVERGENCES[-1]}.")
    eta: float = _option("eta", "Temperature of the target distribution pi_old * exp(advantage / eta).")
    loss_agg_mode: str = _option(
        "loss_agg_mode",
        "Average: token-mean (over the tokens of all accumulated micro-batches), seq-mean-token-mean, "
        "seq-mean-token-sum or seq-mean-token-sum-norm (divided by max_completion_length).",
    )
    target_norm: str | None = _option("target_norm", "'group' normalises the target over each prompt's completions.")
    centered: bool = _option("centered", "Subtract f'(1)(x - 1) from f: no drift in groups without reward variance.")
    log_ratio_clamp: float | None = _option("log_ratio_clamp", "Bound on |log ratio|; beyond it the gradient is zero.")
    target_clamp: float | None = _option("target_clamp", "Bound on |advantage / eta|.")
    epsilon_low: float | None = _option("epsilon_low", "A ratio below 1 - epsilon_low is not pushed further down.")
    tail_mass: float | None = _option(
        "tail_mass",
        "Threshold below which vocabulary blocks may be dropped; None: 3e-4 in 16-bit precision, else 0 (exact).",
    )
    tail: str = _option("tail", "What happens to blocks below tail_mass: unbiased or drop.")
    backward: str = _option("backward", "Backward of the head: auto, dense or routed.")
    log_entropy: bool = field(
        default=True,
        metadata={"help": "Log the entropy. False lets tokens without gradient skip the head when the ratio is 1."},
    )

    def __post_init__(self):
        require_trl()
        super().__post_init__()
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name in REFUSED.keys() & defaults.keys():  # versions of TRL differ
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: expected {defaults[name]!r} for LAD, got {getattr(self, name)!r}; {REFUSED[name]}"
                )
        self.objective()

    def objective(self) -> lad_kernels.LADConfig:
        """The same settings for `lad_kernels`."""
        kl_coef = 0.0 if self.use_bias_correction_kl else self.beta  # the corrected term is the trainer's
        low, high = self.ratio_bounds()
        own = {name: getattr(self, name) for name in OBJECTIVE}
        return lad_kernels.LADConfig(kl_coef=kl_coef, epsilon_low=low, epsilon_high=high, **own)

    def ratio_bounds(self) -> tuple[float | None, float | None]:
        """epsilon_low and epsilon_high of `lad_kernels.LADConfig`; None: no bound."""
        usual, high = GRPOConfig.epsilon, self.epsilon_high
        if self.epsilon == usual and (self.epsilon_low is not None or high is None):
            return self.epsilon_low, high
        theirs = self.epsilon, self.epsilon if high is None else high
        return ratio_bounds((self.epsilon_low, None), theirs, usual, "epsilon")


def grpo_config(args: GRPOConfig) -> lad_kernels.GRPOConfig:
    """The objective of TRL's options for `linear_grpo_loss`; some of TRL's names mean something else there.

    | TRL | lad_kernels |
    |---|---|
    | `loss_type` | `policy_loss` and `loss_agg_mode`, see LOSS_TYPES; the divisor is the caller's |
    | `epsilon`, `epsilon_high` | offsets: the ratio is clipped to [1 - `epsilon_low`, 1 + `epsilon_high`] |
    | the same with `cispo` | `epsilon_high` is the bound itself, as in Liger: min(r, `epsilon_high`), no lower bound |
    | `delta` | `dual_clip` |
    | `loss_type="vespo"`, whatever the level | `importance_sampling_level="sequence_sum"` |
    | `beta`, `scale_rewards` | `kl_coef`, `advantage_scale` |

    Args:
        args: `trl.GRPOConfig`; what its loss does not read has no effect here either.

    Raises:
        ValueError: an option that `lad_kernels.GRPOConfig` has no counterpart for.
    """
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    cispo = args.loss_type == "cispo"
    for name, fine, wanted in (
        ("loss_type", args.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}"),
        ("epsilon_high", not cispo or high >= 1, "at least 1 with cispo, where it is the bound itself"),
        ("delta", args.delta is None or args.delta >= 1 + high, f"at least 1 + epsilon_high = {1 + high:g}"),
        ("use_bias_correction_kl", args.beta == 0 or not args.use_bias_correction_kl, "False with beta"),
        ("off_policy_mask_threshold", args.off_policy_mask_threshold is None, "None"),
        ("top_entropy_quantile", args.top_entropy_quantile == 1, "1"),
        ("entropy_coef", args.entropy_coef == 0, "0; TRL's bonus is a mean of its own over each micro-batch"),
        ("use_adaptive_entropy", not args.use_adaptive_entropy, "False"),
    ):
        if not fine:
            raise ValueError(f"{name}: expected {wanted}, got {getattr(args, name)!r}; train with FusedHeadMixin")
    policy_loss, mode = LOSS_TYPES[args.loss_type]
    return lad_kernels.GRPOConfig(
        epsilon_low=1.0 if cispo else args.epsilon,
        epsilon_high=high - 1 if cispo else high,
        dual_clip=args.delta if policy_loss == "ppo" else None,
        policy_loss=policy_loss,
        loss_agg_mode=mode,
        importance_sampling_level="sequence_sum" if policy_loss == "vespo" else args.importance_sampling_level,
        advantage_scale=args.scale_rewards,
        kl_coef=args.beta,
        **{name: getattr(args, name) for name in SETTINGS["sapo"] + SETTINGS["vespo"]},
    )
