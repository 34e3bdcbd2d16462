// S(s, c) = sin(s theta) / sin(theta), theta = arccos c, and its derivatives: the row mathematics of geodesic mixup, for one row
// (device) or a vector of them (CPU). Included inside the namespace that uses it, behind its square_root(V), once for every
// instruction set on the CPU, so it has no include guard. T is the arithmetic type, V is T or a vector of T; a comparison of
// two V selects by ?:, and a NaN passes through every comparison. tests/iprm_kernels/test_convention.py compares the constants
// here with those of iprm_kernels/convention.py.

// The smallest norm that features are divided by in the head step.
constexpr double kEps = 1e-12;

template <class T>
struct SlerpLimits;

template <>
struct SlerpLimits<float> {
  static constexpr float kAntipodeMargin = 1e-6f;  // c is clamped to at least -1 + this
  static constexpr int kSeriesTerms = 10;          // the next one is below half an ulp at h = kSeriesBelow
  static constexpr int kAngleTerms = 8;            // of asin; the next term is 2.5e-9 of the sum
  static constexpr int kSineTerms = 6;             // to r^11; the next one is below 1e-10
  static constexpr float kPiRest = -8.742278000372485e-08f;  // pi less pi as a float
  // pi/2 in three parts, the first short enough for exact products with n < 2^15
  static constexpr float kHalfPiHigh = 1.5703125f, kHalfPiMiddle = 4.837512969970703125e-4f, kHalfPiLow = 7.54978995489188216e-8f;
  static constexpr float kRound = 12582912.0f;  // adding and subtracting it rounds to the nearest integer
};

template <>
struct SlerpLimits<double> {
  static constexpr double kAntipodeMargin = 1e-12;
  static constexpr int kSeriesTerms = 20;
  static constexpr int kAngleTerms = 18;
  static constexpr int kSineTerms = 9;
  static constexpr double kPiRest = 1.2246467991473532e-16;
  static constexpr double kHalfPiHigh = 1.5707963267341256, kHalfPiMiddle = 6.077100506303966e-11, kHalfPiLow = 2.0222662487959506e-21;
  static constexpr double kRound = 6755399441055744.0;
};

// Below this h = (1 - c) / 2 the closed form of dS/dc has lost three bits to cancellation, and its series is summed instead.
template <class T>
constexpr T kSeriesBelow = T(0.125);

// theta in [0, pi] from h = sin^2(theta / 2) and k = cos^2(theta / 2), to full relative accuracy. With m the smaller of the two,
// theta or pi - theta is 2 asin sqrt(m) = 4 asin sqrt(v), where v = m / (2 + 2 sqrt(1-m)) <= 0.1465 belongs to the half
// angle, and asin(sqrt v) / sqrt v is a series in v with ratios (2n+1)^2 / ((2n+2)(2n+3)).
template <class T, class V>
IPRM_INLINE V angle_of(V h, V k) {
  const V smaller = h < k ? h : k, larger = h < k ? k : h;
  const V v = smaller / (T(2) + T(2) * square_root(larger));
  V series = V{} + T(1);
  IPRM_UNROLL for (int n = SlerpLimits<T>::kAngleTerms - 2; n >= 0; --n)
    series = T(1) + v * (T((2 * n + 1) * (2 * n + 1)) / T((2 * n + 2) * (2 * n + 3))) * series;
  const V nearest = T(4) * square_root(v) * series;
  return h < k ? nearest : T(3.14159265358979323846) - (nearest - SlerpLimits<T>::kPiRest);
}

