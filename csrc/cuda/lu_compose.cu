// W = P (L + I) (U + diag(s)), W^-1 and the sum of log|s|, in double whatever the storage, and their gradients: one
// launch each way, in which every block makes some rows or columns of one matrix and waits for no other.
//
// Substitution: a block keeps kColumns columns of the inverse and goes through the rows by panels; every thread solves
// its column's panel for itself, so that a panel costs one barrier.

#include "../include/kernels.h"
#include "lu_compose_product.h"

namespace nf {
namespace cuda {
namespace lu {
namespace {

constexpr int kColumns = 16;        // of an inverse
constexpr int kMostChannels = 512;  // what fits the shared memory of every GPU
constexpr int kWidePanel = 384;     // channels up to which a panel has 8 rows, above 4
NF_FN int padded(int channels) { return (channels + 7) / 8 * 8; }

// Row i's source. An index outside would be somebody else's memory; what it stands for is nobody's.
NF_DEVICE int row_of(const int64_t* permutation, int i, int channels) {
  const int64_t row = permutation ? permutation[i] : i;
  return row < 0 || row >= channels ? i : static_cast<int>(row);
}

// --- forward ---------------------------------------------------------------------------------------------------------

// kRows rows of W from i0 on.
template <typename T>
NF_DEVICE void weight_rows(const LUComposeForward& io, int64_t k, int i0, double* rows) {
  const int channels = static_cast<int>(io.lu.channels);
  const int64_t* permutation = io.lu.permutation ? io.lu.permutation + k * channels : nullptr;
  const T* lower = matrix<T>(io.lu.lower, io.lu, k);
  for (int r = 0; r < kRows; ++r) {
    const int i = i0 + r < channels ? i0 + r : i0;
    const int source = row_of(permutation, i, channels);
    for (int j = static_cast<int>(threadIdx.x); j < channels; j += static_cast<int>(blockDim.x)) {
      const double v = static_cast<double>(lower[static_cast<int64_t>(source) * channels + j]);
      rows[j * kRows + r] = j < source ? v : j == source ? 1.0 : 0.0;
    }
  }
  sync_block();
  T* weight = static_cast<T*>(io.weight) + k * channels * channels;
  for (int n0 = warp() * 32; n0 < channels; n0 += static_cast<int>(blockDim.x)) {
    const int n = n0 + lane(), end = n0 + 32 < channels ? n0 + 32 : channels;
    const double s = n < channels ? diagonal_at<T>(io.lu, k, n) : 0.0;
    double sum[kRows] = {};
    product<false, Part::above>(rows, matrix<T>(io.lu.upper, io.lu, k), channels, n0, 0, end, s,
                                static_cast<T*>(nullptr), sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (n < channels && i0 + r < channels)
        weight[static_cast<int64_t>(i0 + r) * channels + n] = static_cast<T>(sum[r]);
  }
}

// Rows of a panel in shared memory: of L down from row q0 with zeros for its diagonal, or of U up from it with 1 / s.
template <typename T, int panel>
NF_DEVICE void load_panel(const LUFactors& lu, int64_t k, int q0, bool up, double* to) {
  const int channels = static_cast<int>(lu.channels);
  const T* from = matrix<T>(up ? lu.upper : lu.lower, lu, k);
  const int begin = up ? 0 : q0, end = up ? q0 + panel : padded(channels);
  for (int i = begin * panel + static_cast<int>(threadIdx.x); i < end * panel; i += static_cast<int>(blockDim.x)) {
    const int r = i / panel, c = q0 + i % panel;
    double v = 0.0;
    if (r < channels && c < channels) {
      if (up ? r < c : r > c) v = static_cast<double>(from[static_cast<int64_t>(r) * channels + c]);
      if (up && r == c) v = 1.0 / diagonal_at<T>(lu, k, c);
    }
    to[i] = v;
  }
}

// Columns of U^-1 (L + I)^-1 from c0 on, each written where the permutation puts it.
template <typename T, int panel>
NF_DEVICE void inverse_columns(const LUComposeForward& io, int64_t k, int c0, double* shared) {
  const int channels = static_cast<int>(io.lu.channels), height = padded(channels);
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int column = tid % kColumns, group = tid / kColumns, groups = threads / kColumns;
  double* x = shared;  // [height][kColumns]
  double* panels[2] = {x + height * kColumns, x + height * (kColumns + panel)};
  int* place = reinterpret_cast<int*>(x + height * (kColumns + 2 * panel));  // [kColumns]
  for (int i = tid; i < height * kColumns; i += threads) x[i] = i / kColumns == c0 + i % kColumns ? 1.0 : 0.0;
  for (int i = tid; i < kColumns; i += threads) place[i] = c0 + i < channels ? c0 + i : c0;  // were one named twice
  sync_block();
  const int64_t* permutation = io.lu.permutation ? io.lu.permutation + k * channels : nullptr;
  for (int i = tid; i < channels; i += threads) {
    const int to = row_of(permutation, i, channels);
    if (to >= c0 && to < c0 + kColumns) place[to - c0] = i;
  }
  // Down from the first row that is not zero, then up.
  const int downs = (height - c0) / panel, steps = downs + height / panel;
  load_panel<T, panel>(io.lu, k, c0, false, panels[0]);
  sync_block();
  for (int step = 0; step < steps; ++step) {
    const bool up = step >= downs, up_next = step + 1 >= downs;
    const int q0 = up ? height - panel * (step - downs + 1) : c0 + panel * step;
    if (step + 1 < steps)
      load_panel<T, panel>(io.lu, k, up_next ? height - panel * (step - downs + 2) : c0 + panel * (step + 1), up_next,
                           step & 1 ? panels[0] : panels[1]);
    const double* a = step & 1 ? panels[1] : panels[0];
    double solved[panel];
#pragma unroll
    for (int e = 0; e < panel; ++e) solved[e] = x[(q0 + e) * kColumns + column];
    if (up) {
#pragma unroll
      for (int e = panel - 1; e >= 0; --e) {
#pragma unroll
        for (int f = e + 1; f < panel; ++f) solved[e] -= a[(q0 + e) * panel + f] * solved[f];
        solved[e] *= a[(q0 + e) * panel + e];
      }
    } else {
#pragma unroll
      for (int e = 1; e < panel; ++e)
#pragma unroll
        for (int f = 0; f < e; ++f) solved[e] -= a[(q0 + e) * panel + f] * solved[f];
    }
    const int begin = up ? 0 : q0 + panel, end = up ? q0 : height;
#pragma unroll 2
    for (int r = begin + group; r < end; r += groups) {
      double v = x[r * kColumns + column];
#pragma unroll
      for (int e = 0; e < panel; e += 2) {
        const Pack<double, 2> pair = load_pack<2>(a + r * panel + e);
        v -= pair[0] * solved[e];
        v -= pair[1] * solved[e + 1];
      }
      x[r * kColumns + column] = v;
    }
    sync_block();  // all have read the panel's rows: now they may become the solution
    if (group == 0) {
#pragma unroll
      for (int e = 0; e < panel; ++e) x[(q0 + e) * kColumns + column] = solved[e];
    }
    if (up != up_next || step + 1 == steps) sync_block();  // the last panel down is the first one up
  }
  if (c0 + column >= channels) return;
  T* inverse = static_cast<T*>(io.inverse) + k * channels * channels + place[column];
  for (int r = group; r < channels; r += groups)
    inverse[static_cast<int64_t>(r) * channels] = static_cast<T>(x[r * kColumns + column]);
}

// The sum of log|s| over all matrices, in an order that the sizes alone fix.
template <typename T>
NF_DEVICE void sum_logs(const LUComposeForward& io, double* sums) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t n = io.lu.count * io.lu.channels;
  const T* raw = static_cast<const T*>(io.lu.log_s);
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = tid; i < n; i += threads) {
    const double r = static_cast<double>(raw[i]);
    sum += diagonal_log(io.lu.diagonal, r, diagonal_value(io.lu.diagonal, r, 1.0, io.lu.eps));
  }
  sums[tid] = sum;
  for (int half = threads / 2; half > 0; half /= 2) {
    sync_block();
    if (tid < half) sums[tid] += sums[tid + half];
  }
  if (tid == 0) *static_cast<T*>(io.logdet) = static_cast<T>(sums[0]);
}

template <typename T, int panel>
__global__ __launch_bounds__(kMostThreads) void compose(LUComposeForward io, int weights, int inverses) {
  NF_SHARED(double, shared);
  const int per_matrix = weights + inverses;
  const int64_t k = per_matrix ? blockIdx.x / static_cast<unsigned>(per_matrix) : io.lu.count;
  if (k == io.lu.count) {  // the last block
    sum_logs<T>(io, shared);
    return;
  }
  const int part = static_cast<int>(blockIdx.x - k * per_matrix);
  if (part < inverses)  // these take longest
    inverse_columns<T, panel>(io, k, part * kColumns, shared);
  else
    weight_rows<T>(io, k, (part - inverses) * kRows, shared);
}

template <typename T>
void forward(const LUComposeForward& io, const Launch& on) {
  const int channels = static_cast<int>(io.lu.channels), height = padded(channels), threads = threads_for(channels);
  const int weights = io.weight ? (channels + kRows - 1) / kRows : 0;
  const int inverses = io.inverse ? (channels + kColumns - 1) / kColumns : 0;
  const int64_t blocks = io.lu.count * (weights + inverses) + (io.logdet ? 1 : 0);
  const int panel = channels <= kWidePanel ? 8 : 4;
  size_t shared = threads * sizeof(double);
  if (weights && shared < channels * kRows * sizeof(double)) shared = channels * kRows * sizeof(double);
  const size_t columns = height * (kColumns + 2 * panel) * sizeof(double) + kColumns * sizeof(int);
  if (inverses && shared < columns) shared = columns;
  if (panel == 8)
    launch(compose<T, 8>, on, blocks, threads, shared, io, weights, inverses);
  else
    launch(compose<T, 4>, on, blocks, threads, shared, io, weights, inverses);
}

// --- backward --------------------------------------------------------------------------------------------------------

// With Z = dW - V^T dV V^T and G = P^T Z. `down`: from kRows columns of Z, the columns of dU = triu(L^T G) and dlog_s;
// else from kRows rows of Z, the rows of dL = tril(G U^T). The two are one another's transposes but for their factors.
template <typename T, bool down>
NF_DEVICE void gradients(const LUComposeBackward& io, int64_t k, int i0, bool wide, double* rows) {
  const int channels = static_cast<int>(io.lu.channels), threads = static_cast<int>(blockDim.x);
  const int64_t* permutation = io.lu.permutation ? io.lu.permutation + k * channels : nullptr;
  double* through = rows + channels * kRows;
  T* stage = reinterpret_cast<T*>(rows + channels * kRows * (io.dinverse ? 2 : 1)) + warp() * kStage;
  const bool any = io.dweight || io.dinverse;
  const T *v = matrix<T>(io.inverse, io.lu, k), *dv = matrix<T>(io.dinverse, io.lu, k);
  const T* dw = matrix<T>(io.dweight, io.lu, k);
  if (io.dinverse) {
    for (int i = static_cast<int>(threadIdx.x); i < channels * kRows; i += threads) {
      // Neighbouring threads read neighbours.
      const int j = down ? i % channels : i / kRows, r = down ? i / channels : i % kRows;
      const int64_t at =
          down ? static_cast<int64_t>(i0 + r) * channels + j : static_cast<int64_t>(j) * channels + i0 + r;
      rows[j * kRows + r] = i0 + r < channels ? static_cast<double>(v[at]) : 0.0;
    }
    sync_block();
    for (int n0 = warp() * 32; n0 < channels; n0 += threads) {
      double sum[kRows] = {};
      product<down, Part::whole>(rows, dv, channels, n0, 0, channels, 0.0, stage, sum);
      if (n0 + lane() < channels) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) through[(n0 + lane()) * kRows + r] = sum[r];
      }
    }
    sync_block();
  }
  for (int n0 = warp() * 32; any && n0 < channels; n0 += threads) {
    const int n = n0 + lane();
    double sum[kRows] = {};
    if (io.dinverse) product<!down, Part::whole>(through, v, channels, n0, 0, channels, 0.0, stage, sum);
    if (n < channels) {
      double* to = rows + (down ? row_of(permutation, n, channels) : n) * kRows;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at =
            down ? static_cast<int64_t>(n) * channels + i0 + r : static_cast<int64_t>(i0 + r) * channels + n;
        to[r] = (io.dweight && i0 + r < channels ? static_cast<double>(dw[at]) : 0.0) - sum[r];
      }
    }
  }
  sync_block();
  // Where the results' rows (`down`: columns) belong; past the last, nowhere.
  int target[kRows], most = -1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    target[r] = -1;
    if (i0 + r < channels) target[r] = down ? i0 + r : row_of(permutation, i0 + r, channels);
    most = target[r] > most ? target[r] : most;
  }
  for (int n0 = warp() * 32; n0 < channels; n0 += threads) {
    const int n = n0 + lane();
    const double s = n < channels ? diagonal_at<T>(io.lu, k, n) : 0.0;
    double sum[kRows] = {};
    if (any && n0 <= most) {
      const T* factor = matrix<T>(down ? io.lu.lower : io.lu.upper, io.lu, k);
      product<!down, Part::below>(rows, factor, channels, n0, n0, channels, down ? 1.0 : s, stage, sum);
    }
    if (n >= channels) continue;
    if constexpr (!down) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (target[r] >= 0)
          static_cast<T*>(io.dlower)[(k * channels + target[r]) * channels + n] =
              n < target[r] ? static_cast<T>(sum[r]) : T(0);
    } else {
      if (n >= i0 && n < i0 + kRows) {
        const double raw = static_cast<double>(static_cast<const T*>(io.lu.log_s)[k * channels + n]);
        const double slope = diagonal_slope(io.lu.diagonal, raw, s);
        double d = 0.0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) d = n == i0 + r && any ? sum[r] * slope : d;
        if (io.dlogdet)
          d += static_cast<double>(*static_cast<const T*>(io.dlogdet)) *
               (io.lu.diagonal == Diagonal::exp ? 1.0 : slope / s);
        static_cast<T*>(io.dlog_s)[k * channels + n] = static_cast<T>(d);
      }
      T* to = static_cast<T*>(io.dupper) + (k * channels + n) * channels + i0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = n < i0 + r ? sum[r] : 0.0;
      if (wide) {
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          Pack<T, 4> pack;
#pragma unroll
          for (int e = 0; e < 4; ++e) pack[e] = static_cast<T>(sum[r + e]);
          if (i0 + r < channels) store_pack<4>(to + r, pack);
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (i0 + r < channels) to[r] = static_cast<T>(sum[r]);
      }
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kMostThreads) void differentiate(LUComposeBackward io, int tiles, bool wide) {
  NF_SHARED(double, shared);
  const int64_t k = blockIdx.x / static_cast<unsigned>(2 * tiles);
  const int part = static_cast<int>(blockIdx.x - k * 2 * tiles);
  if (part < tiles)
    gradients<T, false>(io, k, part * kRows, wide, shared);
  else
    gradients<T, true>(io, k, (part - tiles) * kRows, wide, shared);
}

