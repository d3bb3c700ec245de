"""One token in Triton: elementary functions without cancellation, and the terms of every objective.

With d = log r (per token, or per sequence at the sequence levels), u = A / eta and w = d - u = log x, the loss is
e^u f(x) and c = d loss / d d = r f'(x), both from d and u alone, in forms that neither cancel near x = 1 nor overflow
before the result does: r - e^u is sign(w) e^max(d, u) (1 - e^-|w|). expm1 and log1p, which the interpreter lacks, are
written here.

Shapes: every argument and result is [BLOCK]; eta, bounds and other settings are [].

Exact where the value at d = 0 is 0; the rest to a few ulp of float32, beyond the rounding of d and u themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exps(x):
    """e^x, e^x - 1 and e^x - 1 - x, none by cancellation: x = n ln 2 + t, Taylor in t."""
    x = tl.where(x > 88.8, 88.8, x)  # e^88.8 is inf, e^-105 is 0; NaN stays NaN
    y = tl.where(x < -105.0, -105.0, x)
    n = tl.minimum(tl.floor(y * 1.4426950408889634 + 0.5), 127.0)
    t = (y - n * 0.693359375) - n * -2.12194440054690583e-4  # n * 355/512 is exact
    q = 1 / 120 + t * (1 / 720 + t * (1 / 5040 + t * (1 / 40320 + t * (1 / 362880))))
    q = t * t * (0.5 + t * (1 / 6 + t * (1 / 24 + t * q)))  # e^t - 1 - t
    p = tl.exp2(n)
    return p * (1.0 + (t + q)), p * (t + q) + (p - 1.0), p * q + ((p * t + (p - 1.0)) - x)


@triton.jit
def _exp(x):
    return _exps(x)[0]


@triton.jit
def _expm1(x):
    return _exps(x)[1]


@triton.jit
def _log1p(x):
    """log(1 + x) by Kahan's quotient: log(y) / (y - 1) varies slowly, so the rounding of y = 1 + x does no harm."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _minus(a, b):
    """a - b, exactly 0 where they are equal, also at -inf."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def _js(d, u, r, e1):
    """Jensen-Shannon: loss 1/2 [r g - e^u m], m = softplus(w) - ln 2, g = w - m; by hyperbolic functions near w = 0."""
    w, eu, near = d - u, _exp(u), tl.abs(d - u) < 1.0
    a = tl.where(near, 0.5 * w, 0.0)
    e = _expm1(0.5 * a)
    half_sinh = 0.5 * (e + e / (1.0 + e))  # sinh(a / 2)
    sinh, cosh_m1 = 2.0 * half_sinh * (1.0 + e - half_sinh), 2.0 * half_sinh * half_sinh
    log_cosh = _log1p(cosh_m1)
    tail_w = _log1p(_exp(-tl.abs(w)))
    g = tl.where(near, a - log_cosh, LN2 + tl.minimum(w, 0.0) - tail_w)  # ln(2x / (x + 1))
    far = 0.5 * (r * g - eu * (tl.maximum(w, 0.0) + tail_w - LN2))
    loss = tl.where(near, _exp(0.5 * (d + u)) * (a * sinh - (1.0 + cosh_m1) * log_cosh), far)
    linear = tl.where((w > 0.0) & (u < 0.0), d, tl.maximum(w, 0.0) - tl.maximum(-u, 0.0))
    tail_u = _log1p(_exp(-tl.abs(u)))
    step = linear + tail_w - tail_u  # m(w) - m(-u)
    step = tl.where(tl.abs(d) < 1.0, _log1p(tl.where(tl.abs(d) < 1.0, e1, 0.0) / (1.0 + eu)), step)
    lost = tl.where((w < -17.0) & (u > 17.0), e1, eu * step)  # e^u step
    low = r * g - (LN2 + tl.minimum(-u, 0.0) - tail_u) - lost  # where e1 g + d nearly cancels
    return loss, 0.5 * r * g, 0.5 * tl.where(d < -1.0, low, e1 * g + d - lost - step)


@triton.jit
def _kl_moved(d, u, r, e1):
    """r d - u (r - 1), what r (d - u) has moved since r = 1; d is finite."""
    return tl.where(d > 1.0, r * (d - u) + u, r * d - u * e1)


@triton.jit
def _lad_term(d, u, OBJECTIVE: tl.constexpr, CENTERED: tl.constexpr):
    """Loss, c = d loss / d d and loss(d, u) - loss(0, u) of one divergence; no term cancels at d = 0."""
    w = d - u
    r, e1, _ = _exps(d)
    finite = tl.where(d < -104.0, -104.0, d)  # r is 0 there already: r d must not be 0 * inf
    sign = tl.where(w > 0.0, 1.0, tl.where(w < 0.0, -1.0, 0.0))
    gap = -_expm1(-tl.abs(w))  # 1 - e^-|w|
    difference = sign * _exp(tl.maximum(d, u)) * gap  # r - e^u
    if OBJECTIVE == "js":
        loss, c, above = _js(finite, u, r, e1)
    elif OBJECTIVE == "hd":
        root_difference = sign * _exp(0.5 * tl.maximum(d, u)) * -_expm1(-0.5 * tl.abs(w))
        loss = 0.5 * root_difference * root_difference
        c = 0.5 * sign * _exp(0.5 * (d + tl.maximum(d, u))) * -_expm1(-0.5 * tl.abs(w))
        grown = _expm1(0.5 * d)
        above = grown * (0.5 * grown - _expm1(0.5 * u))
    elif OBJECTIVE == "tv":
        loss, c = tl.abs(difference), r * sign
        side = tl.where(w >= 0.0, 1.0, -1.0)
        above = side * (e1 - tl.where((w >= 0.0) == (u <= 0.0), 0.0, 2.0 * _expm1(u)))
    elif OBJECTIVE == "kl":
        loss, c = r * (finite - u), r * (finite - u + 1.0)
        above = _kl_moved(finite, u, r, e1)
        if CENTERED:
            loss = tl.where(w > 1.0, r * (w - 1.0) + _exp(u), loss - difference)
            c, above = r * (finite - u), _kl_moved(finite, u + 1.0, r, e1)
    elif OBJECTIVE == "rkl":
        loss, c, above = -_exp(u) * d, -_exp(u) + tl.zeros_like(d), -_exp(u) * d
        if CENTERED:
            loss, c, above = loss + difference, difference, above + e1
    elif OBJECTIVE == "jf":
        loss, c = difference * w, r * (finite - u) + difference
        above = _kl_moved(finite, u, r, e1) - _exp(u) * d
    elif OBJECTIVE == "ps":
        larger = _exp(u + tl.abs(w))
        loss, c = larger * gap * gap, sign * larger * -_expm1(-2.0 * tl.abs(w))
        over = _expm1(2.0 * u - d)
        above = tl.where(over == 0.0, 0.0, -e1 * over)  # r - 1 + e^2u (1 / r - 1)
    else:
        tl.static_assert(OBJECTIVE == "pearson", "unknown divergence")
        loss = _exp(u + 2.0 * tl.maximum(w, 0.0)) * gap * gap
        c = 2.0 * sign * _exp(d + tl.maximum(w, 0.0)) * gap
        above = e1 * (_exp(-u) * e1 + 2.0 * _expm1(-u))
    return loss, c, tl.where(d == 0.0, 0.0, above)


@triton.jit
def _clip(d, u, low, high, OBJECTIVE: tl.constexpr, CENTERED: tl.constexpr):
    """The log ratio, put on a bound where it is beyond it and c would move it further out; and where that is."""
    turn = u  # the log ratio at which c changes sign: negative below, positive above
    if OBJECTIVE == "kl" and not CENTERED:
        turn = u - 1.0
    if OBJECTIVE == "rkl" and not CENTERED:
        turn = tl.zeros_like(u) + float("inf")
    bound = tl.minimum(tl.maximum(d, low), high)
    beyond = (d - bound) * (turn - d) > 0.0  # of one sign: past the bound, and pushed on; False for NaN and inf - inf
    return tl.where(beyond, bound, d), beyond


@triton.jit
def _sapo(d, adv, settings):
    """Sigmoid gate: d / dr of sigmoid(x) 4 / tau, x = tau (r - 1), is 4 sigmoid(x) (1 - sigmoid(x)), 1 at r = 1."""
    tau = tl.where(adv > 0.0, settings[0], settings[1])
    x = tau * _expm1(d)
    e, gap = _exp(-tl.abs(x)), -_expm1(-tl.abs(x))
    gate = tl.where(x > 0.0, 1.0, e) / (1.0 + e)  # sigmoid(x)
    tanh = tl.where(x > 0.0, gap, -gap) / (1.0 + e)  # of x / 2
    slope = 4.0 * _exp(d - tl.abs(x)) / ((1.0 + e) * (1.0 + e))  # r d / dr, without inf * 0
    return -adv * gate * (4.0 / tau), -adv * slope, -adv * tanh * (2.0 / tau), d != d


@triton.jit
def _vespo(logp, d, own, adv, settings):
    """A weight r^k e^(lambda (1 - r)) on log pi."""
    k_pos, rate_pos, k_neg, rate_neg = settings
    k, rate = tl.where(adv >= 0.0, k_pos, k_neg), tl.where(adv >= 0.0, rate_pos, rate_neg)
    c = -adv * _exp(k * d - rate * _expm1(d))
    return c * logp, c, c * own, d != d


@triton.jit
def _grpo_term(logp, d, own, adv, settings, OBJECTIVE: tl.constexpr):
    """Loss, c, loss minus its value at r = 1 (of log pi's own weights: c times what has moved), where r is clipped."""
    if OBJECTIVE == "sapo":
        return _sapo(d, adv, settings)
    if OBJECTIVE == "vespo":
        return _vespo(logp, d, own, adv, settings)
    eps_low, eps_high, dual_clip, _ = settings
    r = _exp(d)
    bounded = tl.minimum(tl.maximum(r, 1.0 - eps_low), 1.0 + eps_high)
    if OBJECTIVE == "ppo":
        clipped = ((adv > 0.0) & (r > 1.0 + eps_high)) | ((adv < 0.0) & ((r < 1.0 - eps_low) | (r > dual_clip)))
        loss = tl.maximum(-adv * r, -adv * bounded)
        loss = tl.where(adv < 0.0, tl.minimum(loss, -adv * dual_clip), loss)
        c = tl.where(clipped, 0.0, -adv * r)
        above = tl.where(clipped, loss + adv, -adv * _expm1(d))
    else:
        c = -adv * bounded if OBJECTIVE == "cispo" else -adv
        clipped = r != bounded if OBJECTIVE == "cispo" else r < 0.0
        loss = c * logp
        above = c * d
    return loss, c, above, clipped


@triton.jit
def _policy_term(
    logp,
    d,
    own,
    adv,
    shift,
    ratio_clamp,
    settings,
    OBJECTIVE: tl.constexpr,
    CENTERED: tl.constexpr,
    CLIPS: tl.constexpr,  # whether a ratio can be clipped
):
    """Log ratio as used, loss, c, where the clamp stops the gradient, loss above start, x > 1, clipped, clamped.

    d is the log ratio of the level, own that of the token. settings are the objective's own: eta, target_clamp and the
    bounds on the log ratio of LAD; eps_low, eps_high, dual_clip of PPO and CISPO; both tau of SAPO; k and lambda where
    A >= 0, then elsewhere, of VESPO.
    """
    stopped = tl.abs(d) > ratio_clamp
    clamped = stopped
    d = tl.where(stopped, tl.where(d > 0.0, ratio_clamp, -ratio_clamp), d)
    direct: tl.constexpr = OBJECTIVE == "cispo" or OBJECTIVE == "reinforce" or OBJECTIVE == "vespo"
    if direct or OBJECTIVE == "ppo" or OBJECTIVE == "sapo":
        loss, c, above, clipped = _grpo_term(logp, d, own, adv, settings, OBJECTIVE)
        over = tl.zeros_like(d) > 0.0
        if direct:
            stopped = tl.zeros_like(d) > 0.0  # c multiplies logp itself, not the ratio
    else:
        eta, target_clamp, low, high = settings
        u = adv / eta - shift
        beyond = tl.abs(u) > target_clamp
        u = tl.where(beyond, tl.where(u > 0.0, target_clamp, -target_clamp), u)
        clamped = clamped | beyond
        inside, clipped = d, tl.zeros_like(d) > 0.0
        if CLIPS:
            inside, clipped = _clip(d, u, low, high, OBJECTIVE, CENTERED)
        loss, c, above = _lad_term(inside, u, OBJECTIVE, CENTERED)
        c, over = tl.where(clipped, 0.0, c), d > u
    return d, loss, c, stopped, above, over, clipped, clamped
