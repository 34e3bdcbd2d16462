// S(s, c) = sin(s theta) / sin(theta), theta = arccos c, and its derivatives: the row mathematics of geodesic mixup.
#pragma once

#include <cmath>

#include "macros.h"

namespace iprm {

template <class T>
struct SlerpLimits;

template <>
struct SlerpLimits<float> {
  static constexpr float kAntipodeMargin = 1e-6f;  // c is clamped to at least -1 + this
  static constexpr int kSeriesTerms = 10;          // the next one is below half an ulp at h = kSeriesBelow
};

template <>
struct SlerpLimits<double> {
  static constexpr double kAntipodeMargin = 1e-12;
  static constexpr int kSeriesTerms = 20;
};

// Below this h = (1 - c) / 2 the closed form of dS/dc has lost three bits to cancellation, and its series is summed instead.
template <class T>
constexpr T kSeriesBelow = T(0.125);

// The angle between two unit vectors, from their inner product c.
template <class T>
struct Angle {
  T c;        // clamped to [-1 + margin, ...)
  T h;        // sin^2(theta / 2) = (1 - c) / 2, at least 0
  T theta;    // 2 atan2(sqrt h, sqrt(1 - h)): full relative accuracy for small angles, unlike arccos
  T sine;     // sin(theta) = 2 sqrt(h (1 - h))
  bool clamped;

  IPRM_INLINE explicit Angle(T inner) {
    const T floor = T(-1) + SlerpLimits<T>::kAntipodeMargin;
    clamped = inner <= floor;
    c = clamped ? floor : inner;
    const T below = (T(1) - c) / T(2);
    h = below < T(0) ? T(0) : below;  // rounding can put c above 1; a NaN stays
    const T k = (T(1) + c) / T(2);
    theta = T(2) * std::atan2(std::sqrt(h), std::sqrt(k));
    sine = T(2) * std::sqrt(h * k);
  }
};

// S(s, c) = sin(s theta) / sin(theta) and its derivatives, from one sine and one cosine.
template <class T>
struct SlerpWeight {
  T s;
  const Angle<T>& angle;
  T sine, cosine;  // of s theta

  IPRM_INLINE SlerpWeight(T s, const Angle<T>& angle)
      : s(s), angle(angle), sine(std::sin(s * angle.theta)), cosine(std::cos(s * angle.theta)) {}

  // S(s, c), which is s at c = 1
  IPRM_INLINE T value() const { return angle.h <= T(0) ? s : sine / angle.sine; }

  // dS/ds = theta cos(s theta) / sin(theta), which is 1 at c = 1
  IPRM_INLINE T ds() const { return angle.h <= T(0) ? T(1) : angle.theta * cosine / angle.sine; }

  // dS/dc, zero where c is clamped. The closed form cancels like theta^3 near c = 1; there it is -(s/2) sum n a_n h^(n-1)
  // with a_0 = 1, a_(n+1) = a_n ((n+1)^2 - s^2) / ((n+1)(n+3/2)), from S = s 2F1(1-s, 1+s; 3/2; h). Beyond s^2 h = 1, an arc of
  // 2 radians, nothing cancels and the series would alternate.
  IPRM_INLINE T dc() const {
    if (angle.clamped) return T(0);
    if (angle.h < kSeriesBelow<T> && s * s * angle.h < T(1)) {
      T sum = 0, a = 1, power = 1;
      for (int n = 1; n <= SlerpLimits<T>::kSeriesTerms; ++n) {
        a *= (T(n * n) - s * s) * (T(1) / (T(n) * (T(n) + T(0.5))));
        sum += T(n) * a * power;
        power *= angle.h;
      }
      return T(-0.5) * s * sum;
    }
    return (angle.c * sine - s * cosine * angle.sine) / (angle.sine * angle.sine * angle.sine);
  }
};

// 1 / max(norm, eps), and NaN for a norm that is not finite: such a row is NaN throughout.
template <class T>
IPRM_INLINE T inverse_norm(T norm, T eps) {
  if (!(norm - norm == T(0))) return norm - norm;  // infinite or NaN
  return T(1) / (norm > eps ? norm : eps);
}

// Below this c the two terms of z are over twice as long as z, which their rounding may then make longer than 1: rows there are
// measured, and shortened to it.
template <class T>
constexpr T kNearAntipode = T(-0.9);

// What the rows of z = p x^ + q y^ are made of: z = x * from_x + y * from_y.
template <class T>
struct MixCoefficients {
  T from_x, from_y;

  IPRM_INLINE MixCoefficients(T weight, T x_norm, T y_norm, T c, T eps) {
    const Angle<T> angle(c);
    from_x = SlerpWeight<T>(weight, angle).value() * inverse_norm(x_norm, eps);
    from_y = SlerpWeight<T>(T(1) - weight, angle).value() * inverse_norm(y_norm, eps);
  }
};

// A mixed row and its gradient from one angle: the coefficients first, then, with what comes back, those of the gradients.
template <class T>
struct MixRow {
  Angle<T> angle;
  SlerpWeight<T> of_x, of_y;
  T inv_x, inv_y;
  bool x_dead, y_dead;  // ||x|| <= eps: the gradient of that row is zero

  IPRM_INLINE MixRow(T w, T x_norm, T y_norm, T c, T eps)
      : angle(c),
        of_x(w, angle),
        of_y(T(1) - w, angle),
        inv_x(inverse_norm(x_norm, eps)),
        inv_y(inverse_norm(y_norm, eps)),
        x_dead(x_norm <= eps),
        y_dead(y_norm <= eps) {}
  MixRow(const MixRow&) = delete;  // its weights refer to its angle

  IPRM_INLINE T from_x() const { return of_x.value() * inv_x; }
  IPRM_INLINE T from_y() const { return of_y.value() * inv_y; }
};

// What the rows of the gradients are made of: dx = g * x_from_g + y * x_from_y + x * x_from_x, likewise dy, and dw.
template <class T>
struct MixGradient {
  T x_from_g, x_from_x, x_from_y;
  T y_from_g, y_from_x, y_from_y;
  T weight;

  // g_x = <g, x>, g_y = <g, y>, not yet divided by the norms; c not clamped
  IPRM_INLINE MixGradient(const MixRow<T>& row, T c, T g_x, T g_y) {
    const T gx = g_x * row.inv_x, gy = g_y * row.inv_y;
    const T p = row.of_x.value(), q = row.of_y.value();
    const T kappa = row.of_x.dc() * gx + row.of_y.dc() * gy;
    x_from_g = p * row.inv_x;
    x_from_y = kappa * row.inv_y * row.inv_x;
    x_from_x = -(p * gx + kappa * c) * row.inv_x * row.inv_x;
    y_from_g = q * row.inv_y;
    y_from_x = kappa * row.inv_x * row.inv_y;
    y_from_y = -(q * gy + kappa * c) * row.inv_y * row.inv_y;
    weight = gx * row.of_x.ds() - gy * row.of_y.ds();
  }
};

}  // namespace iprm