template <typename T>
void backward(const LUComposeBackward& io, const Launch& on) {
  const int channels = static_cast<int>(io.lu.channels), threads = threads_for(channels);
  const int tiles = (channels + kRows - 1) / kRows;
  const size_t shared = channels * kRows * sizeof(double) * (io.dinverse ? 2 : 1) + threads / 32 * kStage * sizeof(T);
  const bool wide = channels % 4 == 0 && reinterpret_cast<uintptr_t>(io.dupper) % 16 == 0;
  launch(differentiate<T>, on, io.lu.count * 2 * tiles, threads, shared, io, tiles, wide);
}

void check(const LUFactors& lu) {
  if (lu.channels > kMostChannels)
    throw std::runtime_error("nfkernels: lu_compose's CUDA kernels take up to " + std::to_string(kMostChannels) +
                             " channels, got " + std::to_string(lu.channels));
}

}  // namespace
}  // namespace lu

void lu_compose_forward(const LUComposeForward& io, const Launch& on) {
  lu::check(io.lu);
  io.lu.data == DType::f64 ? lu::forward<double>(io, on) : lu::forward<float>(io, on);
}

void lu_compose_backward(const LUComposeBackward& io, const Launch& on) {
  lu::check(io.lu);
  io.lu.data == DType::f64 ? lu::backward<double>(io, on) : lu::backward<float>(io, on);
}

}  // namespace cuda
}  // namespace nf
