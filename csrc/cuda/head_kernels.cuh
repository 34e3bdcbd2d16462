// The kernels of the linear head step, for sizes where launches dominate: forward in one cooperative launch, whose blocks
// synchronise for the batch-wide sums of the KL and of the losses; backward in two launches. A warp handles a row of logits, or a
// tile of 4 rows x 4 classes of a projection. For sums over the batch, each block stores one part, and the parts are added in a
// fixed order, so results are bit-identical between runs.
//
// The includer provides the types and functions of CUDA; nothing here depends on torch, so that tests can compile it for the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../core/label.h"
#include "../core/macros.h"
#include "../core/strength.h"

namespace iprm::device {

#if defined(__CUDACC__)
inline __device__ void* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
inline __device__ void grid_sync() { cooperative_groups::this_grid().sync(); }
#endif

IPRM_INLINE float square_root(float x) { return sqrtf(x); }
IPRM_INLINE double square_root(double x) { return sqrt(x); }
IPRM_INLINE float exponential(float x) { return expf(x); }
IPRM_INLINE double exponential(double x) { return exp(x); }
IPRM_INLINE float logarithm(float x) { return logf(x); }
IPRM_INLINE double logarithm(double x) { return log(x); }

#include "../core/divergence.h"
#include "../core/slerp.h"

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kRows = 4;                // rows of a tile, which share their loads of the heads
constexpr int kClasses = 4;             // classes of a tile of a projection
constexpr int kHeadClasses = 8;         // classes of a tile of a head's gradient
constexpr int kParts = 2, kLossParts = 4;

template <class T>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};

// A (rows, columns) matrix of any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;

  IPRM_INLINE T operator()(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

// The heads of a step and its saved state. u_x, u_y: logits in the arithmetic type.
template <class T, class S = typename Arithmetic<T>::Type>
struct Head {
  Matrix<T> x, y;                                // (B, D)
  const T *weight[3], *bias[3];                  // of the mixture, x, y: (C, D) contiguous, (C,) or null
  const int64_t* target;                         // (B,)
  int64_t target_stride;
  S *stats, *projected[2], *own[2], *counted;    // (3, B); A, V and U_x, U_y (B, C); ()
  int64_t rows, columns, classes;
  double label_smoothing;
  int64_t ignore_index;
};

template <class T, class S = typename Arithmetic<T>::Type>
struct Forward {
  Head<T> head;
  const S* weight;                               // () lambda
  T *logits_mix, *logits[2];                     // (B, C); the latter null if u_x and u_y are the logits
  S *kl, *strength, *loss, *losses;              // (2,), (2,), (), (3,)
  double *kl_parts, *loss_parts;                 // (blocks, 2), (blocks, 4)
  bool probe, rebalance;
};

template <class T, class S = typename Arithmetic<T>::Type>
struct Backward {
  Head<T> head;
  const S *grad_loss, *grad_losses, *strength;   // (), (3,), either or both null; (2,)
  const T* upstream[3];                          // (B, C) upstream gradients of the logits of the mixture, x, y, or null
  T* differences[3];                             // (B, C) P - wanted of the mixture, x, y: see logit_gradient
  S* z_from[2];                                  // (B,) factors of x and y in the mixture
  T *grad_x, *grad_y;                            // (B, D) or null
  T *grad_weight[3], *grad_bias[3];              // shaped like the heads, or null
};

// Allocates shared memory from one block, with the same result in every thread.
class Shared {
 public:
  __device__ explicit Shared(void* memory) : at_(static_cast<char*>(memory)) {}

  template <class V>
  __device__ V* take(int64_t count) {
    V* taken = reinterpret_cast<V*>(at_);
    at_ += (count * sizeof(V) + 15) / 16 * 16;
    return taken;
  }

 private:
  char* at_;
};

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <class V>
__device__ __forceinline__ V warp_max(V value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(~0u, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The sums over a warp of 16 values per lane, in 16 exchanges: lanes halve the values they keep. Sum i ends in lanes 2i and 2i + 1.
template <class V>
__device__ __forceinline__ V warp_sum_of_16(V (&values)[16]) {
  const int lane = threadIdx.x % kWarp;
  IPRM_UNROLL for (int half = 8; half > 0; half /= 2) {
    const bool upper = lane & (2 * half);
    IPRM_UNROLL for (int i = 0; i < 8; ++i) {
      if (i >= half) break;
      const V sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(~0u, sent, 2 * half);
    }
  }
  return values[0] + __shfl_xor_sync(~0u, values[0], 1);
}

// Sums over the block of kCount values per thread, the same in all threads. partial: kCount x kWarps of shared memory.
template <int kCount>
__device__ __forceinline__ void block_sum(double (&values)[kCount], double* partial) {
  IPRM_UNROLL for (int i = 0; i < kCount; ++i) {
    const double sum = warp_sum(values[i]);
    if (threadIdx.x % kWarp == 0) partial[i * kWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  IPRM_UNROLL for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) values[i] += partial[i * kWarps + warp];
  }
  __syncthreads();
}

// The sums of all blocks' parts (blocks, kCount), the same in all threads.
template <int kCount>
__device__ __forceinline__ void sum_of_parts(double (&values)[kCount], const double* parts, double* partial) {
  IPRM_UNROLL for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int block = threadIdx.x; block < int(gridDim.x); block += kThreads) values[i] += parts[block * kCount + i];
  }
  block_sum(values, partial);
}

// A row of C logits, processed by a warp: lane l has classes l, l + 32 and so on.
template <class S, class Logit>
__device__ __forceinline__ Softmax<S> softmax_of(int64_t classes, const Logit& logit) {
  const int lane = threadIdx.x % kWarp;
  S top = -S(__builtin_inff()), sum = 0;
  for (int64_t k = lane; k < classes; k += kWarp) {
    const S value = logit(k);
    top = value > top ? value : top;
  }
  top = warp_max(top);
  for (int64_t k = lane; k < classes; k += kWarp) sum += exponential(S(logit(k)) - top);
  return {top, warp_sum(sum)};
}

// KL of a modality's logits from the mixture's
template <class S>
__device__ __forceinline__ S row_kl(const S* own, const S* z, int64_t classes, const Softmax<S>& of_z) {
  const Softmax<S> of_own = softmax_of<S>(classes, [&](int64_t k) { return own[k]; });
  const S log_ratio = logarithm(of_own.sum / of_z.sum);
  S sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < classes; k += kWarp) {
    const S p = exponential(own[k] - of_own.top) / of_own.sum, q = exponential(z[k] - of_z.top) / of_z.sum;
    sum += kl_terms<S, S>(p, q, log_quotient<S, S>(own[k], z[k], of_own, of_z, log_ratio), own[k], z[k]);
  }
  return warp_sum(sum);
}

