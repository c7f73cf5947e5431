// Copies of matrices in the forms that the products of `gemm.h` take.
#pragma once

#include "gemm.h"

namespace llamapro {
namespace {

// Columns that are computed for `count`: whole vectors, and whole products where they are summed
// over.
template <class Element>
inline int64_t whole_lanes(int64_t count) {
  return round_up(count, std::max<int64_t>(LANES, Element::DEPTH));
}

// Brings rows of `dim` numbers into the forms of a product. Where dim or the rows are summed over,
// zeros fill up what a product takes at once; elsewhere dim is padded to whole vectors.
template <class T, class Element = typename ElementOf<T>::type>
class Packer {
 public:
  Packer(int64_t dim, int64_t most_rows)
      : dim_(dim),
        elements_(round_up(dim, Element::DEPTH) / Element::WIDTH),
        padded_(round_up(dim, LANES)),
        scratch_(most_rows * padded_) {}

  int64_t elements() const { return elements_; }  // along dim
  int64_t padded() const { return padded_; }

  // (count, elements): a row of numbers is a row of elements.
  void pack_rows(const Rows<T>& from, int64_t first, int64_t count, Operand to) {
    for (int64_t i = 0; i < count; ++i) {
      std::fill(to.row(i) + dim_ / Element::WIDTH, to.row(i) + elements_, 0.0f);
      Element::pack_row(row(from, first + i, first_), dim_, to.row(i));
    }
  }

  // The rows where they lie already in that form, with some stride.
  std::optional<Operand> rows_in_place(const Rows<T>& from) const {
    if (sizeof(T) * Element::WIDTH != sizeof(float) || from.column_stride != 1) return {};
    if (dim_ % Element::DEPTH != 0 || from.row_stride % Element::WIDTH != 0) return {};
    if (reinterpret_cast<uintptr_t>(from.data) % sizeof(float) != 0) return {};
    return Operand{reinterpret_cast<float*>(from.data), from.row_stride / Element::WIDTH};
  }

  // (elements, count): the same transposed, and zeros beyond count up to whole_lanes.
  void pack_columns(const Rows<T>& from, int64_t first, int64_t count, Operand to) {
    const int64_t whole = whole_lanes<Element>(count);
    const std::optional<Operand> in_place = rows_in_place(from);
    if (in_place && count == whole)
      return transpose({in_place->row(first), in_place->stride}, count, elements_, to);
    pack_rows(from, first, count, {scratch_, elements_});
    std::fill(scratch_ + count * elements_, scratch_ + whole * elements_, 0.0f);
    transpose({scratch_, elements_}, whole, elements_, to);
  }

  // (round_up(count, DEPTH) / WIDTH, padded): elements along the rows; zeros beyond count and dim.
  void pack_interleaved(const Rows<T>& from, int64_t first, int64_t count, Operand to) {
    const int64_t whole = round_up(count, Element::DEPTH);
    for (int64_t i = round_up(count, Element::WIDTH); i < whole; i += Element::WIDTH)
      std::fill_n(to.row(i / Element::WIDTH), padded_, 0.0f);
    for (int64_t i = 0; i < count; i += Element::WIDTH) {
      const T* upper = row(from, first + i, first_);
      const T* lower = i + 1 < count ? row(from, first + i + 1, second_) : nullptr;
      float* out = to.row(i / Element::WIDTH);
      Element::pack_pair(upper, lower, dim_, out);
      std::fill(out + dim_, out + padded_, 0.0f);
    }
  }

  // (dim, round_up(count, DEPTH) / WIDTH): the same transposed.
  void pack_interleaved_columns(const Rows<T>& from, int64_t first, int64_t count, Operand to) {
    pack_interleaved(from, first, count, {scratch_, padded_});
    transpose({scratch_, padded_}, round_up(count, Element::DEPTH) / Element::WIDTH, dim_, to);
  }

 private:
  static const T* row(const Rows<T>& from, int64_t index, std::vector<T>& scratch) {
    return neighbours<T>(from[index], from.width, from.column_stride, scratch);
  }

  int64_t dim_, elements_, padded_;
  Buffer scratch_;
  std::vector<T> first_, second_;
};

}  // namespace
}  // namespace llamapro
