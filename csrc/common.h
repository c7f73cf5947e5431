// What the ops on a CPU share: element types, rows of tensors, 2^x, parallel loops, checks.
//
// Every source is compiled once for each instruction set (see setup.py), and the build that suits
// the machine is loaded. So nothing here chooses one: the compiler's own macros say what there is.
// The loops are plain, for the compiler to vectorize; sums are in fp32.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace llamapro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 16-bit numbers, rounded to nearest even as PyTorch does. They take a float by assignment, for a
// temporary object would keep the compiler from vectorizing the loop.
struct BFloat16 {
  uint16_t bits;

  void operator=(float value) {
    const uint32_t full = bit_cast<uint32_t>(value);
    const uint32_t rounded = (full + 0x7fff + ((full >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
  }
  operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  void operator=(float value) {
    bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(value);
  }
  operator float() const { return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits); }
};

// 2^x for x of -1/2 to 1/2: the minimax polynomial of those that are 1 at 0, so that where one key
// has all the weight, it has a weight of 1.
template <class Float>
inline Float exp2_of_rest(Float x) {
  Float p = Float{} + 0.00132647272f;
  p = p * x + 0.00967151264f;
  p = p * x + 0.0555073374f;
  p = p * x + 0.240222421f;
  p = p * x + 0.693146978f;
  return p * x + 1.0f;
}

// 2^x to two ulp, for a float or a vector of them: 2^round(x) by the exponent's bits, times 2^rest.
// Below 2^-126 it is 0; NaN and infinity go through.
template <class Float, class Int>
inline Float exp2(Float x) {
  const Float least = Float{} - 127.0f, most = Float{} + 128.0f;
  const Float low = least > x ? least : x;  // in this order, so that NaN stays
  const Float bounded = most < low ? most : low;
  const Float shifted = bounded + 12582912.0f;  // 1.5 * 2^23: the integer part is in the low bits
  const Float power = exp2_of_rest(bounded - (shifted - 12582912.0f));
  const Int exponent = (bit_cast<Int>(shifted) << 23) + 0x3f800000;  // of -127 these bits are 0.0
  return power * bit_cast<Float>(exponent);
}

#ifdef __AVX512BF16__
// Compilers know no instruction that rounds to bf16: it is named.
inline void round_vector(__m512 from, BFloat16* to) {
  const __m256bh rounded = _mm512_cvtneps_pbh(from);
  std::memcpy(to, &rounded, sizeof(rounded));
}
#endif

inline void round_row(const float* from, int64_t count, BFloat16* to) {
  int64_t start = 0;
#ifdef __AVX512BF16__
  for (; start + 16 <= count; start += 16) round_vector(_mm512_loadu_ps(from + start), to + start);
#endif
  for (int64_t i = start; i < count; ++i) to[i] = from[i];
}

// The same around the cache, for results that are too many to be found there again: a store into
// the cache reads first what it replaces. Followed by `finish_streams`.
inline void stream_row(const float* from, int64_t count, BFloat16* to) {
  int64_t start = 0;
#ifdef __AVX512BF16__
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
    for (; start + 32 <= count; start += 32) {
      const __m512 low = _mm512_loadu_ps(from + start), high = _mm512_loadu_ps(from + start + 16);
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + start), (__m512i)rounded);
    }
#endif
  round_row(from + start, count - start, to + start);
}

inline void finish_streams() {
#ifdef __AVX512BF16__
  _mm_sfence();
#endif
}

// to[i] = function(i), rounded.
template <class T, class Function>
inline void fill_row(T* to, int64_t count, const Function& function) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int64_t BLOCK = 256;
    alignas(64) float block[BLOCK];
    for (int64_t start = 0; start < count; start += BLOCK) {
      const int64_t size = std::min(BLOCK, count - start);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) block[i] = function(start + i);
      round_row(block, size, to + start);
    }
    return;
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = function(i);
}

inline float exp(float x) { return exp2<float, int32_t>(x * 1.442695041f); }

// Calls function(T{}) with the element type of a tensor.
template <class Function>
inline void dispatch(const Tensor& tensor, Function function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Half{});
    default:
      STD_TORCH_CHECK(false, "float32, bfloat16 or float16 expected, got ", tensor.scalar_type());
  }
}

// A matrix as it lies in memory.
template <class T>
struct Rows {
  T* data;
  int64_t count, width, row_stride, column_stride;

  Rows(T* data, int64_t count, int64_t width, int64_t row_stride, int64_t column_stride)
      : data(data),
        count(count),
        width(width),
        row_stride(row_stride),
        column_stride(column_stride) {}

  explicit Rows(const Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())),
        count(tensor.size(0)),
        width(tensor.size(1)),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {
    STD_TORCH_CHECK(tensor.dim() == 2, "a matrix expected, got ", tensor.dim(), " dimensions");
  }

  T* operator[](int64_t row) const { return data + row * row_stride; }
};

// Asking a tensor takes as long as a hundred elements: it is done once, not for each row.
template <class T>
inline std::optional<Rows<T>> rows_of(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Rows<T>>(*tensor) : std::nullopt;
}

// `count` elements that lie `stride` apart: in place where they are neighbours, or in `scratch`.
template <class T>
inline const T* neighbours(const T* data, int64_t count, int64_t stride, std::vector<T>& scratch) {
  if (stride == 1) return data;
  scratch.resize(count);
  for (int64_t i = 0; i < count; ++i) scratch[i] = data[i * stride];
  return scratch.data();
}

// function(begin, end) in parallel for rows of `width` elements, at least a few pages a thread.
template <class Function>
inline void parallel_rows(int64_t rows, int64_t width, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, function);
}

}  // namespace llamapro