// -(1 - smoothing) log P_label - smoothing / C sum log P
template <class S>
__device__ __forceinline__ S cross_entropy(const S* logits, int64_t classes, const Label& label, S smoothing) {
  const Softmax<S> of = softmax_of<S>(classes, [&](int64_t k) { return logits[k]; });
  if (!label.counted) return S(0);
  if (label.wrong) return S(__builtin_nanf(""));
  const S log_sum = logarithm(of.sum), sharp = (of.top - logits[label.index]) + log_sum;
  if (smoothing == S(0)) return sharp;
  S below = 0;
  for (int64_t k = threadIdx.x % kWarp; k < classes; k += kWarp) below += of.top - logits[k];
  return (S(1) - smoothing) * sharp + smoothing * (warp_sum(below) / S(classes) + log_sum);
}

// z = a * from_x + v * from_y + bias of one row, stored in shared memory for its warp
template <class T, class S>
__device__ __forceinline__ void mix_row(const Head<T>& head, int64_t row, S from_x, S from_y, S* z) {
  const S *a = head.projected[0] + row * head.classes, *v = head.projected[1] + row * head.classes;
  for (int64_t k = threadIdx.x % kWarp; k < head.classes; k += kWarp)
    z[k] = a[k] * from_x + v[k] * from_y + (head.bias[0] ? S(head.bias[0][k]) : S(0));
  __syncwarp();
}

// |x^ + y^|^2 / 2 of a row whose features are nearly opposite. A function of its own, called rarely: inlined, it makes the kernel in half
// precision spill 52 bytes on sm_90.
template <class T, class S>
__device__ __attribute__((noinline)) S nearly_opposite(const Head<T>& head, int64_t row, S inv_x, S inv_y) {
  S sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < head.columns; d += kWarp) {
    const S both = S(head.x(row, d)) * inv_x + S(head.y(row, d)) * inv_y;
    sum += both * both;
  }
  return warp_sum(sum) / S(2);
}

