"""Closed-form loss and coefficient of every objective, per log-ratio, in log space.

With d = log r (log-ratio of policy to behaviour policy), u = A / eta and w = log x = d - u, a LAD term is e^u f(e^w)
and its coefficient is c = d loss / d d = r f'(x). x itself is never formed: every difference of exponentials goes
through expm1, ln(2x / (x + 1)) through a log-sigmoid, and near x = 1 the Jensen-Shannon terms use hyperbolic
functions of w / 2, where they do not cancel. For |d| <= 300 and |u| <= 80 every value is finite in float32 if the true
one is below 1e37, infinite with its sign or large beyond, and never NaN.

`above_start` is loss(d, u) - loss(0, u), derived by hand for each divergence, because the e^u terms of the loss
itself (hundreds at eta 0.25) would swallow it. At r = 0 (log pi = -inf) every product of r with a logarithm is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_kernels.objective.config import GRPOConfig, LADConfig

LN2 = math.log(2.0)


class Terms(NamedTuple):
    """Per-token values, all [M]."""

    loss: Tensor
    coef: Tensor  # d loss / d log-ratio, or d loss / d logprob where the loss has no ratio
    above_start: Tensor  # loss minus its value at r = 1


def _exp_gap(p: Tensor, q: Tensor) -> Tensor:
    """e^p - e^q as sign(p - q) e^max(p, q) (1 - e^-|p - q|): no cancellation, and no inf - inf."""
    gap = torch.where(p == q, 0.0, p - q)
    return gap.sign() * torch.maximum(p, q).exp() * -(-gap.abs()).expm1()


def _times_ratio(r: Tensor, x: Tensor) -> Tensor:
    """r x, with the limit 0 at r = 0 where x is a logarithm and infinite."""
    return torch.where(r == 0, torch.zeros_like(r), r * x)


def _log_cosh(a: Tensor) -> Tensor:
    return torch.log1p(2 * torch.sinh(a / 2) ** 2)


def _js_slope(w: Tensor) -> Tensor:
    """2 f'(e^w) = ln(2x / (x + 1)) = w / 2 - log cosh(w / 2), to full relative accuracy near w = 0."""
    return torch.where(w.abs() < 1, w / 2 - _log_cosh(w / 2), LN2 + F.logsigmoid(w))


def _js(d: Tensor, u: Tensor) -> Terms:
    w, r, a = d - u, d.exp(), (d - u) / 2
    r_slope = _times_ratio(r, _js_slope(w))
    far = (r_slope + u.exp() * _js_slope(-w)) / 2
    near = ((d + u) / 2).exp() * (a * a.sinh() - a.cosh() * _log_cosh(a))
    loss = torch.where(w.abs() < 1, near, far)
    # rise = log((1 + e^w) / (1 + e^-u)), whose parts linear in d and u are taken apart where e^d may overflow
    tails = torch.log1p((-w.abs()).exp()) - torch.log1p((-u.abs()).exp())
    linear = torch.where((w > 0) & (u < 0), d, w.clamp(min=0) - (-u).clamp(min=0))
    e1 = d.expm1()
    rise = torch.where(d.abs() < 1, torch.log1p(d.clamp(-1, 1).expm1() * torch.sigmoid(-u)), linear + tails)
    lift = torch.where((w < -40) & (u > 40), e1, u.exp() * rise)  # e^u rise, whose factors may leave the range there
    above = torch.where(d < -1, r_slope - _js_slope(-u) - lift, e1 * _js_slope(w) + (d - rise) - lift) / 2
    return Terms(loss, r_slope / 2, above)


def _hd(d: Tensor, u: Tensor) -> Terms:
    gap = _exp_gap(d / 2, u / 2)
    step = (d / 2).expm1()
    return Terms(gap**2 / 2, _exp_gap(d, (d + u) / 2) / 2, step * (step / 2 - (u / 2).expm1()))


def _tv(d: Tensor, u: Tensor) -> Terms:
    gap, side, side_at_start = _exp_gap(d, u), (d - u).sign(), (-u).sign()
    above = torch.where(side == side_at_start, side * d.expm1(), side * gap + side_at_start * u.expm1())
    return Terms(gap.abs(), d.exp() * side, above)


def _kl_moved(d: Tensor, u: Tensor) -> Tensor:
    """r d - u (r - 1), the change of r (d - u) from r = 1."""
    r = d.exp()
    return torch.where(d > 1, r * (d - u) + u, _times_ratio(r, d) - u * d.expm1())


def _kl(d: Tensor, u: Tensor) -> Terms:
    w, r = d - u, d.exp()
    return Terms(_times_ratio(r, w), _times_ratio(r, w + 1), _kl_moved(d, u))


def _kl_centered(d: Tensor, u: Tensor) -> Terms:
    w, r = d - u, d.exp()
    loss = torch.where(w > 1, r * (w - 1) + u.exp(), _times_ratio(r, w) - _exp_gap(d, u))
    return Terms(loss, _times_ratio(r, w), _kl_moved(d, u + 1))


def _rkl(d: Tensor, u: Tensor) -> Terms:
    e_u = u.exp()
    return Terms(-e_u * d, -e_u, -e_u * d)