// sin a and cos a, as accurate as a itself: a = n pi/2 + r, Taylor series in r, and the quadrant.
template <class T, class V>
IPRM_INLINE void sine_cosine(V a, V* sine, V* cosine) {
  constexpr T kRound = SlerpLimits<T>::kRound, kMost = T(0.8);
  const V n = (a * T(0.63661977236758134308) + kRound) - kRound;
  V r = ((a - n * SlerpLimits<T>::kHalfPiHigh) - n * SlerpLimits<T>::kHalfPiMiddle) - n * SlerpLimits<T>::kHalfPiLow;
  r = r > kMost ? V{} + kMost : r;  // for an angle so long that no digit of r is known, the result is at least a sine
  r = r < -kMost ? V{} - kMost : r;
  const V square = r * r;
  V of_sine = V{} + T(1), of_cosine = V{} + T(1);
  IPRM_UNROLL for (int i = SlerpLimits<T>::kSineTerms - 1; i > 0; --i) {
    of_sine = T(1) - square * (T(1) / T(2 * i * (2 * i + 1))) * of_sine;
    of_cosine = T(1) - square * (T(1) / T(2 * i * (2 * i - 1))) * of_cosine;
  }
  of_sine = r * of_sine;
  const V whole_turns = ((n * T(0.25) - T(0.375)) + kRound) - kRound;  // n / 4 rounded down
  const V quadrant = n - T(4) * whole_turns;
  const auto odd = (quadrant == T(1)) | (quadrant == T(3));
  const V s = odd ? of_cosine : of_sine, c = odd ? of_sine : of_cosine;
  *sine = quadrant >= T(2) ? -s : s;
  *cosine = (quadrant == T(1)) | (quadrant == T(2)) ? -c : c;
}

// Below this c the two terms of z are over twice as long as z, and their rounding may make z longer than 1: such rows are measured
// and shortened to length 1.
template <class T>
constexpr T kNearAntipode = T(-0.9);

// What is saved of c: c itself, or near the antipode -1 / (1 + c), at most -10. In float32 a c near -1 has few digits of 1 + c,
// which the angle depends on: two at 179.9 degrees.
template <class T>
IPRM_INLINE T saved_cosine(T c, T gap) {
  return c < kNearAntipode<T> ? T(-1) / (gap > T(0) ? gap : T(0)) : c;  // rounding can put 1 + c below 0
}

// The angle between two unit vectors, from the saved c.
template <class T, class V>
struct Angle {
  using Mask = decltype(V{} < V{});
  V c;      // clamped to [-1 + margin, ...)
  V h;      // sin^2(theta / 2) = (1 - c) / 2, at least 0
  V theta;
  V sine;   // sin(theta) = 2 sqrt(h (1 - h)), and 1 at c = 1
  Mask clamped, at_one;

  IPRM_INLINE explicit Angle(V saved) {
    constexpr T kFloor = T(-1) + SlerpLimits<T>::kAntipodeMargin, kLeast = T(1) + kFloor;
    const Mask near = saved < T(-2);
    const V gap = near ? T(-1) / saved : T(1) + saved;  // 1 + c
    clamped = gap <= kLeast;
    c = near ? gap - T(1) : saved;
    c = clamped ? V{} + kFloor : c;
    const V below = (T(1) - c) * T(0.5);
    h = below < T(0) ? V{} : below;  // rounding can put c above 1
    const V k = (clamped ? V{} + kLeast : gap) * T(0.5);
    theta = angle_of<T>(h, k);
    at_one = h <= T(0);
    sine = at_one ? V{} + T(1) : T(2) * square_root(h * k);
  }
};

// S(s, c) = sin(s theta) / sin(theta) and its derivatives, from one sine and one cosine.
template <class T, class V>
struct SlerpWeight {
  V s, sine, cosine;  // sine and cosine of s theta

  IPRM_INLINE SlerpWeight(V s, const Angle<T, V>& angle) : s(s) { sine_cosine<T>(s * angle.theta, &sine, &cosine); }

  // S(s, c), which is s at c = 1
  IPRM_INLINE V value(const Angle<T, V>& angle) const { return angle.at_one ? s : sine / angle.sine; }

  // dS/ds = theta cos(s theta) / sin(theta), at c = 1 its limit cos(s 0), which is 1 unless s is not finite
  IPRM_INLINE V ds(const Angle<T, V>& angle) const { return angle.at_one ? cosine : angle.theta * cosine / angle.sine; }

  // dS/dc, zero where c is clamped. The closed form cancels like theta^3 near c = 1; there it is -(s/2) sum n a_n h^(n-1)
  // with a_0 = 1, a_(n+1) = a_n ((n+1)^2 - s^2) / ((n+1)(n+3/2)), from S = s 2F1(1-s, 1+s; 3/2; h). Beyond s^2 h = 1, an arc of
  // 2 radians, nothing cancels and the series would alternate.
  IPRM_INLINE V dc(const Angle<T, V>& angle) const {
    const V closed = (angle.c * sine - s * cosine * angle.sine) / (angle.sine * angle.sine * angle.sine);
    V sum = V{}, term = V{} + T(1);  // a_n h^(n-1) stays small where a_n alone would overflow
    for (int n = 1; n <= SlerpLimits<T>::kSeriesTerms; ++n) {
      term = term * ((T(n * n) - s * s) * (T(1) / (T(n) * (T(n) + T(0.5)))));
      sum = sum + T(n) * term;
      term = term * angle.h;
    }
    const V series = T(-0.5) * s * sum;
    const V slope = (angle.h < kSeriesBelow<T>) & (s * s * angle.h < T(1)) ? series : closed;
    return angle.clamped ? V{} : slope;
  }
};