// Projections of a tile of rows on their own and the mixture head, unimodal logits, norms and c.
template <class T, class S>
__device__ __forceinline__ void project_tile(const Forward<T>& args, int64_t first, int count) {
  const Head<T>& head = args.head;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t groups = (2 * head.classes + kClasses - 1) / kClasses;
  for (int64_t task = warp; task < 2 * groups; task += kWarps) {
    const int side = task >= groups;
    const int64_t k0 = (task - side * groups) * kClasses;
    const Matrix<T>& features = side ? head.y : head.x;
    // the mixture's head and the side's own head, stacked; surplus rows of a tile repeat the last one
    const T* weights[kClasses];
    IPRM_UNROLL for (int q = 0; q < kClasses; ++q) {
      const int64_t k = k0 + q < 2 * head.classes ? k0 + q : 2 * head.classes - 1;
      weights[q] = k < head.classes ? head.weight[0] + k * head.columns : head.weight[1 + side] + (k - head.classes) * head.columns;
    }
    S sums[kRows * kClasses] = {};
    for (int64_t d = lane; d < head.columns; d += kWarp) {
      S w[kClasses];
      IPRM_UNROLL for (int q = 0; q < kClasses; ++q) w[q] = S(weights[q][d]);
      IPRM_UNROLL for (int r = 0; r < kRows; ++r) {
        const S x = S(features(first + (r < count ? r : count - 1), d));
        IPRM_UNROLL for (int q = 0; q < kClasses; ++q) sums[r * kClasses + q] += x * w[q];
      }
    }
    const S sum = warp_sum_of_16(sums);
    const int r = lane / 2 / kClasses;
    const int64_t k = k0 + lane / 2 % kClasses, at = (first + r) * head.classes;
    if (lane % 2 != 0 || r >= count || k >= 2 * head.classes) continue;
    if (k < head.classes) {
      head.projected[side][at + k] = sum;
    } else {
      const int64_t own = k - head.classes;
      const T* bias = head.bias[1 + side];
      const S logit = sum + (bias ? S(bias[own]) : S(0));
      head.own[side][at + own] = logit;
      if (args.logits[side]) args.logits[side][at + own] = T(logit);
    }
  }
  for (int r = warp; r < count; r += kWarps) {
    S xx = 0, yy = 0, xy = 0;
    for (int64_t d = lane; d < head.columns; d += kWarp) {
      const S x = S(head.x(first + r, d)), y = S(head.y(first + r, d));
      xx += x * x;
      yy += y * y;
      xy += x * y;
    }
    xx = warp_sum(xx);
    yy = warp_sum(yy);
    xy = warp_sum(xy);
    const S x_norm = square_root(xx), y_norm = square_root(yy), c = cosine(xx, yy, xy, S(kEps));
    S gap = S(1) + c;
    if (c < kNearAntipode<S> && x_norm > S(kEps) && y_norm > S(kEps))  // the same in all lanes
      gap = nearly_opposite(head, first + r, S(1) / x_norm, S(1) / y_norm);
    if (lane == 0) {
      head.stats[first + r] = x_norm;
      head.stats[head.rows + first + r] = y_norm;
      head.stats[2 * head.rows + first + r] = saved_cosine(c, gap);
    }
  }
}

template <class T, class S>
__device__ __forceinline__ MixCoefficients<S, S> mixture_of(const Head<T>& head, int64_t row, S weight) {
  const S *x_norm = head.stats, *y_norm = x_norm + head.rows, *c = y_norm + head.rows;
  return MixCoefficients<S, S>(weight, x_norm[row], y_norm[row], c[row], S(kEps));
}

