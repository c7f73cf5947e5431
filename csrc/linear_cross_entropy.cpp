// The softmax part of linear + cross-entropy, on logits that are there; the formulas are in
// llamapro_kernels/linear_cross_entropy.py. Targets were checked there.
#include "softmax.h"

namespace llamapro {
namespace {

// Logits become (softmax - onehot) * upstream in place.
template <class T>
void to_gradient(T* logits, int64_t count, int64_t target, Stats stats, float upstream) {
  const auto p = [&](int64_t i) { return exp(float(logits[i]) - stats.peak - stats.log_total); };
  const float at_target = p(target);
  fill_row(logits, count, [&](int64_t i) { return p(i) * upstream; });
  logits[target] = (at_target - 1.0f) * upstream;
}

// logits: (rows, V), neighbours in a row; targets: (rows,) int64; peaks, log_totals, losses: (rows,)
// fp32; losses is None when the other two are known already. want_gradient: the logits become their
// gradient, times dloss (fp32).
void cross_entropy(
    const Tensor& logits, const Tensor& targets, int64_t ignore_index, const Tensor& peaks,
    const Tensor& log_totals, const std::optional<Tensor>& losses,
    const std::optional<Tensor>& dloss, bool want_gradient) {
  const int64_t* wanted = static_cast<const int64_t*>(targets.data_ptr());
  float* peak = static_cast<float*>(peaks.data_ptr());
  float* log_total = static_cast<float*>(log_totals.data_ptr());
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(logits);
    parallel_rows(rows.count, rows.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* z = rows[row];
        const int64_t target = wanted[row];
        const bool ignored = target == ignore_index;
        if (losses) {
          const Stats stats = stats_of(z, rows.width);
          peak[row] = stats.peak;
          log_total[row] = stats.log_total;
          const float loss = ignored ? 0.0f : stats.peak - float(z[target]) + stats.log_total;
          static_cast<float*>(losses->data_ptr())[row] = loss;
        }
        if (!want_gradient) continue;
        if (ignored) {
          std::fill_n(z, rows.width, T{});
          continue;
        }
        const float upstream = dloss ? static_cast<const float*>(dloss->data_ptr())[row] : 1.0f;
        to_gradient(z, rows.width, target, {peak[row], log_total[row]}, upstream);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "cross_entropy(Tensor(a!) logits, Tensor targets, int ignore_index, Tensor(b!) peaks,"
      " Tensor(c!) log_totals, Tensor(d!)? losses, Tensor? dloss, bool want_gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace llamapro