// 1 / max(norm, eps), and NaN for a norm that is not finite, so that the whole row becomes NaN.
template <class T, class V>
IPRM_INLINE V inverse_norm(V norm, T eps) {
  const V nothing = norm - norm;  // NaN if infinite or NaN
  return nothing == T(0) ? T(1) / (norm > eps ? norm : V{} + eps) : nothing;
}

// <x^, y^> of one row from its inner products, in double: rounded norms would cost two ulps, which at obtuse angles the gradients
// multiply by ten. For equal rows the result is exactly 1.
template <class T>
IPRM_INLINE T cosine(T xx, T yy, T xy, T eps) {
  return T(double(xy) * inverse_norm(::sqrt(double(xx)), double(eps)) * inverse_norm(::sqrt(double(yy)), double(eps)));
}

// The coefficients of a row of z = p x^ + q y^: z = x * from_x + y * from_y.
template <class T, class V>
struct MixCoefficients {
  V from_x, from_y;

  IPRM_INLINE MixCoefficients(V weight, V x_norm, V y_norm, V saved, T eps) {
    const Angle<T, V> angle(saved);
    from_x = SlerpWeight<T, V>(weight, angle).value(angle) * inverse_norm(x_norm, eps);
    from_y = SlerpWeight<T, V>(T(1) - weight, angle).value(angle) * inverse_norm(y_norm, eps);
  }
};

// A mixed row: its angle and norms, from which follow the coefficients of the row and, with MixGradient, of its gradients.
template <class T, class V>
struct MixRow {
  Angle<T, V> angle;
  SlerpWeight<T, V> of_x, of_y;
  V inv_x, inv_y;
  typename Angle<T, V>::Mask x_dead, y_dead;  // ||x|| <= eps: the gradient of that row is zero

  IPRM_INLINE MixRow(V w, V x_norm, V y_norm, V saved, T eps)
      : angle(saved),
        of_x(w, angle),
        of_y(T(1) - w, angle),
        inv_x(inverse_norm(x_norm, eps)),
        inv_y(inverse_norm(y_norm, eps)),
        x_dead(x_norm <= eps),
        y_dead(y_norm <= eps) {}

  IPRM_INLINE V from_x() const { return of_x.value(angle) * inv_x; }
  IPRM_INLINE V from_y() const { return of_y.value(angle) * inv_y; }
};

// The coefficients of the gradients of a row: dx = g * x_from_g + y * x_from_y + x * x_from_x, likewise dy; and dw.
template <class T, class V>
struct MixGradient {
  V x_from_g, x_from_x, x_from_y;
  V y_from_g, y_from_x, y_from_y;
  V weight;

  // g_x = <g, x>, g_y = <g, y>, not yet divided by the norms
  IPRM_INLINE MixGradient(const MixRow<T, V>& row, V g_x, V g_y) {
    const V gx = g_x * row.inv_x, gy = g_y * row.inv_y;
    const V p = row.of_x.value(row.angle), q = row.of_y.value(row.angle);
    const V kappa = row.of_x.dc(row.angle) * gx + row.of_y.dc(row.angle) * gy, c = row.angle.c;  // kappa is 0 if c is clamped
    x_from_g = p * row.inv_x;
    x_from_y = kappa * row.inv_y * row.inv_x;
    x_from_x = -(p * gx + kappa * c) * row.inv_x * row.inv_x;
    y_from_g = q * row.inv_y;
    y_from_x = kappa * row.inv_x * row.inv_y;
    y_from_y = -(q * gy + kappa * c) * row.inv_y * row.inv_y;
    weight = gx * row.of_x.ds(row.angle) - gy * row.of_y.ds(row.angle);
  }
};
