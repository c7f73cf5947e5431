// Rotary embedding of q or k; the formulas are in llamapro_kernels/rope.py.
#include "common.h"

namespace llamapro {
namespace {

// The two halves of one head, which may be rotated in place; sign is -1 for the opposite angle.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, float sign, int64_t half, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i], s = sign * sin[i];
    out[i] = first * cos[i] - second * s;
    out[half + i] = second * cos[i] + first * s;
  }
}

// x, out: (B, T, H, D), one tensor or two apart; cos, sin: contiguous (T, D) or (B, T, D), fp32. In
// out the numbers of a head are neighbours.
void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, double sign, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 4, "x (B, T, H, D) expected, got ", x.dim(), " dimensions");
  const int64_t length = x.size(1), heads = x.size(2), dim = x.size(3);
  STD_TORCH_CHECK(
      dim < 2 || out.stride(3) == 1, "out with steps of 1 expected, got ", out.stride(3));
  const int64_t stride[] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const int64_t out_stride[] = {out.stride(0), out.stride(1), out.stride(2)};
  const float* cosines = static_cast<const float*>(cos.data_ptr());
  const float* sines = static_cast<const float*>(sin.data_ptr());
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* all = static_cast<const T*>(x.data_ptr());
    T* rotated = static_cast<T*>(out.data_ptr());
    parallel_rows(x.size(0) * length, heads * dim, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch;
      for (int64_t token = begin; token < end; ++token) {
        const int64_t time = token % length;
        const T* from = all + token / length * stride[0] + time * stride[1];
        T* to = rotated + token / length * out_stride[0] + time * out_stride[1];
        const int64_t angles = (cos.dim() == 3 ? token : time) * dim;
        for (int64_t head = 0; head < heads; ++head) {
          const T* row = neighbours(from + head * stride[2], dim, stride[3], scratch);
          T* target = to + head * out_stride[2];
          rotate(
              row, cosines + angles, sines + angles, static_cast<float>(sign), dim / 2, target);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def("rope(Tensor x, Tensor cos, Tensor sin, float sign, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("rope", TORCH_BOX(&rope));
}

}  // namespace llamapro
