// The softmax part of linear + cross-entropy, on logits that are there; the formulas are in
// llamapro_kernels/linear_cross_entropy.py. Targets were checked there.
#include <cmath>

#include "common.h"

namespace llamapro {
namespace {

constexpr int64_t PIECE = 1024;  // elements whose largest is taken before any is raised to a power

// log sum exp of a row, by an online softmax over pieces that stay in the first cache.
template <class T>
float log_sum_exp(const T* logits, int64_t count) {
  float peak = -INFINITY, total = 0;
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t end = std::min(count, start + PIECE);
    float higher = peak;
#pragma omp simd reduction(max : higher)
    for (int64_t i = start; i < end; ++i) higher = std::max(higher, float(logits[i]));
    const float base = higher == -INFINITY ? 0 : higher;  // -inf - -inf would be NaN
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) sum += exp(float(logits[i]) - base);
    total = total * exp(peak - base) + sum;
    peak = higher;
  }
  return peak + std::log(total);
}

// Logits become (softmax - onehot) * upstream in place.
template <class T>
void to_gradient(T* logits, int64_t count, int64_t target, float lse, float upstream) {
  const float at_target = exp(float(logits[target]) - lse);
  fill_row(logits, count, [&](int64_t i) { return exp(float(logits[i]) - lse) * upstream; });
  logits[target] = (at_target - 1.0f) * upstream;
}

// logits: (rows, V), neighbours in a row; targets: (rows,) int64; losses, lse: (rows,) fp32 or None
// when lse is known already. want_gradient: the logits become their gradient, times dloss (fp32).
void cross_entropy(
    const Tensor& logits, const Tensor& targets, int64_t ignore_index, const Tensor& lse,
    const std::optional<Tensor>& losses, const std::optional<Tensor>& dloss, bool want_gradient) {
  const int64_t* wanted = static_cast<const int64_t*>(targets.data_ptr());
  float* lses = static_cast<float*>(lse.data_ptr());
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(logits);
    parallel_rows(rows.count, rows.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* z = rows[row];
        const int64_t target = wanted[row];
        const bool ignored = target == ignore_index;
        if (losses) {
          lses[row] = log_sum_exp(z, rows.width);
          const float loss = ignored ? 0.0f : lses[row] - float(z[target]);
          static_cast<float*>(losses->data_ptr())[row] = loss;
        }
        if (!want_gradient) continue;
        if (ignored) {
          std::fill_n(z, rows.width, T{});
          continue;
        }
        const float upstream = dloss ? static_cast<const float*>(dloss->data_ptr())[row] : 1.0f;
        to_gradient(z, rows.width, target, lses[row], upstream);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "cross_entropy(Tensor(a!) logits, Tensor targets, int ignore_index, Tensor(b!) lse,"
      " Tensor(c!)? losses, Tensor? dloss, bool want_gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace llamapro
