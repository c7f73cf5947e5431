// Rows in 8 bits and back; the formulas are in llamapro_kernels/quantize.py.
#include <cmath>
#include <limits>

#include "common.h"

namespace llamapro {
namespace {

constexpr uint32_t SMALLEST_NORMAL = 0x3c800000;  // the bits of 2^-6, the least that is not subnormal

// e4m3 of a number of at most 448, rounded to nearest even.
inline uint8_t encoded(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), size = bits & 0x7fffffff;
  const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  // Of 2^14 the last bit is worth 2^-9, as that of a subnormal number is.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(size) + 0x1p14f) - 0x46800000;
  const uint32_t code = size < SMALLEST_NORMAL ? subnormal : normal;
  return static_cast<uint8_t>((size > 0x7f800000 ? 0x7f : code) | (bits >> 24 & 0x80));
}

inline float decoded(uint8_t code) {
  const uint32_t size = code & 0x7f;
  const float normal = bit_cast<float>((size << 20) + (120u << 23));
  const float value = size < 8 ? static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f : normal;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return size == 0x7f ? nan : bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

// The exponent's bits of the smallest power of two of which 448 times are at least `peak`.
inline uint32_t exponent_bits(float peak) {
  const uint32_t bits = (bit_cast<uint32_t>(peak) + 0x1fffff) >> 23;
  return bits > 8 ? bits - 8 : 1;
}

template <class T>
void quantize_rows_of(const Tensor& x, const float* columns, const Tensor& values, float* scale) {
  const Rows<T> from(x);
  const Rows<uint8_t> to(values);
  const int64_t width = from.width;
  parallel_rows(from.count, width, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    std::vector<float> row(width);
    for (int64_t i = begin; i < end; ++i) {
      const T* numbers = neighbours<T>(from[i], width, from.column_stride, scratch);
      uint32_t most = 0;  // sizes are ordered as their bits are, NaN above infinity
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < width; ++j) {
        const float value = columns ? float(numbers[j]) * columns[j] : float(numbers[j]);
        row[j] = value;
        most = std::max(most, bit_cast<uint32_t>(value) & 0x7fffffff);
      }
      const bool finite = most < 0x7f800000;
      const uint32_t exponent = exponent_bits(bit_cast<float>(most));
      const float inverse = bit_cast<float>((254 - exponent) << 23);
      scale[i] = finite ? bit_cast<float>(exponent << 23) : std::numeric_limits<float>::quiet_NaN();
      uint8_t* out = to[i];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[j] = encoded(row[j] * inverse);
    }
  });
}

template <class T>
void dequantize_rows_of(const Tensor& values, const float* scale, const Tensor& y) {
  const Rows<uint8_t> from(values);
  const Rows<T> to(y);
  parallel_rows(from.count, from.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* codes = from[i];
      const float factor = scale ? scale[i] : 1.0f;
      fill_row(to[i], from.width, [&](int64_t j) { return decoded(codes[j]) * factor; });
    }
  });
}

const float* numbers_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

// x: (rows, width); columns: contiguous fp32 (width,) or none; values: contiguous bytes like x;
// scale: contiguous fp32 (rows,).
void quantize_rows(const Tensor& x, const std::optional<Tensor>& columns, const Tensor& values,
                   const Tensor& scale) {
  dispatch(x, [&](auto zero) {
    quantize_rows_of<decltype(zero)>(x, numbers_of(columns), values,
                                     static_cast<float*>(scale.data_ptr()));
  });
}

// values: (rows, width) bytes, neighbours in a row; scale as above or none; y: contiguous.
void dequantize_rows(const Tensor& values, const std::optional<Tensor>& scale, const Tensor& y) {
  dispatch(y, [&](auto zero) {
    dequantize_rows_of<decltype(zero)>(values, numbers_of(scale), y);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def("quantize_rows(Tensor x, Tensor? columns, Tensor(a!) values, Tensor(b!) scale) -> ()");
  library.def("dequantize_rows(Tensor values, Tensor? scale, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  library.impl("dequantize_rows", TORCH_BOX(&dequantize_rows));
}

}  // namespace llamapro
