"""Configs of the objectives, as frozen dataclasses that validate their fields when they are built."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch

from lad_kernels import checks

DIVERGENCES = ("js", "hd", "tv", "kl", "rkl", "jf", "ps", "pearson")
LEVELS = ("token", "sequence", "sequence_sum")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ADVANTAGE_SCALES = ("group", "batch", "none", "loo")
POLICY_LOSSES = ("ppo", "cispo", "reinforce", "sapo", "vespo", "luspo")
DIRECT_LOSSES = ("cispo", "reinforce", "vespo")  # c is per log-prob: the ratio is a constant weight, or absent
_LEVEL_OF = {"cispo": "token", "reinforce": "token", "vespo": "sequence_sum", "luspo": "sequence"}
# What an objective's terms read of the config besides log-ratio and advantage, at most four.
SETTINGS = {
    **dict.fromkeys(DIVERGENCES, ("eta", "target_clamp", "log_ratio_low", "log_ratio_high")),
    **dict.fromkeys(("ppo", "cispo", "reinforce"), ("epsilon_low", "epsilon_high", "dual_clip")),
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
BACKWARDS = ("auto", "dense", "routed")
TAILS = ("unbiased", "drop")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`; the message suggests the closest name."""
    if value in allowed:
        return
    traced = torch.compiler.is_compiling()  # difflib cannot be
    close = [] if traced else difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def check_number(name: str, value: Any, low: float = -math.inf, *, strict: bool = False, optional: bool = False) -> Any:
    """`value`, which may be numpy's, as a Python int or float.

    Raises:
        ValueError, TypeError: unless it is a finite number >= low (> low if strict), or None if optional.
    """
    if value is None and optional:
        return None
    if not checks.is_number(value):
        raise TypeError(f"{name}: expected a number{' or None' if optional else ''}, got {value!r}")
    if not -math.inf < value < math.inf or value < low or (strict and value == low):
        least = "" if low == -math.inf else f" {'>' if strict else '>='} {low:g}"
        got = "another" if torch.compiler.is_compiling() else repr(value)  # a traced number has no digits
        raise ValueError(f"{name}: expected a finite number{least}, got {got}")
    return value if type(value) in (int, float) else float(value)


def check_tail(backward: str, tail_mass: float | None, tail: str) -> float | None:
    """Check how the head's backward is to be computed, as in `LADConfig`; returns tail_mass as a Python number."""
    check_choice("backward", backward, BACKWARDS)
    check_choice("tail", tail, TAILS)
    return check_number("tail_mass", tail_mass, 0.0, optional=True)


class PolicyConfig:
    """What every objective has: how ratios are formed, how tokens are averaged, KL, entropy, and how the head runs.

    The fields are described in `LADConfig`; each config lists them itself, in the order of its positional arguments.
    Behind the public functions code takes any config and reads its `objective`, never its class.
    """

    importance_sampling_level: str
    loss_agg_mode: str
    advantage_scale: str
    log_ratio_clamp: float | None
    kl_coef: float
    kl_clamp: float | None
    entropy_coef: float
    backward: str
    tail_mass: float | None
    tail: str

    def __post_init__(self) -> None:
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_choice("loss_agg_mode", self.loss_agg_mode, AGGREGATIONS)
        check_choice("advantage_scale", self.advantage_scale, ADVANTAGE_SCALES)
        self._number("log_ratio_clamp", 0.0, strict=True, optional=True)
        self._number("kl_coef", 0.0)
        self._number("kl_clamp", 0.0, strict=True, optional=True)
        self._number("entropy_coef")
        object.__setattr__(self, "tail_mass", check_tail(self.backward, self.tail_mass, self.tail))

    def _number(self, name: str, low: float = -math.inf, **how: bool) -> None:
        """Check a field and store it as a Python number."""
        object.__setattr__(self, name, check_number(name, getattr(self, name), low, **how))

    @property
    def objective(self) -> str:
        """Name of the loss of a token: one of DIVERGENCES or of POLICY_LOSSES."""
        raise NotImplementedError

    @property
    def is_direct(self) -> bool:
        """Whether the loss holds log-probs themselves, not ratios alone."""
        return self.objective in DIRECT_LOSSES

    @property
    def norms_target(self) -> bool:
        """Whether e^u is divided by its mean over the group."""
        return False

    @property
    def clips(self) -> bool:
        """Whether the gradient of a token may stop at a bound on its ratio; `clip_share` is then measured."""
        return True


