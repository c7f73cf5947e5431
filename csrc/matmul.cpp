// Matrix products in bf16, for CPUs with AMX: llamapro_kernels/matmul.py says when they are used.
//
// A task is some columns of the result, and a part of its rows. It packs the columns of B itself; A
// is taken as it lies, or packed before for all tasks.
#include "packer.h"

namespace llamapro {
namespace {

constexpr int64_t WIDE = 320, DEEP = 1024;  // of B, at most so much is packed at a time
constexpr int64_t PACKED = 1 << 22;  // numbers of A, likewise
constexpr int64_t STRIP = 32;  // rows that are multiplied at a time
constexpr int64_t CACHED = 1 << 19;  // a result of more numbers is not found in a cache again

using Element = ElementOf<BFloat16>::type;
using Matrix = Rows<BFloat16>;

inline Matrix part(const Matrix& of, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {of[row] + column * of.column_stride, rows, columns, of.row_stride, of.column_stride};
}

inline Matrix transposed(const Matrix& of) {
  return {of.data, of.width, of.count, of.column_stride, of.row_stride};
}

inline bool runs_down(const Matrix& of) { return of.column_stride != 1 && of.row_stride == 1; }

template <class Function>
void in_steps(int64_t count, int64_t step, const Function& function) {
  torch::stable::parallel_for(0, (count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i * step, std::min(step, count - i * step));
  });
}

// A as (rows, elements), in place where it can be. Packed rows do not share a set of the cache.
class PackedRows {
 public:
  explicit PackedRows(const Matrix& a)
      : in_place_(a.count % STRIP ? std::nullopt : Packer<BFloat16>(a.width, 0).rows_in_place(a)),
        stride_(round_up(a.width, 64) / Element::WIDTH + 16),
        data_(in_place_ ? 0 : round_up(a.count, STRIP) * stride_) {
    if (in_place_) return;
    if (runs_down(a)) {
      in_steps(a.count, 256, [&](int64_t row, int64_t rows) { pack_columns(a, row, rows); });
    } else {
      in_steps(a.count, STRIP, [&](int64_t row, int64_t rows) {
        Packer<BFloat16>(a.width, 0).pack_rows(a, row, rows, from(row, 0));
      });
    }
  }

  Operand from(int64_t row, int64_t depth) const {
    Operand at = in_place_ ? *in_place_ : Operand{data_, stride_};
    at.data = at.row(row) + depth / Element::WIDTH;
    return at;
  }

 private:
  void pack_columns(const Matrix& a, int64_t row, int64_t rows) {
    constexpr int64_t DEPTH = 64;
    Packer<BFloat16> packer(rows, DEPTH);
    const Matrix columns = transposed(part(a, row, rows, 0, a.width));
    for (int64_t k = 0; k < a.width; k += DEPTH)
      packer.pack_interleaved_columns(columns, k, std::min(DEPTH, a.width - k), from(row, k));
  }