// Zeros from element `end` of the state up to the next field, a multiple of 4 elements from its start.
template <class S>
__device__ __forceinline__ void clear_gap(S* field, int64_t end) {
  if (threadIdx.x < unsigned(-end & 3)) field[end + threadIdx.x] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) head_forward_kernel(const __grid_constant__ Forward<T> args) {
  using S = typename Arithmetic<T>::Type;
  const Head<T>& head = args.head;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = (head.rows + kRows - 1) / kRows;
  Shared shared(shared_memory());
  double* partial = shared.take<double>(kLossParts * kWarps);
  S* z = shared.take<S>(kRows * head.classes) + (warp % kRows) * head.classes;

  double kl[kParts] = {};
  if (args.probe) {
    if (blockIdx.x == 0) {
      const int64_t matrix = head.rows * head.classes;
      clear_gap(head.stats, 3 * head.rows);
      clear_gap(head.projected[0], 2 * matrix);
      if (args.logits[0])
        for (int side = 0; side < 2; ++side) clear_gap(head.own[side], matrix);
    }
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t first = tile * kRows;
      const int count = head.rows - first < kRows ? int(head.rows - first) : kRows;
      project_tile<T, S>(args, first, count);
      __syncthreads();
      if (warp < count) {
        const int64_t row = first + warp;
        const MixCoefficients<S, S> mix = mixture_of<T, S>(head, row, *args.weight);
        mix_row<T, S>(head, row, mix.from_x, mix.from_y, z);
        const Softmax<S> of_z = softmax_of<S>(head.classes, [&](int64_t k) { return z[k]; });
        IPRM_UNROLL for (int side = 0; side < 2; ++side) {
          const S row_sum = row_kl<S>(head.own[side] + row * head.classes, z, head.classes, of_z);
          if (lane == 0) kl[side] += double(row_sum);
        }
      }
      __syncthreads();
    }
    block_sum(kl, partial);
    if (threadIdx.x == 0)
      IPRM_UNROLL for (int i = 0; i < kParts; ++i) args.kl_parts[blockIdx.x * kParts + i] = kl[i];
    grid_sync();
    sum_of_parts(kl, args.kl_parts, partial);
    if (blockIdx.x == 0 && threadIdx.x == 0)
      IPRM_UNROLL for (int i = 0; i < kParts; ++i) args.kl[i] = S(kl[i]);
  }
  if (!args.rebalance) return;

  S measured[2], strength[2];
  IPRM_UNROLL for (int i = 0; i < 2; ++i) measured[i] = args.probe ? S(kl[i]) : args.kl[i];
  strength_weights_of(measured, 2, strength);
  if (blockIdx.x == 0 && threadIdx.x == 0)
    IPRM_UNROLL for (int i = 0; i < 2; ++i) args.strength[i] = strength[i];
  double losses[kLossParts] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * kRows + warp;
    if (warp < kRows && row < head.rows) {
      const MixCoefficients<S, S> mix = mixture_of<T, S>(head, row, strength[0]);
      mix_row<T, S>(head, row, mix.from_x, mix.from_y, z);
      for (int64_t k = lane; k < head.classes; k += kWarp) args.logits_mix[row * head.classes + k] = T(z[k]);
      const Label label(head.target[row * head.target_stride], head.classes, head.ignore_index);
      const S* logits[3] = {z, head.own[0] + row * head.classes, head.own[1] + row * head.classes};
      IPRM_UNROLL for (int i = 0; i < 3; ++i) {
        const S loss = cross_entropy<S>(logits[i], head.classes, label, S(head.label_smoothing));
        if (lane == 0) losses[i] += double(loss);
      }
      if (lane == 0) losses[3] += double(label.counted);
    }
    __syncwarp();
  }
  block_sum(losses, partial);
  if (threadIdx.x == 0)
    IPRM_UNROLL for (int i = 0; i < kLossParts; ++i) args.loss_parts[blockIdx.x * kLossParts + i] = losses[i];
  grid_sync();
  if (blockIdx.x != 0) return;
  sum_of_parts(losses, args.loss_parts, partial);
  if (threadIdx.x == 0) {
    double total = 0;
    IPRM_UNROLL for (int i = 0; i < 3; ++i) {
      args.losses[i] = S(losses[i] / losses[3]);
      total += losses[i] / losses[3];
    }
    *args.loss = S(total);
    *head.counted = S(losses[3]);
  }
}

// The gradient of the mean cross entropies, by which the differences P - wanted of the head `which` are multiplied
template <class T, class S = typename Arithmetic<T>::Type>
__device__ __forceinline__ S loss_scale(const Backward<T>& args, int which) {
  const S of_losses = args.grad_losses ? args.grad_losses[which] : S(0);
  return ((args.grad_loss ? *args.grad_loss : S(0)) + of_losses) / *args.head.counted;
}

// scale (P - (1 - smoothing) onehot - smoothing / C) + the upstream gradient of the logits, for one row, stored in `kept`.
// `differences` stores P - wanted in the type of the features: between -1 and 1 it is above the least numbers of 16 bits, which
// the gradient of a mean over a large batch may be below.
template <class T, class S>
__device__ __forceinline__ void logit_gradient(
    const Head<T>& head, int64_t row, const S* logits, const Label& label, S scale, const T* upstream, T* differences, S* kept) {
  const int64_t classes = head.classes;
  const S smoothing = S(head.label_smoothing);
  const Softmax<S> of = softmax_of<S>(classes, [&](int64_t k) { return logits[k]; });
  for (int64_t k = threadIdx.x % kWarp; k < classes; k += kWarp) {
    const S wanted = (k == label.index ? S(1) - smoothing : S(0)) + smoothing / S(classes);
    const S difference = label.wrong ? S(__builtin_nanf("")) : exponential(logits[k] - of.top) / of.sum - wanted;
    S value = label.counted ? scale * difference : S(0);
    if (upstream) value += S(upstream[row * classes + k]);
    differences[row * classes + k] = T(difference);
    kept[k] = value;
  }
  __syncwarp();
}

