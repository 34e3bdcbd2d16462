"""The mathematics of one row, shared by the kernels.

The formulas and their branches are those of `iprm_kernels.reference`. Sine, cosine and arc sine are implemented here, because
the range reduction of the GPU libraries keeps a table in local memory, and the interpreter has no arc functions.
Every series is nested, 1 + r₀x (1 + r₁x (1 + ...)), so that its coefficients are ratios of small integers.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .. import convention

FLOOR_32 = tl.constexpr(-1 + convention.ANTIPODE_MARGIN[torch.float32])
FLOOR_64 = tl.constexpr(-1 + convention.ANTIPODE_MARGIN[torch.float64])
#: The smallest 1 + c, rounded as 1 + FLOOR is.
LEAST_32 = tl.constexpr((1 + torch.tensor(-1 + convention.ANTIPODE_MARGIN[torch.float32], dtype=torch.float32)).item())
LEAST_64 = tl.constexpr(1 + (-1 + convention.ANTIPODE_MARGIN[torch.float64]))
NEAR_ANTIPODE = tl.constexpr(convention.NEAR_ANTIPODE)
SAVED_BELOW = tl.constexpr(convention.SAVED_BELOW)
SERIES_BELOW = tl.constexpr(convention.SERIES_BELOW)
SERIES_TERMS_32 = tl.constexpr(convention.SERIES_TERMS[torch.float32])
SERIES_TERMS_64 = tl.constexpr(convention.SERIES_TERMS[torch.float64])
LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to float32
LOG2_E_REST = tl.constexpr(math.log(2) * 1.925962991126617e-08)  # ln 2 (log2(e) - LOG2_E)
LN_2 = tl.constexpr(math.log(2))
#: |d| below which the series of φ is used. In float32 the limit is wider than in the reference, which uses expm1 beyond it:
#: P d + (Q - P) multiplies the errors of P and Q by up to 21 at d = -0.5, and by 7 at d = -1.
EXCESS_SERIES_BELOW_32 = tl.constexpr(1.0)
EXCESS_SERIES_BELOW_64 = tl.constexpr(convention.EXCESS_SERIES_BELOW)
EXCESS_SERIES_TERMS_32 = tl.constexpr(10)  # the first term left out is 4e-9 of the sum
EXCESS_SERIES_TERMS_64 = tl.constexpr(convention.EXCESS_SERIES_TERMS[torch.float64])


# geodesic


@triton.jit
def square_root(x):
    """√x rounded to nearest; the plain square root of float32 is an approximation on NVIDIA."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """x / y rounded to nearest: the plain quotient of float32 is an approximation on NVIDIA, where x / x may not be 1."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def divisor(norm, EPS: tl.constexpr):
    """max(‖x‖, eps), and NaN for a norm that is not finite, so that the whole row becomes NaN."""
    eps = tl.full(norm.shape, EPS, norm.dtype)  # a comparison with a bare constant would round it to float32
    return tl.where(norm < float("inf"), tl.where(norm < eps, eps, norm), float("nan"))


@triton.jit
def cosine(r_xx, r_yy, r_xy, EPS: tl.constexpr):
    """⟨x̂, ŷ⟩ from the inner products, in float64: rounded norms would cost two ulps, which at obtuse angles the gradients
    multiply by ten. For equal rows the result is exactly 1."""
    lengths = divisor(tl.sqrt(r_xx.to(tl.float64)), EPS) * divisor(tl.sqrt(r_yy.to(tl.float64)), EPS)
    return (r_xy.to(tl.float64) / lengths).to(r_xy.dtype)


@triton.jit
def saved_cosine(r_c, r_uu, r_x_norm, r_y_norm, EPS: tl.constexpr):
    """c as the statistics hold it, below NEAR_ANTIPODE -1 / (1 + c), from c and ‖x̂ + ŷ‖²; a dead row is no unit vector."""
    eps = tl.full(r_c.shape, EPS, r_c.dtype)
    gap = tl.where((r_x_norm > eps) & (r_y_norm > eps), 0.5 * r_uu, 1 + r_c)
    return tl.where(r_c < NEAR_ANTIPODE, -1 / tl.where(gap > 0, gap, 0.0), r_c)


@triton.jit
def live_inverse_norm(norm, EPS: tl.constexpr):
    """1 / ‖x‖ as the gradient uses it: zero for a dead row, ‖x‖ <= eps."""
    return tl.where(norm <= tl.full(norm.shape, EPS, norm.dtype), 0.0, 1 / divisor(norm, EPS))


@triton.jit
def scale_rows(b, r_factor):
    """Rows times one factor each, exactly zero where the factor is zero: the gradient of a dead row is zero even if `b` is not
    finite."""
    return tl.where(r_factor[:, None] == 0, 0.0, b * r_factor[:, None])