def _rkl_centered(d: Tensor, u: Tensor) -> Terms:
    e_u, gap = u.exp(), _exp_gap(d, u)
    return Terms(gap - e_u * d, gap, d.expm1() - e_u * d)


def _jf(d: Tensor, u: Tensor) -> Terms:
    w, r, gap = d - u, d.exp(), _exp_gap(d, u)
    return Terms(gap * w, _times_ratio(r, w) + gap, _kl_moved(d, u) - u.exp() * d)


def _ps(d: Tensor, u: Tensor) -> Terms:
    grown, over = d.expm1(), (2 * u - d).expm1()
    above = torch.where((grown == 0) | (over == 0), 0.0, -grown * over)  # r - 1 + e^2u (1 / r - 1)
    return Terms(_exp_gap(d / 2, u - d / 2) ** 2, _exp_gap(d, 2 * u - d), above)


def _pearson(d: Tensor, u: Tensor) -> Terms:
    grown = d.expm1()
    above = grown * ((-u).exp() * grown + 2 * (-u).expm1())
    return Terms(_exp_gap(d - u / 2, u / 2) ** 2, 2 * _exp_gap(2 * d - u, d), above)


_LAD_TERMS = {"js": _js, "hd": _hd, "tv": _tv, "kl": _kl, "rkl": _rkl, "jf": _jf, "ps": _ps, "pearson": _pearson}
_CENTERED = {"kl": _kl_centered, "rkl": _rkl_centered}  # f'(1) is 1 and -1; it is zero for every other divergence
_TURN = {"kl": -1.0, "rkl": math.inf}  # log x at which c changes sign unless centered; 0 for every other divergence


def lad_terms(divergence: str, log_ratio: Tensor, target: Tensor, *, centered: bool = False) -> Terms:
    """Terms of e^u f(r / e^u) for log_ratio d [M] and target u [M]; `centered` uses f(x) - f'(1) (x - 1)."""
    kinds = _LAD_TERMS | _CENTERED if centered else _LAD_TERMS
    return kinds[divergence](log_ratio, target)


def clip(config: LADConfig, log_ratio: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratio, put on a bound where it is beyond it and c would move it further out; and where that is. All [M].

    c is negative below the log-ratio at which it changes sign and positive above.
    """
    turn = target + (0.0 if config.centered else _TURN.get(config.divergence, 0.0))
    low, high = config.log_ratio_low, config.log_ratio_high
    above, below = (log_ratio > high) & (log_ratio < turn), (log_ratio < low) & (log_ratio > turn)
    return torch.where(above, high, torch.where(below, low, log_ratio)), above | below


def grpo_terms(
    config: GRPOConfig, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, token_log_ratio: Tensor | None = None
) -> tuple[Terms, Tensor]:
    """Terms of `config.policy_loss` (equations: `GRPOConfig`), and which tokens are clipped; all [M].

    `log_ratio` is that of the level; `token_log_ratio` of the token itself, None: the same. CISPO, REINFORCE and VESPO
    weigh log pi itself, so their coefficient is per log-probability and `above_start` is c times its change.
    """
    a, r = advantages, log_ratio.exp()
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    none = torch.zeros_like(a, dtype=torch.bool)
    if config.policy_loss == "reinforce":
        return Terms(-a * logprobs, -a, -a * log_ratio), none
    if config.policy_loss == "cispo":
        bounded = r.clamp(low, high)
        return Terms(-bounded * a * logprobs, -bounded * a, -bounded * a * log_ratio), r != bounded
    if config.policy_loss == "sapo":
        return _sapo(config, log_ratio, a), none
    if config.policy_loss == "vespo":
        k = torch.where(a >= 0, config.vespo_k_pos, config.vespo_k_neg)
        rate = torch.where(a >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
        c = -a * (k * log_ratio - rate * log_ratio.expm1()).exp()
        return Terms(c * logprobs, c, c * (log_ratio if token_log_ratio is None else token_log_ratio)), none
    clipped = ((a > 0) & (r > high)) | ((a < 0) & (r < low))
    loss = torch.maximum(-a * r, -a * r.clamp(low, high))
    if config.dual_clip is not None:
        clipped |= (a < 0) & (r > config.dual_clip)
        loss = torch.where(a < 0, torch.minimum(loss, -a * config.dual_clip), loss)
    above = torch.where(clipped, loss + a, -a * log_ratio.expm1())
    return Terms(loss, torch.where(clipped, torch.zeros_like(a), -a * r), above), clipped


def _sapo(config: GRPOConfig, d: Tensor, a: Tensor) -> Terms:
    """Sigmoid gate: d / dr of sigmoid(x) 4 / tau, x = tau (r - 1), is 4 sigmoid(x) (1 - sigmoid(x)), 1 at r = 1."""
    tau = torch.where(a > 0, config.sapo_temperature_pos, config.sapo_temperature_neg).to(d.dtype)
    x = tau * d.expm1()
    slope = 4 * (d - x.abs()).exp() / (1 + (-x.abs()).exp()).square()  # r d / dr, without inf * 0
    return Terms(-a * torch.sigmoid(x) * (4 / tau), -a * slope, -a * torch.tanh(x / 2) * (2 / tau))