// Gradients of all logits, and from them the feature gradients, one tile of rows per block.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) head_backward_features_kernel(const __grid_constant__ Backward<T> args) {
  using S = typename Arithmetic<T>::Type;
  const Head<T>& head = args.head;
  const int64_t classes = head.classes, first = int64_t(blockIdx.x) * kRows;
  const int count = head.rows - first < kRows ? int(head.rows - first) : kRows;
  const int warp = threadIdx.x / kWarp;
  Shared shared(shared_memory());
  S* z = shared.take<S>(kRows * classes) + (warp % kRows) * classes;
  S* kept = shared.take<S>(3 * kRows * classes);  // the gradients of this tile's logits: mixture, x, y
  S* factors = shared.take<S>(6 * kRows);  // per row: factors of g, x, y in the gradient of x, and likewise of y
  if (warp < count) {
    const int64_t row = first + warp;
    const MixRow<S, S> mix(
        args.strength[0], head.stats[row], head.stats[head.rows + row], head.stats[2 * head.rows + row], S(kEps));
    mix_row<T, S>(head, row, mix.from_x(), mix.from_y(), z);
    const Label label(head.target[row * head.target_stride], classes, head.ignore_index);
    const S* logits[3] = {z, head.own[0] + row * classes, head.own[1] + row * classes};
    IPRM_UNROLL for (int i = 0; i < 3; ++i) {
      logit_gradient<T, S>(
          head, row, logits[i], label, loss_scale(args, i), args.upstream[i], args.differences[i],
          kept + (i * kRows + warp) * classes);
    }
    S g_x = 0, g_y = 0;
    for (int64_t k = threadIdx.x % kWarp; k < classes; k += kWarp) {
      g_x += kept[warp * classes + k] * head.projected[0][row * classes + k];
      g_y += kept[warp * classes + k] * head.projected[1][row * classes + k];
    }
    g_x = warp_sum(g_x);
    g_y = warp_sum(g_y);
    const MixGradient<S, S> to(mix, g_x, g_y);
    if (threadIdx.x % kWarp == 0) {
      args.z_from[0][row] = to.x_from_g;
      args.z_from[1][row] = to.y_from_g;
      // a factor of zero marks a dead row, which learns only from its own head
      const S of_x[3] = {to.x_from_g, to.x_from_x, to.x_from_y}, of_y[3] = {to.y_from_g, to.y_from_x, to.y_from_y};
      IPRM_UNROLL for (int i = 0; i < 3; ++i) {
        factors[warp * 6 + i] = mix.x_dead ? S(0) : of_x[i];
        factors[warp * 6 + 3 + i] = mix.y_dead ? S(0) : of_y[i];
      }
    }
  }
  __syncthreads();
  if (!args.grad_x && !args.grad_y) return;
  for (int64_t d = threadIdx.x; d < head.columns; d += kThreads) {
    S g[3][kRows] = {};
    for (int64_t k = 0; k < classes; ++k) {
      S w[3];
      IPRM_UNROLL for (int i = 0; i < 3; ++i) w[i] = S(head.weight[i][k * head.columns + d]);
      IPRM_UNROLL for (int i = 0; i < 3; ++i)
        IPRM_UNROLL for (int r = 0; r < kRows; ++r) g[i][r] += kept[(i * kRows + r) * classes + k] * w[i];
    }
    IPRM_UNROLL for (int r = 0; r < kRows; ++r) {
      const int64_t at = (first + r) * head.columns + d;
      if (r < count) {
        const S x = S(head.x(first + r, d)), y = S(head.y(first + r, d));
        const auto mixed = [&](const S* f) {
          const bool dead = f[0] == S(0) && f[1] == S(0) && f[2] == S(0);
          return dead ? S(0) : f[0] * g[0][r] + f[1] * x + f[2] * y;
        };
        if (args.grad_x) args.grad_x[at] = T(mixed(factors + r * 6) + g[1][r]);
        if (args.grad_y) args.grad_y[at] = T(mixed(factors + r * 6 + 3) + g[2][r]);
      }
    }
  }
}