@triton.jit
def angle(h, k):
    """θ in [0, π] from h = sin²(θ/2) and k = cos²(θ/2), to full relative accuracy.

    With m the smaller of the two, θ or π - θ is 2 asin √m = 4 asin √v, where v = m / (2 + 2√(1-m)) <= 0.1465 belongs to
    the half angle. asin(√v) / √v is a series in v with ratios (2n+1)² / ((2n+2)(2n+3)): the first term left out is 2.5e-9 of
    the sum after 8 terms and 3.4e-18 after 18.
    """
    TERMS: tl.constexpr = 18 if h.dtype == tl.float64 else 8
    v = tl.where(h < k, h, k) / (2 + 2 * square_root(tl.where(h < k, k, h)))
    series = tl.full(v.shape, 1.0, v.dtype)
    for n in tl.static_range(TERMS - 2, -1, -1):
        series = 1 + v * ((2 * n + 1) * (2 * n + 1) / ((2 * n + 2) * (2 * n + 3))) * series
    nearest = 4 * square_root(v) * series
    PI_REST: tl.constexpr = 1.2246467991473532e-16 if h.dtype == tl.float64 else -8.742278000372485e-08  # π - fl(π)
    return tl.where(h < k, nearest, 3.141592653589793 - (nearest - PI_REST))


