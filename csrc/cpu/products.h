// Two matrix products by register tiles, for matrices of one long and one short side. Included once for every instruction set,
// behind simd.h, so it has no include guard.

// A tile holds kTileRows x kTileVectors vectors of sums, which with their operands fill the registers: 24 + 5 of the 32 of AVX-512.
// With AVX2 the sums take 12 of 16 registers and half of the operands come from memory, which is a sixth faster at (4096, 1024, 31)
// than two rows. With SSE 8 + 5 of 16; its vectors hold two doubles, hence two rows.
constexpr int kTileRows = IPRM_REGISTER_BYTES == 64 ? 6 : IPRM_REGISTER_BYTES == 32 ? 3 : 2, kTileVectors = 4;

// sums[r][q] = <x_r, w_q> over `columns`.
template <class S>
IPRM_INLINE void dot_tile(const S* const* x, const S* const* w, int64_t columns, S (&sums)[kTileRows][kTileVectors]) {
  using V = typename Lanes<S>::Vec;
  const Tail<S> tail(columns);
  V parts[kTileRows][kTileVectors] = {};
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) {
    V b[kTileVectors];
    IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) b[q] = load(w[q] + i);
    IPRM_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const V a = load(x[r] + i);
      IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) parts[r][q] += a * b[q];
    }
  }
  if (tail) {
    for (int q = 0; q < kTileVectors; ++q) {
      const V b = tail.unseen(w[q]);
      for (int r = 0; r < kTileRows; ++r) parts[r][q] += tail.values(x[r]) * b;
    }
  }
  IPRM_UNROLL for (int r = 0; r < kTileRows; ++r) sum_lanes_of_four(parts[r], sums[r]);
}

// out[r][n] = <x_r, w_n> for r < rows <= kTileRows and all n < count. Surplus rows and columns of a tile repeat the last one and
// are not stored.
template <class S>
void project_tile(
    const S* const* x, int rows, const S* const* w, int64_t count, int64_t columns, S* out, int64_t out_stride) {
  for (int64_t n = 0; n < count; n += kTileVectors) {
    const S* w_tile[kTileVectors];
    for (int q = 0; q < kTileVectors; ++q) w_tile[q] = w[std::min(n + q, count - 1)];
    S sums[kTileRows][kTileVectors];
    dot_tile<S>(x, w_tile, columns, sums);
    const int valid = int(std::min<int64_t>(kTileVectors, count - n));
    for (int r = 0; r < rows; ++r)
      for (int q = 0; q < valid; ++q) out[r * out_stride + n + q] = sums[r][q];
  }
}

// sums[r][q] += sum_i g[row[r] + i * g_step] * w[i * w_step + q-th vector], i < steps.
template <class S, class V>
IPRM_INLINE void outer_tile(
    V (&sums)[kTileRows][kTileVectors],
    const S* const* g,
    int64_t g_step,
    const S* w,
    int64_t w_step,
    int64_t steps) {
  V parts[kTileRows][kTileVectors];
  IPRM_UNROLL for (int r = 0; r < kTileRows; ++r)
    IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) parts[r][q] = sums[r][q];
  for (int64_t i = 0; i < steps; ++i) {
    V b[kTileVectors];
    IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) b[q] = load(w + i * w_step + q * Lanes<S>::kCount);
    IPRM_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const V a = V{} + g[r][i * g_step];
      IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) parts[r][q] += a * b[q];
    }
  }
  IPRM_UNROLL for (int r = 0; r < kTileRows; ++r)
    IPRM_UNROLL for (int q = 0; q < kTileVectors; ++q) sums[r][q] = parts[r][q];
}
