// RMSNorm, alone or of a sum; the formulas are in llamapro_kernels/rms_norm.py.
#include <cmath>

#include "common.h"

namespace llamapro {
namespace {

template <class T>
void forward_rows(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, float eps,
    const Tensor& y, const std::optional<Tensor>& total, const Tensor& rstd) {
  const Rows<T> xs(x), ys(y);
  const auto more = rows_of<T>(residual), sums = rows_of<T>(total);
  const float* w = static_cast<const float*>(weight.data_ptr());
  float* scales = static_cast<float*>(rstd.data_ptr());
  const int64_t width = xs.width;
  parallel_rows(xs.count, width, [&](int64_t begin, int64_t end) {
    std::vector<T> x_scratch, residual_scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* value = neighbours<T>(xs[row], width, xs.column_stride, x_scratch);
      if (more) {  // the sum is rounded before it is normed, as the two steps apart would do
        const T* added = neighbours<T>((*more)[row], width, more->column_stride, residual_scratch);
        T* sum = (*sums)[row];
        fill_row(sum, width, [&](int64_t i) { return float(value[i]) + float(added[i]); });
        value = sum;
      }
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += float(value[i]) * float(value[i]);
      const float scale = 1.0f / std::sqrt(squares / width + eps);
      T* out = ys[row];
      fill_row(out, width, [&](int64_t i) { return float(value[i]) * scale * w[i]; });
      scales[row] = scale;
    }
  });
}

// dx of one row, with the gradient of the sum itself added where there is one.
template <class T>
void backward_row(
    const T* dy, const T* x, const T* dtotal, const float* w, float scale, int64_t width, T* dx) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < width; ++i) dot += float(dy[i]) * w[i] * float(x[i]);
  const float mean = dot * scale / width;
  const auto own = [&](int64_t i) {
    return scale * (float(dy[i]) * w[i] - float(x[i]) * scale * mean);
  };
  if (dtotal) fill_row(dx, width, [&](int64_t i) { return own(i) + float(dtotal[i]); });
  else fill_row(dx, width, own);
}

template <class T>
void backward_rows(
    const Tensor& dy, const std::optional<Tensor>& dtotal, const Tensor& x,
    const std::optional<Tensor>& weight, const Tensor& rstd, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& partial) {
  const Rows<T> dys(dy), xs(x);
  const auto sums = rows_of<T>(dtotal), dxs = rows_of<T>(dx);
  const float* scales = static_cast<const float*>(rstd.data_ptr());
  const float* w = weight ? static_cast<const float*>(weight->data_ptr()) : nullptr;
  const int64_t width = xs.width;
  const auto rows = [&](int64_t begin, int64_t end, float* dweight) {
    std::vector<T> dy_scratch, x_scratch, dtotal_scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* value = neighbours<T>(xs[row], width, xs.column_stride, x_scratch);
      const T* grad = neighbours<T>(dys[row], width, dys.column_stride, dy_scratch);
      const float scale = scales[row];
      if (dxs) {
        const T* added = nullptr;
        if (sums) added = neighbours<T>((*sums)[row], width, sums->column_stride, dtotal_scratch);
        backward_row(grad, value, added, w, scale, width, (*dxs)[row]);
      }
      if (dweight) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) dweight[i] += float(grad[i]) * float(value[i]) * scale;
      }
    }
  };
  if (!partial) {
    parallel_rows(xs.count, width, [&](int64_t begin, int64_t end) { rows(begin, end, nullptr); });
    return;
  }
  // A row of `partial` sums its share of the rows, whichever thread has it.
  const Rows<float> parts(*partial);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(parts[part], width, 0.0f);
      rows(xs.count * part / parts.count, xs.count * (part + 1) / parts.count, parts[part]);
    }
  });
}

// x, residual: (rows, width); weight: (width,) fp32; y, total: contiguous like x; rstd: (rows,) in
// fp32.
void rms_norm_forward(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
    const Tensor& y, const std::optional<Tensor>& total, const Tensor& rstd) {
  dispatch(x, [&](auto zero) {
    forward_rows<decltype(zero)>(x, residual, weight, static_cast<float>(eps), y, total, rstd);
  });
}

// dy, dtotal, x: (rows, width); dx: contiguous like x, where wanted; weight (fp32) goes with it.
// partial: (parts, width) fp32, where dweight is wanted.
void rms_norm_backward(
    const Tensor& dy, const std::optional<Tensor>& dtotal, const Tensor& x,
    const std::optional<Tensor>& weight, const Tensor& rstd, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& partial) {
  dispatch(x, [&](auto zero) {
    backward_rows<decltype(zero)>(dy, dtotal, x, weight, rstd, dx, partial);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) y,"
      " Tensor(b!)? total, Tensor(c!) rstd) -> ()");
  library.def(
      "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor rstd,"
      " Tensor(a!)? dx, Tensor(b!)? partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace llamapro
