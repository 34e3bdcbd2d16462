// Vectors as wide as a register, in the compilers' own vector type: gcc keeps wider vectors in memory and splits their
// comparisons, 80 instructions each and 16 branches per selection. Included once for every instruction set, inside the namespace of
// that set (see for_each_isa.h), so it has no include guard.

typedef float VecF __attribute__((vector_size(IPRM_REGISTER_BYTES)));
typedef double VecD __attribute__((vector_size(IPRM_REGISTER_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(IPRM_REGISTER_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(IPRM_REGISTER_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(IPRM_REGISTER_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(IPRM_REGISTER_BYTES / 2)));

// The arithmetic type of a storage type.
template <class T>
struct Lanes {
  using Scalar = float;
  using Vec = VecF;
  static constexpr int64_t kCount = sizeof(VecF) / sizeof(float);
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using Vec = VecD;
  static constexpr int64_t kCount = sizeof(VecD) / sizeof(double);
};

template <class V>
IPRM_INLINE V load_bytes(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

IPRM_INLINE VecF load(const float* from) { return load_bytes<VecF>(from); }
IPRM_INLINE VecD load(const double* from) { return load_bytes<VecD>(from); }

IPRM_INLINE VecF load(const BFloat16* from) {
  return (VecF)(__builtin_convertvector(load_bytes<VecU16>(from), VecU32) << 16);
}

IPRM_INLINE VecF load(const Half* from) {
  const VecU32 bits = __builtin_convertvector(load_bytes<VecU16>(from), VecU32);
  const VecU32 sign = (bits & 0x8000u) << 16;
  const VecU32 magnitude = (bits & 0x7fffu) << 13;
  // the exponent's bias moves from 15 to 127 by a multiplication, which also normalises what is subnormal in half
  const VecU32 finite = (VecU32)((VecF)magnitude * 0x1p112f);
  const VecU32 special = magnitude | 0x7f800000u;
  return (VecF)(sign | (magnitude >= 0x0f800000u ? special : finite));
}

IPRM_INLINE void store(float* to, VecF value) { __builtin_memcpy(to, &value, sizeof(value)); }
IPRM_INLINE void store(double* to, VecD value) { __builtin_memcpy(to, &value, sizeof(value)); }

IPRM_INLINE void store(BFloat16* to, VecF value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VecU32 quiet = VecU32{} + 0x7fc0u;
  const VecU16 narrow = __builtin_convertvector(value != value ? quiet : rounded, VecU16);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

IPRM_INLINE void store(Half* to, VecF value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 sign = (bits >> 16) & 0x8000u;
  const VecU32 magnitude = bits & 0x7fffffffu;
  // normal results: round the 13 bits that fall away to nearest even, then move the bias
  const VecU32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // subnormal results: adding 2^-1 aligns the units of half's subnormals with those of the float, which rounds
  const VecU32 subnormal = (VecU32)((VecF)magnitude + 0.5f) - 0x3f000000u;
  const VecU32 infinite = VecU32{} + 0x7c00u;
  const VecU32 nan = VecU32{} + 0x7e00u;
  VecU32 result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;
  result = magnitude > 0x7f800000u ? nan : result;
  const VecU16 narrow = __builtin_convertvector(result | sign, VecU16);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

// A store past the caches, to an aligned address of an output that does not fit in them: an ordinary store first reads the cache
// line.
template <class T, class V>
IPRM_INLINE void store_past_caches(T* to, V value) {
#if !defined(__SANITIZE_ADDRESS__) && IPRM_REGISTER_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(to, (__m512)value);
  if constexpr (std::is_same_v<T, double>) return _mm512_stream_pd(to, (__m512d)value);
#elif !defined(__SANITIZE_ADDRESS__) && IPRM_REGISTER_BYTES == 32
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(to, (__m256)value);
  if constexpr (std::is_same_v<T, double>) return _mm256_stream_pd(to, (__m256d)value);
#endif
  store(to, value);
}

// Required before other threads read data stored past the caches: ordinary stores are not ordered after such stores.
IPRM_INLINE void settle_stores() {
#if IPRM_REGISTER_BYTES >= 32
  _mm_sfence();
#endif
}

// 0, 1, 2, ...
template <class V>
IPRM_INLINE V lane_numbers() {
  static constexpr std::decay_t<decltype(V{}[0])> kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_bytes<V>(kNumbers);
}

// Loads the first `count` lanes, zeros in the others, without touching memory behind them. A load through a copy stalls some 15
// cycles, as the vector load waits for the stores before it; AVX2 and AVX-512 use masked loads. AddressSanitizer does not see
// memory accesses of intrinsics, masked or past the caches, so builds with it use the loops below.
#if !defined(__SANITIZE_ADDRESS__) && IPRM_REGISTER_BYTES == 64
IPRM_INLINE VecF load_some(const float* from, int64_t count) {
  return (VecF)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
IPRM_INLINE VecD load_some(const double* from, int64_t count) {
  return (VecD)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from);
}
IPRM_INLINE void store_some(float* to, VecF value, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
}
IPRM_INLINE void store_some(double* to, VecD value, int64_t count) {
  _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), (__m512d)value);
}
#elif !defined(__SANITIZE_ADDRESS__) && IPRM_REGISTER_BYTES == 32
IPRM_INLINE __m256i first_floats(int64_t count) { return (__m256i)(lane_numbers<VecI32>() < int32_t(count)); }
IPRM_INLINE __m256i first_doubles(int64_t count) { return (__m256i)(lane_numbers<VecI64>() < count); }
IPRM_INLINE VecF load_some(const float* from, int64_t count) { return (VecF)_mm256_maskload_ps(from, first_floats(count)); }
IPRM_INLINE VecD load_some(const double* from, int64_t count) { return (VecD)_mm256_maskload_pd(from, first_doubles(count)); }
IPRM_INLINE void store_some(float* to, VecF value, int64_t count) {
  _mm256_maskstore_ps(to, first_floats(count), (__m256)value);
}
IPRM_INLINE void store_some(double* to, VecD value, int64_t count) {
  _mm256_maskstore_pd(to, first_doubles(count), (__m256d)value);
}
#endif

template <class T>
IPRM_INLINE typename Lanes<T>::Vec load_some(const T* from, int64_t count) {
  T lanes[Lanes<T>::kCount] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <class T>
IPRM_INLINE void store_some(T* to, typename Lanes<T>::Vec value, int64_t count) {
  T lanes[Lanes<T>::kCount];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// The rest of a row after its whole vectors, as one more vector that ends with the row: it overlaps columns already processed,
// which a reduction masks out with a neutral `fill` and an elementwise kernel computes again. Only a row shorter than a vector
// needs a partial load.
template <class T>
struct Tail {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  static constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t columns, whole;  // whole: columns covered by whole vectors

  IPRM_INLINE explicit Tail(int64_t columns) : columns(columns), whole(columns / kCount * kCount) {}
  IPRM_INLINE explicit operator bool() const { return whole < columns; }

  // for elementwise work
  IPRM_INLINE V values(const T* row, S fill = 0) const {
    if (whole > 0) return load(row + columns - kCount);
    const V value = load_some(row, columns);
    return lane_numbers<V>() < S(columns) ? value : V{} + fill;
  }

  // for reductions: lanes that do not count hold `fill`
  IPRM_INLINE V unseen(const T* row, S fill = 0) const {
    return only_unseen(values(row, fill), fill);
  }

  IPRM_INLINE V only_unseen(V value, S fill = 0) const {
    if (whole == 0) return value;
    return lane_numbers<V>() < S(kCount - (columns - whole)) ? V{} + fill : value;
  }

  IPRM_INLINE void write(T* row, V value) const {
    if (whole > 0) return store(row + columns - kCount, value);
    store_some(row, value, columns);
  }
};

// The first `count` lanes of per-row values, for row mathematics on that many rows at once.
template <class S>
IPRM_INLINE typename Lanes<S>::Vec load_rows(const S* from, int64_t count) {
  return count == Lanes<S>::kCount ? load(from) : load_some(from, count);
}

template <class S>
IPRM_INLINE void store_rows(S* to, typename Lanes<S>::Vec value, int64_t count) {
  if (count == Lanes<S>::kCount) store(to, value);
  else store_some(to, value, count);
}

// lane by lane; the compilers turn this into one instruction
template <class V>
IPRM_INLINE V square_root(V x) {
  auto lanes = x[0] + x[0];
  decltype(lanes) values[sizeof(V) / sizeof(lanes)];
  __builtin_memcpy(values, &x, sizeof(V));
  for (auto& value : values) value = std::sqrt(value);
  __builtin_memcpy(&x, values, sizeof(V));
  return x;
}

// May lose a NaN, but callers also sum the same values, and the sum keeps it.
template <class V>
IPRM_INLINE V lanewise_max(V a, V b) {
  return a < b ? b : a;
}

// Reduces all lanes to one, always in the same order: halves are folded onto each other.
template <class S, class V, class Fold>
IPRM_INLINE S fold_lanes(V value, const Fold& fold) {
  if constexpr (sizeof(V) == 2 * sizeof(S)) {
    return fold(value[0], value[1]);
  } else {
    typedef S Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(V));
    return fold_lanes<S>(Half(fold(halves[0], halves[1])), fold);
  }
}

template <class S, class V>
IPRM_INLINE S sum_lanes(V value) {
  return fold_lanes<S>(value, [](auto a, auto b) { return a + b; });
}

template <class S, class V>
IPRM_INLINE S max_lanes(V value) {
  return fold_lanes<S>(value, [](auto a, auto b) { return lanewise_max(a, b); });
}

// The lane sums of four vectors at once: neighbours are added and interleaved twice, and the result is folded. 13 operations,
// where four calls of sum_lanes take 40.
#if defined(__clang__)
#define IPRM_SHUFFLE(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IPRM_SHUFFLE(a, b, type, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

#if IPRM_REGISTER_BYTES == 64
IPRM_INLINE VecF neighbours(VecF a, VecF b) {
  return IPRM_SHUFFLE(a, b, VecI32, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
      IPRM_SHUFFLE(a, b, VecI32, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
IPRM_INLINE VecF pairs(VecF a, VecF b) {
  return IPRM_SHUFFLE(a, b, VecI32, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
      IPRM_SHUFFLE(a, b, VecI32, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
IPRM_INLINE VecD neighbours(VecD a, VecD b) {
  return IPRM_SHUFFLE(a, b, VecI64, 0, 8, 2, 10, 4, 12, 6, 14) + IPRM_SHUFFLE(a, b, VecI64, 1, 9, 3, 11, 5, 13, 7, 15);
}
IPRM_INLINE VecD pairs(VecD a, VecD b) {
  return IPRM_SHUFFLE(a, b, VecI64, 0, 1, 8, 9, 4, 5, 12, 13) + IPRM_SHUFFLE(a, b, VecI64, 2, 3, 10, 11, 6, 7, 14, 15);
}
#elif IPRM_REGISTER_BYTES == 32
IPRM_INLINE VecF neighbours(VecF a, VecF b) {
  return IPRM_SHUFFLE(a, b, VecI32, 0, 8, 2, 10, 4, 12, 6, 14) + IPRM_SHUFFLE(a, b, VecI32, 1, 9, 3, 11, 5, 13, 7, 15);
}
IPRM_INLINE VecF pairs(VecF a, VecF b) {
  return IPRM_SHUFFLE(a, b, VecI32, 0, 1, 8, 9, 4, 5, 12, 13) + IPRM_SHUFFLE(a, b, VecI32, 2, 3, 10, 11, 6, 7, 14, 15);
}
IPRM_INLINE VecD neighbours(VecD a, VecD b) {
  return IPRM_SHUFFLE(a, b, VecI64, 0, 4, 2, 6) + IPRM_SHUFFLE(a, b, VecI64, 1, 5, 3, 7);
}
IPRM_INLINE VecD pairs(VecD a, VecD b) {
  return IPRM_SHUFFLE(a, b, VecI64, 0, 1, 4, 5) + IPRM_SHUFFLE(a, b, VecI64, 2, 3, 6, 7);
}
#endif

template <class S, class V>
IPRM_INLINE void sum_lanes_of_four(const V* vectors, S* sums) {
#if IPRM_REGISTER_BYTES == 16
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes<S>(vectors[i]);
#else
  const V mixed = pairs(neighbours(vectors[0], vectors[1]), neighbours(vectors[2], vectors[3]));
  typedef S Four __attribute__((vector_size(4 * sizeof(S))));
  Four parts[sizeof(V) / sizeof(Four)];
  __builtin_memcpy(parts, &mixed, sizeof(V));
  Four sum = parts[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(Four); ++i) sum += parts[i];
  __builtin_memcpy(sums, &sum, sizeof(sum));
#endif
}

// exp(r) for |r| <= ln 2 / 2
IPRM_INLINE VecF exp_of_remainder(VecF r) {
  VecF e = VecF{} + 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  return e * (r * r) + r + 1.0f;
}

IPRM_INLINE VecD exp_of_remainder(VecD r) {
  VecD e = VecD{} + 1.0 / 6227020800.0;  // Taylor: the term after r^13 / 13! is below 2^-57
  e = e * r + 1.0 / 479001600.0;
  e = e * r + 1.0 / 39916800.0;
  e = e * r + 1.0 / 3628800.0;
  e = e * r + 1.0 / 362880.0;
  e = e * r + 1.0 / 40320.0;
  e = e * r + 1.0 / 5040.0;
  e = e * r + 1.0 / 720.0;
  e = e * r + 1.0 / 120.0;
  e = e * r + 1.0 / 24.0;
  e = e * r + 1.0 / 6.0;
  e = e * r + 0.5;
  return e * (r * r) + r + 1.0;
}

// x - n ln 2, with ln 2 in two parts, the first short enough for an exact product
IPRM_INLINE VecF exp_remainder(VecF x, VecF n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }
IPRM_INLINE VecD exp_remainder(VecD x, VecD n) { return (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45; }

// exp, to within one ulp: x = n ln 2 + r, a polynomial in r, times 2^n. Results below the normal range are zero: producing a
// subnormal number traps into microcode, which made batch_kl at (8192, 31), whose spare lanes hold -inf, ten times slower.
#if IPRM_REGISTER_BYTES == 64
IPRM_INLINE VecF exp(VecF x) {
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // a NaN passes
  return (VecF)_mm512_maskz_scalef_ps(normal, (__m512)exp_of_remainder(exp_remainder(x, n)), (__m512)n);
}

IPRM_INLINE VecD exp(VecD x) {
  const VecD n = (VecD)_mm512_roundscale_pd((__m512d)(x * 1.44269504088896338700), _MM_FROUND_TO_NEAREST_INT);
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(-708.0), _CMP_NLT_UQ);
  return (VecD)_mm512_maskz_scalef_pd(normal, (__m512d)exp_of_remainder(exp_remainder(x, n)), (__m512d)n);
}
#else
// the magic constants leave n in the low bits of the sum
IPRM_INLINE VecF exp(VecF x) {
  const VecF bounded = x < -87.0f ? VecF{} - 87.0f : (x > 88.0f ? VecF{} + 88.0f : x);
  const VecF shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const VecF power = (VecF)((((VecI32)shifted - 0x4b400000) + 127) << 23);
  const VecF e = exp_of_remainder(exp_remainder(bounded, shifted - 12582912.0f)) * power;
  return x != x ? x : x < -87.0f ? VecF{} : e;
}

IPRM_INLINE VecD exp(VecD x) {
  const VecD bounded = x < -708.0 ? VecD{} - 708.0 : (x > 709.0 ? VecD{} + 709.0 : x);
  const VecD shifted = bounded * 1.44269504088896338700 + 6755399441055744.0;
  const VecD power = (VecD)((((VecI64)shifted - 0x4338000000000000) + 1023) << 52);
  const VecD e = exp_of_remainder(exp_remainder(bounded, shifted - 6755399441055744.0)) * power;
  return x != x ? x : x < -708.0 ? VecD{} : e;
}
#endif

// log of positive normal numbers, to within one ulp: x = m 2^n with m in [sqrt(1/2), sqrt(2)), a polynomial in m - 1
IPRM_INLINE VecF log(VecF x) {
  const VecI32 bits = (VecI32)x - 0x3f3504f3;
  const VecF n = __builtin_convertvector(bits >> 23, VecF);
  const VecF m = (VecF)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  VecF y = VecF{} + 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const VecF square = m * m;
  const VecF result = (m + (y * m * square - n * 2.12194440e-4f - 0.5f * square)) + n * 0.693359375f;
  return x != x ? x : result;
}

IPRM_INLINE VecD log(VecD x) {
  for (int64_t i = 0; i < Lanes<double>::kCount; ++i) x[i] = std::log(x[i]);
  return x;
}
