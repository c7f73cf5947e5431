// The softmax part of linear + KL divergence, on logits that are there; the formulas are in
// llamapro_kernels/linear_kl_divergence.py.
#include "softmax.h"

namespace llamapro {
namespace {

// log softmax of logits times `scale`.
template <class T>
struct LogSoftmax {
  const T* logits;
  float scale;
  Stats stats;

  float operator()(int64_t i) const {
    return scale * (float(logits[i]) - stats.peak) - stats.log_total;
  }
};

// sum p (log p - log q)
template <class T>
float divergence(const LogSoftmax<T>& log_p, const LogSoftmax<T>& log_q, int64_t count) {
  float total = 0;
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t end = std::min(count, start + PIECE);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {
      const float p = log_p(i), term = exp(p) * (p - log_q(i));
      sum += p == -INFINITY ? 0 : term;
    }
    total += sum;
  }
  return total;
}

// student, teacher: logits (rows, V), neighbours in a row; mask: (rows,) bool; peaks, log_totals,
// those of the teacher, and losses: (rows,) fp32; losses is None when the others are known already.
// want_gradient: the student's logits become their gradient, times dloss (fp32).
void kl_divergence(
    const Tensor& student, const Tensor& teacher, const Tensor& mask, const Tensor& peaks,
    const Tensor& log_totals, const Tensor& teacher_peaks, const Tensor& teacher_log_totals,
    const std::optional<Tensor>& losses, const std::optional<Tensor>& dloss, double inverse_temperature,
    bool want_gradient) {
  const float scale = static_cast<float>(inverse_temperature);
  const bool* counts = static_cast<const bool*>(mask.data_ptr());
  float* stats[] = {
      static_cast<float*>(peaks.data_ptr()), static_cast<float*>(log_totals.data_ptr()),
      static_cast<float*>(teacher_peaks.data_ptr()),
      static_cast<float*>(teacher_log_totals.data_ptr())};
  dispatch(student, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> ours(student), theirs(teacher);
    parallel_rows(ours.count, 2 * ours.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* z = ours[row];
        const T* t = theirs[row];
        if (losses) {
          const Stats own = stats_of(z, ours.width, scale);
          const Stats other = stats_of(t, ours.width, scale);
          stats[0][row] = own.peak;
          stats[1][row] = own.log_total;
          stats[2][row] = other.peak;
          stats[3][row] = other.log_total;
        }
        const LogSoftmax<T> log_q{z, scale, {stats[0][row], stats[1][row]}};
        const LogSoftmax<T> log_p{t, scale, {stats[2][row], stats[3][row]}};
        if (losses) {
          const float loss = counts[row] ? divergence(log_p, log_q, ours.width) : 0.0f;
          static_cast<float*>(losses->data_ptr())[row] = loss;
        }
        if (!want_gradient) continue;
        if (!counts[row]) {
          std::fill_n(z, ours.width, T{});
          continue;
        }
        const float upstream =
            scale * (dloss ? static_cast<const float*>(dloss->data_ptr())[row] : 1.0f);
        fill_row(z, ours.width, [&](int64_t i) {
          return (exp(log_q(i)) - exp(log_p(i))) * upstream;
        });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "kl_divergence(Tensor(a!) student, Tensor teacher, Tensor mask, Tensor(b!) peaks,"
      " Tensor(c!) log_totals, Tensor(d!) teacher_peaks, Tensor(e!) teacher_log_totals,"
      " Tensor(f!)? losses, Tensor? dloss, float scale, bool want_gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("kl_divergence", TORCH_BOX(&kl_divergence));
}

}  // namespace llamapro