  std::optional<Operand> in_place_;
  int64_t stride_;
  Buffer data_;
};

// b as (elements, columns).
void pack_columns(const Matrix& b, Operand to) {
  if (!runs_down(b)) return Packer<BFloat16>(b.width, 0).pack_interleaved(b, 0, b.count, to);
  constexpr int64_t COUNT = 32;
  Packer<BFloat16> packer(b.count, COUNT);
  for (int64_t first = 0; first < b.width; first += COUNT)
    packer.pack_columns(
        transposed(b), first, std::min(COUNT, b.width - first), {to.data + first, to.stride});
}

template <class T>
inline void add_row(const T* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += float(from[i]);
}

// put(sums, row, rows, column, columns) takes what is finished. Each thread has the same number of
// groups of columns; only where those are few do tasks share one, which each of them packs again.
template <class Put>
void multiply_packed(const PackedRows& a, int64_t rows, const Matrix& b, const Put& put) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (b.width + threads * WIDE - 1) / (threads * WIDE);
  const int64_t wide = round_up((b.width + threads * rounds - 1) / (threads * rounds), 32);
  const int64_t groups = (b.width + wide - 1) / wide, strips = (rows + STRIP - 1) / STRIP;
  const int64_t wanted = (2 * threads + groups - 1) / groups;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, strips / 16));
  const int64_t deep = std::min(b.count, DEEP), most_rows = (strips + parts - 1) / parts * STRIP;
  struct Worker {
    Buffer columns, sums;
  };
  run_tasks(groups * parts, [&] {
    auto worker = std::make_shared<Worker>(Worker{
        Buffer(round_up(deep, Element::DEPTH) / Element::WIDTH * wide),
        Buffer(most_rows * wide)});
    return [&, worker](int64_t task) {
      const int64_t column = task / parts * wide, columns = std::min(wide, b.width - column);
      const int64_t first = strips * (task % parts) / parts * STRIP;
      const int64_t last = std::min(rows, strips * (task % parts + 1) / parts * STRIP);
      const Operand packed{worker->columns, wide};
      for (int64_t k = 0; k < b.count; k += deep) {
        const int64_t depth = std::min(deep, b.count - k);
        pack_columns(part(b, k, depth, column, columns), packed);
        for (int64_t row = first; row < last; row += STRIP) {
          const int64_t count = std::min(STRIP, last - row);
          const int64_t at = b.count > deep ? row - first : 0;  // all at once: needed no longer
          const Operand sums{worker->sums + at * wide, wide};
          multiply<Element>(
              a.from(row, k), packed, sums, count, round_up(columns, LANES),
              round_up(depth, Element::DEPTH) / Element::WIDTH, k > 0);
          if (k + depth == b.count) put(sums, row, count, column, columns);
        }
      }
      finish_streams();
    };
  });
}

inline void check(const Tensor& a, const Tensor& b, const Tensor& result, ScalarType dtype) {
  STD_TORCH_CHECK(
      a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16 &&
          result.scalar_type() == dtype,
      "bfloat16 times bfloat16 as ", dtype, " expected, got ", a.scalar_type(), ", ",
      b.scalar_type(), " and ", result.scalar_type());
  STD_TORCH_CHECK(
      a.size(1) == b.size(0) && a.size(1) > 0 && result.size(0) == a.size(0) &&
          result.size(1) == b.size(1) && result.stride(1) == 1,
      "(M, K) times (K, N) expected, K at least 1, into (M, N) with rows of neighbours, got (",
      a.size(0), ", ", a.size(1), "), (", b.size(0), ", ", b.size(1), ") and (", result.size(0),
      ", ", result.size(1), ") with steps of ", result.stride(1));
}

// out (M, N) = a (M, K) b (K, N) + residual (M, N) in bf16; or with `total`, (M, N) in fp32,
// total += a b.
void matmul(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& out, const std::optional<Tensor>& total) {
  const Matrix left(a), right(b);
  if (residual) check(a, b, *residual, ScalarType::BFloat16);
  if (out) check(a, b, *out, ScalarType::BFloat16);
  if (total) check(a, b, *total, ScalarType::Float);
  if (right.width == 0) return;
  const auto more = rows_of<BFloat16>(residual), outs = rows_of<BFloat16>(out);
  const auto totals = rows_of<float>(total);
  const auto store_row = left.count * right.width > CACHED ? stream_row : round_row;
  const int64_t tall =
      std::max<int64_t>(256, PACKED / std::max<int64_t>(1, left.width) / STRIP * STRIP);
  for (int64_t start = 0; start < left.count; start += tall) {
    const int64_t rows = std::min(tall, left.count - start);
    const PackedRows packed(part(left, start, rows, 0, left.width));
    multiply_packed(
        packed, rows, right,
        [&](Operand sums, int64_t row, int64_t count, int64_t column, int64_t columns) {
          for (int64_t i = 0; i < count; ++i) {
            float* sum = sums.row(i);
            const int64_t at = start + row + i;
            if (more) add_row((*more)[at] + column, columns, sum);
            if (outs) store_row(sum, columns, (*outs)[at] + column);
            if (totals) add_row(sum, columns, (*totals)[at] + column);
          }
        });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "matmul(Tensor a, Tensor b, Tensor? residual, Tensor(a!)? out, Tensor(b!)? total) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("matmul", TORCH_BOX(&matmul));
}

}  // namespace llamapro