@triton.jit
def sine_cosine(a):
    """sin a and cos a, as accurate as `a` itself: the error of reduction stays below half an ulp of `a`.

    a = n π/2 + r with π/2 in three parts, the first short enough for its products with n to be exact (n < 2¹⁵ in float32,
    2²⁰ in float64), then Taylor series to r¹¹ in float32 and r¹⁷ in float64, whose next terms are below 1e-10 and 1e-17.
    """
    n = tl.floor(a * 0.6366197723675814 + 0.5)
    TERMS: tl.constexpr = 9 if a.dtype == tl.float64 else 6
    if a.dtype == tl.float64:
        r = ((a - n * 1.5707963267341256) - n * 6.077100506303966e-11) - n * 2.0222662487959506e-21
    else:
        r = ((a - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    r_sine = tl.full(a.shape, 1.0, a.dtype)
    r_cosine = tl.full(a.shape, 1.0, a.dtype)
    for i in tl.static_range(TERMS - 1, 0, -1):
        r_sine = 1 - r * r * (1 / (2 * i * (2 * i + 1))) * r_sine
        r_cosine = 1 - r * r * (1 / (2 * i * (2 * i - 1))) * r_cosine
    r_sine = r * r_sine
    quadrant = n - 4 * tl.floor(n * 0.25)  # 0, 1, 2 or 3
    odd = (quadrant == 1) | (quadrant == 3)
    sine = tl.where(odd, r_cosine, r_sine)
    cosine = tl.where(odd, r_sine, r_cosine)
    return tl.where(quadrant >= 2, -sine, sine), tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)


@triton.jit
def gap_of(saved):
    """1 + c and c from the saved c, both clamped, and whether they are."""
    FLOOR: tl.constexpr = FLOOR_64 if saved.dtype == tl.float64 else FLOOR_32
    LEAST: tl.constexpr = LEAST_64 if saved.dtype == tl.float64 else LEAST_32
    floor = tl.full(saved.shape, FLOOR, saved.dtype)
    least = tl.full(saved.shape, LEAST, saved.dtype)
    near = saved < SAVED_BELOW
    gap = tl.where(near, -1 / saved, 1 + saved)
    is_clamped = gap <= least
    return tl.where(is_clamped, least, gap), is_clamped, tl.where(is_clamped, floor, tl.where(near, gap - 1, saved))


@triton.jit
def slerp(s, saved, STRENGTH: tl.constexpr = False):
    """S(s, c) = sin(sθ) / sin θ, ∂S/∂s and ∂S/∂c, analytic at c = 1, from the saved c.  (BLOCK_B,) x2 -> (BLOCK_B,) x3

    STRENGTH: s is known to be in [0, 1]. The compiler removes results that the caller does not use. Comparisons are written so
    that a NaN passes through them.
    """
    TERMS: tl.constexpr = SERIES_TERMS_64 if saved.dtype == tl.float64 else SERIES_TERMS_32
    gap, is_clamped, clamped = gap_of(saved)
    h = (1 - clamped) * 0.5
    h = tl.where(h < 0, 0.0, h)
    k = gap * 0.5
    theta = angle(h, k)
    sine, cosine = sine_cosine(s * theta)
    at_one = h <= 0
    sine_theta = tl.where(at_one, 1.0, 2 * square_root(h * k))
    value = tl.where(at_one, s, sine / sine_theta)
    ds = tl.where(at_one, cosine, theta * cosine / sine_theta)  # cos(s·0) is 1 unless s is not finite
    # ∂S/∂c: near c = 1 the closed form cancels like θ³, and the series of the reference takes its place
    closed = (clamped * sine - s * cosine * sine_theta) / (sine_theta * sine_theta * sine_theta)
    a = tl.full(h.shape, 1.0, h.dtype)
    if STRENGTH:
        power = tl.full(h.shape, 1.0, h.dtype)
        series = tl.zeros(h.shape, h.dtype)
        for n in tl.static_range(TERMS):
            a = a * ((n + 1) * (n + 1) - s * s) * (1 / ((n + 1) * (n + 1.5)))
            series = series + (n + 1) * a * power
            power = power * h
        dc = tl.where((h < SERIES_BELOW) & (s * s * h < 1), -0.5 * s * series, closed)
    else:
        # The last coefficient grows like a power of s² and does not overflow up to LARGEST. For larger s² the closed form is
        # used, which then loses at most two digits, except at h = 0, where the first term is all. The smallest h above zero
        # is 2⁻²⁵ in float32, 2⁻⁵⁴ in float64. In the head step, where s is in [0, 1], this extra code spilled registers.
        LARGEST: tl.constexpr = 2.0**54 if saved.dtype == tl.float64 else 2.0**18
        squared = tl.minimum(s * s, LARGEST)
        reach = squared * h + (s * s - squared) * (h * 2.0**60)
        power = h
        series = tl.full(h.shape, 1.0, h.dtype)
        for n in tl.static_range(1, TERMS):
            a = a * ((n + 1) * (n + 1) - squared) * (1 / ((n + 1) * (n + 1.5)))
            series = series + (n + 1) * a * power
            power = power * h
        dc = tl.where((h < SERIES_BELOW) & (reach < 1), (s * s - 1) * (s / 3) * series, closed)
    return value, ds, tl.where(is_clamped, 0.0, dc)


@triton.jit
def no_longer_than_one(r_zz, r_c):
    """Near the antipode, the factor that shortens a row with ‖z‖² = r_zz to length 1; elsewhere 1."""
    return tl.where((r_c < NEAR_ANTIPODE) & (r_zz > 1), 1 / square_root(r_zz), 1.0)


# divergence


@triton.jit
def exponential(x):
    """exp(x) of x <= 0 as accurate as the hardware's 2ᵗ, whose error NVIDIA gives as at most 2 ulp.

    The plain exponential of float32 is 2ᵗ of t = x log2(e), rounded, which costs |t| / 3 ulp more. Here
    exp(x) = 2ᵗ (1 + s) with s = ln 2 (x log2(e) - t), from the rounding error of the product and that of the constant.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)  # for -∞ the rounding error would be NaN; exp(-200) is 0
    t = x * LOG2_E
    s = tl.fma(tl.fma(x, LOG2_E, -t), LN_2, x * LOG2_E_REST)
    return tl.fma(tl.exp2(t), s, tl.exp2(t))


@triton.jit
def softmax_parts(b):
    """max and Σ exp(b - max) of rows."""
    r_top = tl.max(b, axis=1)
    return r_top, tl.sum(exponential(b - r_top[:, None]), axis=1)


@triton.jit
def excess(d):
    """φ(d) = d + exp(-d) - 1 of close rows, |d| < EXCESS_SERIES_BELOW, as d²/2 (1 - d/3 (1 - d/4 (1 - ...)))."""
    TERMS: tl.constexpr = EXCESS_SERIES_TERMS_64 if d.dtype == tl.float64 else EXCESS_SERIES_TERMS_32
    series = tl.full(d.shape, 1.0, d.dtype)
    for n in tl.static_range(TERMS + 1, 2, -1):
        series = 1 - d * (1 / n) * series
    return 0.5 * d * d * series


@triton.jit
def difference(x, y):
    """x - y rounded, and its rounding error (Knuth's two-sum), which is zero where it would not be finite."""
    high = x - y
    back = high - x
    rest = (x - (high - back)) - (y + back)
    return high, tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def probabilities(b_p, b_q, r_p_top, r_p_sum, r_q_top, r_q_sum):
    """P, Q, d = log P - log Q, and whether d is so small that Q - P and P φ(d) need the series."""
    a, a_rest = difference(b_p, r_p_top[:, None])
    b, b_rest = difference(b_q, r_q_top[:, None])
    d = (a - b) + (a_rest - b_rest) - tl.log(quotient(r_p_sum, r_q_sum))[:, None]
    # products with 1 / sum: a quotient per element costs more instructions and is no more accurate on NVIDIA
    p_prob = exponential(a) * (1 / r_p_sum)[:, None]
    q_prob = exponential(b) * (1 / r_q_sum)[:, None]
    BELOW: tl.constexpr = EXCESS_SERIES_BELOW_64 if d.dtype == tl.float64 else EXCESS_SERIES_BELOW_32
    return p_prob, q_prob, d, tl.abs(d) < BELOW
