// SwiGLU on a packed projection; the formulas are in llamapro_kernels/swiglu.py.
#include "common.h"

namespace llamapro {
namespace {

template <class T>
void forward_rows(const Tensor& gate_up, const Tensor& y) {
  const Rows<T> packed(gate_up), ys(y);
  const int64_t width = ys.width;
  parallel_rows(ys.count, width, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = neighbours<T>(packed[row], 2 * width, packed.column_stride, scratch);
      const T* up = gate + width;
      T* out = ys[row];
      fill_row(out, width, [&](int64_t i) {
        const float g = gate[i];
        return g / (1.0f + exp(-g)) * float(up[i]);
      });
    }
  });
}

template <class T>
void backward_rows(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  const Rows<T> dys(dy), packed(gate_up), grads(dgate_up);
  const int64_t width = dys.width;
  parallel_rows(dys.count, width, [&](int64_t begin, int64_t end) {
    std::vector<T> dy_scratch, scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = neighbours<T>(packed[row], 2 * width, packed.column_stride, scratch);
      const T* grad = neighbours<T>(dys[row], width, dys.column_stride, dy_scratch);
      const T* up = gate + width;
      T* dgate = grads[row];
      T* dup = dgate + width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float g = gate[i], d = grad[i];
        const float sigmoid = 1.0f / (1.0f + exp(-g));
        dgate[i] = d * float(up[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid));
        dup[i] = d * g * sigmoid;
      }
    }
  });
}

// gate_up: (rows, 2 width); y: contiguous (rows, width).
void swiglu_forward(const Tensor& gate_up, const Tensor& y) {
  dispatch(gate_up, [&](auto zero) { forward_rows<decltype(zero)>(gate_up, y); });
}

// dy: (rows, width); gate_up: (rows, 2 width); dgate_up: contiguous like gate_up.
void swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  dispatch(gate_up, [&](auto zero) { backward_rows<decltype(zero)>(dy, gate_up, dgate_up); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def("swiglu_forward(Tensor gate_up, Tensor(a!) y) -> ()");
  library.def("swiglu_backward(Tensor dy, Tensor gate_up, Tensor(a!) dgate_up) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace llamapro