// Panels of 32 columns; one without columns computes the gradients of the biases.
IPRM_INLINE int64_t panels_of(int64_t columns) { return columns == 0 ? 1 : (columns + kWarp - 1) / kWarp; }

// Gradients of the heads: a block handles 32 columns and kHeadClasses classes of one head, and each of its warps every eighth row.
template <class T>
__global__ void __launch_bounds__(kThreads) head_backward_heads_kernel(const __grid_constant__ Backward<T> args) {
  using S = typename Arithmetic<T>::Type;
  const Head<T>& head = args.head;
  const int64_t classes = head.classes, panels = panels_of(head.columns);
  const int64_t groups = (classes + kHeadClasses - 1) / kHeadClasses;
  const int64_t panel = blockIdx.x % panels, group = blockIdx.x / panels % groups;
  const int which = int(blockIdx.x / panels / groups);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t d = panel * kWarp + lane, k0 = group * kHeadClasses;
  const bool has_bias = panel == 0 && args.grad_bias[which];
  if (!args.grad_weight[which] && !has_bias) return;
  const S scale = loss_scale(args, which);
  const T *differences = args.differences[which], *upstream = args.upstream[which];
  S sums[kHeadClasses] = {}, bias_sums[kHeadClasses] = {};
  for (int64_t row = warp; row < head.rows; row += kWarps) {
    const bool counted = head.target[row * head.target_stride] != head.ignore_index;
    S feature = 0;
    if (d < head.columns) {
      if (which != 2) feature = S(head.x(row, d));
      if (which == 2) feature = S(head.y(row, d));
      if (which == 0) feature = args.z_from[0][row] * feature + args.z_from[1][row] * S(head.y(row, d));
    }
    IPRM_UNROLL for (int q = 0; q < kHeadClasses; ++q) {
      const int64_t at = row * classes + k0 + q;
      S g = k0 + q < classes && counted ? scale * S(differences[at]) : S(0);
      if (k0 + q < classes && upstream) g += S(upstream[at]);
      sums[q] += g * feature;
      bias_sums[q] += g;
    }
  }
  Shared shared(shared_memory());
  S* partial = shared.take<S>(kWarps * kHeadClasses * kWarp);
  const auto finish = [&](const S (&of)[kHeadClasses], T* out, int64_t stride, int64_t column, bool valid) {
    for (int q = 0; q < kHeadClasses; ++q) partial[(warp * kHeadClasses + q) * kWarp + lane] = of[q];
    __syncthreads();
    const int q = warp;  // each warp adds one class
    static_assert(kHeadClasses == kWarps);
    S sum = 0;
    for (int part = 0; part < kWarps; ++part) sum += partial[(part * kHeadClasses + q) * kWarp + lane];
    if (valid && k0 + q < classes) out[(k0 + q) * stride + column] = T(sum);
    __syncthreads();
  };
  if (args.grad_weight[which]) finish(sums, args.grad_weight[which], head.columns, d, d < head.columns);
  if (has_bias) finish(bias_sums, args.grad_bias[which], 1, 0, lane == 0);
}

// Shared memory of the kernels, in bytes.
template <class T>
int64_t forward_shared(int64_t classes) {
  return kLossParts * kWarps * sizeof(double) + kRows * classes * sizeof(typename Arithmetic<T>::Type) + 32;
}
template <class T>
int64_t features_shared(int64_t classes) {
  return 4 * kRows * classes * sizeof(typename Arithmetic<T>::Type) + 6 * kRows * sizeof(double) + 96;
}
template <class T>
int64_t heads_shared() {
  return kWarps * kHeadClasses * kWarp * sizeof(typename Arithmetic<T>::Type) + 16;
}
// Elements of the arithmetic type that a backward pass needs for z_from and then for `differences`.
template <class T>
int64_t backward_scratch(int64_t rows, int64_t classes) {
  constexpr int64_t kSize = sizeof(typename Arithmetic<T>::Type);
  return 2 * rows + (3 * rows * classes * int64_t(sizeof(T)) + kSize - 1) / kSize;
}
inline int64_t tiles_of(int64_t rows) { return (rows + kRows - 1) / kRows; }
inline int64_t head_blocks(int64_t columns, int64_t classes) {
  return 3 * panels_of(columns) * ((classes + kHeadClasses - 1) / kHeadClasses);
}

}  // namespace iprm::device
