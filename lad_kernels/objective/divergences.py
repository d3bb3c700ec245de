"""Closed-form loss and coefficient of every objective, per log-ratio, in log space.

With d = log r (log-ratio of policy to behaviour policy), u = A / eta and w = log x = d - u, a LAD term is e^u f(e^w)
and its coefficient is c = d loss / d d = r f'(x). x itself is never formed: every difference of exponentials goes
through expm1, ln(2x / (x + 1)) through a log-sigmoid, and near x = 1 the Jensen-Shannon terms use hyperbolic
functions of w / 2, where they do not cancel. The js terms are finite in float32 for |d| <= 20 and |u| <= 80.

`above_start` is loss(d, u) - loss(0, u), worked out by hand for each divergence, because the e^u terms of the loss
itself (hundreds at eta 0.25) would swallow it. At r = 0 (log pi = -inf) every product of r with a logarithm is 0.

A new divergence is a function here, one in `kernel_terms.py`, a line in `reference_objective.py`, a key in
`config.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_kernels.objective.config import GRPOConfig

LN2 = math.log(2.0)
SLOPE_AT_ONE = {"kl": 1.0, "rkl": -1.0}  # f'(1), what `centered` takes out; zero for every other divergence


class Terms(NamedTuple):
    """Per-token values, all [M]."""

    loss: Tensor
    coef: Tensor  # d loss / d log-ratio, or d loss / d logprob where the loss sees no ratio
    above_start: Tensor  # loss minus its value at r = 1


def _exp_gap(p: Tensor, q: Tensor) -> Tensor:
    """e^p - e^q, without cancellation where p and q are close."""
    gap = p - q
    return torch.where(gap.abs() < 1, q.exp() * gap.expm1(), p.exp() - q.exp())


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
    # rise = log((1 + e^w) / (1 + e^-u)) and lag = d - rise, each from the log1p whose argument stays off -1
    down = (d < 0) & (u < 0)
    lift = torch.log1p(torch.where(down, (-d).expm1() * torch.sigmoid(u), d.expm1() * torch.sigmoid(-u)))
    rise, lag = torch.where(down, d + lift, lift), torch.where(down, -lift, d - lift)
    above = (d.expm1() * _js_slope(w) + lag - u.exp() * rise) / 2
    at_zero = loss - (_js_slope(-u) + u.exp() * _js_slope(u)) / 2
    return Terms(loss, r_slope / 2, torch.where(r == 0, at_zero, above))


def _hd(d: Tensor, u: Tensor) -> Terms:
    gap = _exp_gap(d / 2, u / 2)
    above = (d / 2).expm1() * (((d / 2).exp() + 1) / 2 - (u / 2).exp())
    return Terms(gap**2 / 2, (d / 2).exp() * gap / 2, above)


def _tv(d: Tensor, u: Tensor) -> Terms:
    gap, side, side_at_start = _exp_gap(d, u), (d - u).sign(), (-u).sign()
    above = torch.where(side == side_at_start, side * d.expm1(), side * gap + side_at_start * u.expm1())
    return Terms(gap.abs(), d.exp() * side, above)


def _kl(d: Tensor, u: Tensor) -> Terms:
    w, r = d - u, d.exp()
    return Terms(_times_ratio(r, w), _times_ratio(r, w + 1), _times_ratio(r, d) - u * d.expm1())


def _rkl(d: Tensor, u: Tensor) -> Terms:
    e_u = u.exp()
    return Terms(-e_u * d, -e_u, -e_u * d)


def _jf(d: Tensor, u: Tensor) -> Terms:
    w, r, gap = d - u, d.exp(), _exp_gap(d, u)
    return Terms(gap * w, _times_ratio(r, w) + gap, _times_ratio(r, d) - u * d.expm1() - u.exp() * d)


def _ps(d: Tensor, u: Tensor) -> Terms:
    above = d.expm1() + (2 * u).exp() * (-d).expm1()
    return Terms(_exp_gap(d / 2, u - d / 2) ** 2, _exp_gap(d, 2 * u - d), above)


def _pearson(d: Tensor, u: Tensor) -> Terms:
    above = (-u).exp() * (2 * d).expm1() - 2 * d.expm1()
    return Terms(_exp_gap(d - u / 2, u / 2) ** 2, 2 * _exp_gap(2 * d - u, d), above)


_LAD_TERMS = {"js": _js, "hd": _hd, "tv": _tv, "kl": _kl, "rkl": _rkl, "jf": _jf, "ps": _ps, "pearson": _pearson}


def lad_terms(divergence: str, log_ratio: Tensor, target: Tensor, *, centered: bool = False) -> Terms:
    """Terms of e^u f(r / e^u) for log_ratio d [M] and target u [M]; `centered` uses f(x) - f'(1) (x - 1)."""
    terms = _LAD_TERMS[divergence](log_ratio, target)
    if not centered or divergence not in SLOPE_AT_ONE:
        return terms
    slope, gap = SLOPE_AT_ONE[divergence], _exp_gap(log_ratio, target)
    r = log_ratio.exp()
    coef = _times_ratio(r, log_ratio - target) if divergence == "kl" else gap  # r w, r - e^u: no subtraction left
    return Terms(terms.loss - slope * gap, coef, terms.above_start - slope * log_ratio.expm1())


def grpo_terms(config: GRPOConfig, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> tuple[Terms, Tensor]:
    """Terms of PPO-clip, CISPO or REINFORCE, and which tokens are clipped; all [M].

    CISPO (arXiv 2506.13585, Eq. 4) and REINFORCE weigh log pi itself, so their coefficient is per log-probability.
    """
    a, r = advantages, log_ratio.exp()
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    if config.policy_loss == "reinforce":
        return Terms(-a * logprobs, -a, -a * log_ratio), torch.zeros_like(a, dtype=torch.bool)
    if config.policy_loss == "cispo":
        bounded = r.clamp(low, high)
        return Terms(-bounded * a * logprobs, -bounded * a, -bounded * a * log_ratio), r != bounded
    clipped = ((a > 0) & (r > high)) | ((a < 0) & (r < low))
    loss = torch.maximum(-a * r, -a * r.clamp(low, high))
    if config.dual_clip is not None:
        clipped |= (a < 0) & (r > config.dual_clip)
        loss = torch.where(a < 0, torch.minimum(loss, -a * config.dual_clip), loss)
    above = torch.where(clipped, loss + a, -a * log_ratio.expm1())
    return Terms(loss, torch.where(clipped, torch.zeros_like(a), -a * r), above), clipped
