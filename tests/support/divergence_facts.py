"""Facts derived by hand for each divergence: all that the tests need of a new one. Shapes: everything is [M]."""

from __future__ import annotations

import torch
from torch import Tensor

# c = r f'(x) of log-ratio d and target u, with r = e^d and x = e^(d - u)
COEFFICIENT = {
    "js": lambda d, u: d.exp() / 2 * (2 / (1 + (u - d).exp())).log(),
    "hd": lambda d, u: d.exp() / 2 * (1 - ((u - d) / 2).exp()),
    "tv": lambda d, u: d.exp() * (d - u).sign(),
    "kl": lambda d, u: d.exp() * (d - u + 1),
    "rkl": lambda d, u: -u.exp(),
    "jf": lambda d, u: d.exp() * (d - u + 1 - (u - d).exp()),
    "ps": lambda d, u: d.exp() * (1 - (2 * u - 2 * d).exp()),
    "pearson": lambda d, u: 2 * d.exp() * ((d - u).exp() - 1),
}

# c at r = 0 where it is not 0
COEFFICIENT_AT_ZERO = {
    "rkl": lambda u: -u.exp(),
    "jf": lambda u: -u.exp(),
    "ps": lambda u: torch.full_like(u, -torch.inf),
}


def summands_above_start(divergence: str, d: Tensor, u: Tensor) -> Tensor:
    """Sizes of the summands in the closed form of loss(d, u) - loss(0, u): all of first order in d."""
    r, eu, w, e1 = d.exp(), u.exp(), d - u, d.expm1()
    apart = (w >= 0) != (u <= 0)
    return {
        "js": e1.abs() * (1 + w.abs()) + d.abs(),
        "hd": (d / 2).expm1().abs() * ((d / 2).exp() + 1 + (u / 2).exp()),
        "tv": e1.abs() + apart * u.expm1().abs(),
        "kl": (u * e1).abs() + (r * d).abs() + e1.abs(),
        "rkl": eu * d.abs() + e1.abs(),
        "jf": (u * e1).abs() + (r * d).abs() + (eu * d).abs(),
        "ps": e1.abs() + (2 * u).exp() * (-d).expm1().abs(),
        "pearson": e1.abs() * ((-u).exp() * e1.abs() + 2 * (-u).expm1().abs()),
    }[divergence]


# A bug in the coefficient: a piece of lad_kernels/objective/divergences.py that occurs once, and what replaces it
MUTANT = {
    "js": ("return Terms(loss, r_slope / 2,", "return Terms(loss, r_slope,"),
    "hd": ("_exp_gap(d, (d + u) / 2) / 2, step", "_exp_gap(d, (d + u) / 2), step"),
    "tv": ("gap.abs(), d.exp() * side", "gap.abs(), side"),
    "kl": ("_times_ratio(r, w + 1)", "_times_ratio(r, w)"),
    "rkl": ("Terms(-e_u * d, -e_u,", "Terms(-e_u * d, e_u,"),
    "jf": ("_times_ratio(r, w) + gap", "_times_ratio(r, w) - gap"),
    "ps": ("_exp_gap(d, 2 * u - d), above", "_exp_gap(d, u), above"),
    "pearson": ("2 * _exp_gap(2 * d - u, d)", "_exp_gap(2 * d - u, d)"),
}