@dataclass(frozen=True)
class LADConfig(PolicyConfig):
    """Learning Advantage Distributions, arXiv 2602.20132: E_{y ~ pi_old}[e^u f(r / e^u)], u = A / eta.

    Attributes:
        divergence: generator f. `js` (the paper's default), `hd`, `tv`, `kl`, `rkl`, `jf`, `ps` (the authors' name
            for Neyman's chi-square), or `pearson`. Without the partition function `tv` does not identify the
            target: many policies reach the same minimum. The loss of `rkl` is -e^u log r, without the constant u e^u.
        eta: the paper's trust-region coefficient; its authors' code calls 1 / eta kappa.
        importance_sampling_level: `token`, `sequence` (mean over the completion's tokens, as TRL and GSPO mean it)
            or `sequence_sum` (sum over the tokens, the paper's own formula).
        loss_agg_mode: verl's names. `token-mean` weighs tokens alike, `seq-mean-token-mean` sequences alike,
            `seq-mean-token-sum` sums inside a sequence, `seq-mean-token-sum-norm` divides that by a constant length.
        advantage_scale: how rewards become advantages: `group` (GRPO), `batch`, `none` (Dr. GRPO), `loo` (RLOO).
        centered: use f(x) - f'(1) (x - 1): same exact minimiser, no drift in a group without reward variance.
            Changes `kl` and `rkl` only.
        target_norm: `group` divides e^u by its mean over the group (an unscorable completion counts with A = 0), so
            that the target sums to one; None: no normalisation.
        log_ratio_clamp: bound on abs(log r); beyond it the gradient is zero. None: no bound.
        target_clamp: bound on abs(u). None: no bound.
        kl_coef: weight of the k3 estimate of KL(pi || pi_ref).
        kl_clamp: upper bound on the k3 estimate of a token, beyond which its gradient is zero; verl's is 10. None, as
            in TRL: no bound, and a reference 88 nats above the policy makes loss and gradient infinite in float32.
        entropy_coef: weight of an entropy bonus (subtracted from the loss).
        backward: `dense` is exact, `routed` multiplies only active (token, vocabulary block) pairs, `auto` takes the
            faster one by the cost model of head/dispatch.py.
        tail_mass: theta: a pair may be dropped when its block of the logit gradient has an L1 norm of at most theta
            times the mean |c|. 0 is exact; None means 0 for float32 and float64 and 3e-4 for 16-bit inputs, where
            the error measured with the unbiased tail is that of rounding dH to 16 bits. `metrics` bound the error.
        tail: what happens to pairs below the threshold: `unbiased` keeps some, by a hash and scaled so that the
            expected gradient is exact, `drop` none.
        epsilon_low, epsilon_high: offsets of a one-sided trust region, as in PPO's clip: a token (a sequence, at the
            sequence levels) whose ratio is above 1 + epsilon_high and whose coefficient c would raise it further, or
            below 1 - epsilon_low and lower it further, has no gradient from the divergence, and the loss it has at the
            bound. A move back is never stopped, unlike with `log_ratio_clamp`. epsilon_low of 1 or more: no lower
            bound. None: no bound on that side; None twice is the paper's objective.
    """

    divergence: str = "js"
    eta: float = 0.25
    importance_sampling_level: str = "token"
    loss_agg_mode: str = "token-mean"
    advantage_scale: str = "group"
    centered: bool = False
    target_norm: str | None = None
    log_ratio_clamp: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    backward: str = "auto"
    tail_mass: float | None = None
    tail: str = "unbiased"
    target_clamp: float | None = None
    kl_clamp: float | None = None
    epsilon_low: float | None = None
    epsilon_high: float | None = None

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, DIVERGENCES)
        self._number("eta", 0.0, strict=True)
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered: expected True or False, got {self.centered!r}")
        super().__post_init__()
        if self.target_norm is not None:
            check_choice("target_norm", self.target_norm, ("group",))
        self._number("target_clamp", 0.0, strict=True, optional=True)
        self._number("epsilon_low", 0.0, optional=True)
        self._number("epsilon_high", 0.0, optional=True)

    @property
    def objective(self) -> str:
        return self.divergence

    @property
    def norms_target(self) -> bool:
        return self.target_norm is not None

    @property
    def clips(self) -> bool:
        return self.log_ratio_low > -math.inf or self.log_ratio_high < math.inf

    @property
    def log_ratio_low(self) -> float:
        """log(1 - epsilon_low); -inf: no bound."""
        return -math.inf if self.epsilon_low is None or self.epsilon_low >= 1 else math.log1p(-self.epsilon_low)

    @property
    def log_ratio_high(self) -> float:
        """log(1 + epsilon_high); inf: no bound."""
        return math.inf if self.epsilon_high is None else math.log1p(self.epsilon_high)


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """The policy-gradient family, as baselines in the same kernels.

    | objective | fields |
    |---|---|
    | PPO, GRPO (arXiv 2402.03300) | the defaults; `loss_agg_mode="seq-mean-token-mean"` for the paper's averaging |
    | DAPO clip-higher (2503.14476) | `epsilon_high=0.28` |
    | dual clip (1912.09729) | `dual_clip=3.0` |
    | Dr. GRPO (2503.20783) | `advantage_scale="none"`, `loss_agg_mode="seq-mean-token-sum-norm"` |
    | GSPO (2507.18071) | `importance_sampling_level="sequence"`, `epsilon_low=3e-4`, `epsilon_high=4e-4` |
    | CISPO (2506.13585) | `policy_loss="cispo"` |
    | REINFORCE, RLOO (2402.14740) | `policy_loss="reinforce"`, `advantage_scale="loo"` |
    | SAPO (2511.20347) | `policy_loss="sapo"`, `loss_agg_mode="seq-mean-token-mean"` for the paper's averaging |
    | VESPO (2602.10693) | `policy_loss="vespo"`, `importance_sampling_level="sequence_sum"` |
    | LUSPO (2602.05261) | `policy_loss="luspo"`, level `"sequence"`, `loss_agg_mode="seq-mean-token-sum"` |

    | `policy_loss` | a token's term, with r the ratio at `importance_sampling_level` and sg a constant |
    |---|---|
    | `ppo` | -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) |
    | `cispo` | -sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A log pi, Eq. 4 and 5 with the paper's offsets |
    | `reinforce` | -A log pi |
    | `sapo` | -A sigmoid(tau (r - 1)) 4 / tau, tau = sapo_temperature_pos where A > 0, sapo_temperature_neg elsewhere |
    | `vespo` | -sg(phi(r)) A log pi, phi(r) = r^k e^(lambda (1 - r)), vespo_*_pos where A >= 0, vespo_*_neg elsewhere |
    | `luspo` | as `ppo`; each sequence weighs its length, in tokens that take part: masked ones do not count |

    In VESPO rollout_is_weights multiply the term, as everywhere; to have the engine's ratio inside r, give the engine's
    log-probs as old_logprobs (TRL adds the logs of its truncated weights to log r). TRL bounds log r there to
    [log 1e-8, 20], below and above which phi vanishes.

    Attributes:
        epsilon_low, epsilon_high: offsets: `ppo`, `luspo` and `cispo` clip the ratio to [1 - epsilon_low, 1 +
            epsilon_high]; the others do not read them. epsilon_low of 1 or more: no lower bound.
        dual_clip: upper bound (> 1) on the ratio where the advantage is negative, of `ppo` and `luspo`; None: no bound.
        policy_loss: `ppo`, `cispo`, `reinforce`, `sapo`, `vespo` or `luspo`.
        sapo_temperature_pos, sapo_temperature_neg: tau of SAPO's gate: the larger, the narrower.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and lambda of VESPO's weight: how fast it falls
            below and above ratio 1.
        log_ratio_clamp: as in `LADConfig`; in `cispo` and `vespo`, whose ratio is a constant weight, it bounds that
            weight, and `reinforce` has no ratio.
        The other fields are those of `LADConfig`.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    policy_loss: str = "ppo"
    importance_sampling_level: str = "token"
    loss_agg_mode: str = "token-mean"
    advantage_scale: str = "group"
    log_ratio_clamp: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    backward: str = "auto"
    tail_mass: float | None = None
    tail: str = "unbiased"
    kl_clamp: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name in (*SETTINGS["sapo"], *SETTINGS["vespo"]):
            self._number(name, 0.0, strict=True)
        self._number("epsilon_low", 0.0)
        self._number("epsilon_high", 0.0)
        self._number("dual_clip", 1.0, strict=True, optional=True)
        check_choice("policy_loss", self.policy_loss, POLICY_LOSSES)
        super().__post_init__()
        if self.dual_clip is not None and self.objective != "ppo":
            raise ValueError(
                f"dual_clip: expected None with policy_loss={self.policy_loss!r}, which has no such bound, got "
                f"{self.dual_clip}; use 'ppo' or 'luspo'"
            )
        level = _LEVEL_OF.get(self.policy_loss, self.importance_sampling_level)
        if self.importance_sampling_level != level:
            raise ValueError(
                f"importance_sampling_level: policy_loss={self.policy_loss!r} needs {level!r}, got "
                f"{self.importance_sampling_level!r}; use policy_loss='ppo' for GSPO"
            )
        if self.policy_loss == "luspo" and self.loss_agg_mode != "seq-mean-token-sum":
            raise ValueError(
                f"loss_agg_mode: policy_loss='luspo' weighs a sequence by its length and needs 'seq-mean-token-sum', "
                f"got {self.loss_agg_mode!r}; use policy_loss='ppo' for another average"
            )

    @property
    def objective(self) -> str:
        return "ppo" if self.policy_loss == "luspo" else self.policy_loss  # they differ in level and aggregation
