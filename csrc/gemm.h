// Small matrix products in the vectors or the tiles of the machine.
//
// Every product is of one form, C += A B: an element of A is broadcast against a row of B. In bf16,
// where the machine multiplies it, an element is a pair of neighbours along the summed dimension;
// otherwise it is one float. AMX takes 16 x 16 elements of each in one instruction.
#pragma once

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>

#include "common.h"

namespace llamapro {
namespace {

// The vectors of the machine, and how many of them a product keeps in registers: ROWS x COLUMNS.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6, COLUMNS = 2;
#else
constexpr int LANES = 4, ROWS = 6, COLUMNS = 2;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

template <class V, class Element>
inline V load(const Element* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(Vec)); }

#if defined(__AVX512F__)
// Rounding and the exponent take an instruction each: half of what they take elsewhere.
inline Vec exp2(Vec x) {
  const __m512 whole = _mm512_maskz_roundscale_ps(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec power = exp2_of_rest<Vec>(x - (Vec)whole);
  const __mmask16 normal = _mm512_cmp_ps_mask(whole, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)power, whole);
}
#else
inline Vec exp2(Vec x) { return llamapro::exp2<Vec, IntVec>(x); }
#endif
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline bool all_equal(Vec a, Vec b) {
  const IntVec same = a == b;
  int32_t all = -1;
  for (int i = 0; i < LANES; ++i) all &= same[i];
  return all != 0;
}

inline int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Uninitialised memory at the start of a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, 64 * (floats / 16 + 1))), std::free) {
    STD_TORCH_CHECK(data_, "out of memory: ", 4 * floats, " bytes are needed");
  }
  operator float*() const { return data_.get(); }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
};

// Elements of a product, 32 bits each and held as float whatever they are.

struct Single {
  static constexpr int64_t WIDTH = 1;  // numbers in an element
  static constexpr int64_t DEPTH = 1;  // numbers that are summed at once

  static Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  // A row of numbers; then a row of elements whose numbers come from two rows.
  static void store_row(float* to, int64_t at, Vec value) { store(to + at, value); }
  static void store_pair(float* to, Vec first, Vec) { store(to, first); }

  template <class T>
  static void pack_row(const T* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
  template <class T>
  static void pack_pair(const T* first, const T*, int64_t count, float* to) {
    pack_row(first, count, to);
  }
};

#ifdef __AVX512BF16__
struct Pair {
  static constexpr int64_t WIDTH = 2, DEPTH = 2;

  static Vec multiply_add(Vec sum, float a, Vec b) {
    return multiply_add(sum, (Vec)_mm512_set1_epi32(bit_cast<int32_t>(a)), b);
  }
  static Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void store_row(float* to, int64_t at, Vec value) {
    round_vector((__m512)value, reinterpret_cast<BFloat16*>(to) + at);
  }
  static void store_pair(float* to, Vec first, Vec second) {
    alignas(64) static constexpr uint16_t zip[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    store(to, (Vec)_mm512_permutexvar_epi16(load<__m512i>(zip), rounded));
  }

  static void pack_row(const BFloat16* from, int64_t count, float* to) {
    std::memcpy(to, from, count * sizeof(BFloat16));
  }
  static void pack_pair(
      const BFloat16* first, const BFloat16* second, int64_t count, float* to) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i)
      pairs[i] = first[i].bits | (second ? static_cast<uint32_t>(second[i].bits) << 16 : 0);
  }
};
#endif

#ifdef __AMX_BF16__
// A pair that is multiplied in tiles. Operands reach to whole tiles: rows of a and c to 16, the
// depth to 32 numbers.
struct TiledPair : Pair {
  static constexpr int64_t DEPTH = 32;
};
#endif

template <class T>
struct ElementOf {
  using type = Single;
};
#if defined(__AMX_BF16__)
template <>
struct ElementOf<BFloat16> {
  using type = TiledPair;
};
#elif defined(__AVX512BF16__)
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif

struct Operand {
  float* data;
  int64_t stride;

  float* row(int64_t index) const { return data + index * stride; }
};

// R rows and C vectors of c (+)= a b, in registers.
template <class Element, int R, int C>
inline void multiply_tile(Operand a, Operand b, Operand c, int64_t depth, bool add) {
  Vec sums[R][C];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[i][j] = add ? load<Vec>(c.row(i) + j * LANES) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) right[j] = load<Vec>(b.row(k) + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j)
        sums[i][j] = Element::multiply_add(sums[i][j], a.row(i)[k], right[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(c.row(i) + j * LANES, sums[i][j]);
}

template <class Element, int C, int R = ROWS>
inline void multiply_rows(
    Operand a, Operand b, Operand c, int64_t rows, int64_t depth, bool add) {
  for (; rows >= R; rows -= R) {
    multiply_tile<Element, R, C>(a, b, c, depth, add);
    a.data += R * a.stride;
    c.data += R * c.stride;
  }
  if constexpr (R > 1) multiply_rows<Element, C, R - 1>(a, b, c, rows, depth, add);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), or += ; columns a multiple of LANES.
template <class Element, int C = COLUMNS>
void multiply(
    Operand a, Operand b, Operand c, int64_t rows, int64_t columns, int64_t depth, bool add) {
  for (; columns >= C * LANES; columns -= C * LANES) {
    multiply_rows<Element, C>(a, b, c, rows, depth, add);
    b.data += C * LANES;
    c.data += C * LANES;
  }
  if constexpr (C > 1) multiply<Element, C - 1>(a, b, c, rows, columns, depth, add);
}

// What was stored before is in memory: compilers do not know that a tile is loaded from there.
inline void write_to_memory() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Eight tiles of 16 rows of 64 bytes are the calling thread's while it lives.
struct Tiles {
#ifdef __AMX_BF16__
  Tiles() {
    alignas(64) static const struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    write_to_memory();
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
};

#ifdef __AMX_BF16__
// R x C tiles of c (+)= a b.
template <int R, int C>
inline void multiply_tiles(Operand a, Operand b, Operand c, int64_t depth, bool add) {
  const int64_t a_bytes = 4 * a.stride, b_bytes = 4 * b.stride, c_bytes = 4 * c.stride;
  if (add) {
    _tile_loadd(0, c.row(0), c_bytes);
    if (C > 1) _tile_loadd(1, c.row(0) + 16, c_bytes);
    if (R > 1) _tile_loadd(2, c.row(16), c_bytes);
    if (R > 1 && C > 1) _tile_loadd(3, c.row(16) + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (C > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a.row(0) + k, a_bytes);
    _tile_loadd(6, b.row(k), b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (C > 1) _tile_loadd(7, b.row(k) + 16, b_bytes);
    if (C > 1) _tile_dpbf16ps(1, 4, 7);
    if (R > 1) _tile_loadd(5, a.row(16) + k, a_bytes);
    if (R > 1) _tile_dpbf16ps(2, 5, 6);
    if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.row(0), c_bytes);
  if (C > 1) _tile_stored(1, c.row(0) + 16, c_bytes);
  if (R > 1) _tile_stored(2, c.row(16), c_bytes);
  if (R > 1 && C > 1) _tile_stored(3, c.row(16) + 16, c_bytes);
}

template <int C>
inline void multiply_rows_of_tiles(
    Operand a, Operand b, Operand c, int64_t rows, int64_t depth, bool add) {
  for (; rows > 16; rows -= 32) {
    multiply_tiles<2, C>(a, b, c, depth, add);
    a.data += 32 * a.stride;
    c.data += 32 * c.stride;
  }
  if (rows > 0) multiply_tiles<1, C>(a, b, c, depth, add);
}

template <>
inline void multiply<TiledPair>(
    Operand a, Operand b, Operand c, int64_t rows, int64_t columns, int64_t depth, bool add) {
  write_to_memory();
  for (; columns > 16; columns -= 32) {
    multiply_rows_of_tiles<2>(a, b, c, rows, depth, add);
    b.data += 32;
    c.data += 32;
  }
  if (columns > 0) multiply_rows_of_tiles<1>(a, b, c, rows, depth, add);
}
#endif

// Runs task(index) for all tasks, each as soon as a thread is free; a thread makes its own worker.
// Products may be taken in there. What a thread throws, the caller gets: torch's would lose it.
template <class MakeWorker>
inline void run_tasks(int64_t tasks, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex one_at_a_time;
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      const Tiles tiles;
      auto worker = make_worker();
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) worker(task);
    } catch (...) {
      const std::lock_guard lock(one_at_a_time);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// A stage of the transposition of LANES vectors: swaps what lies STEP off the diagonal.
template <int STEP>
inline void transpose_stage(Vec (&v)[LANES]) {
#if defined(__GNUC__) && !defined(__clang__)
  IntVec low{}, high{};
#pragma GCC unroll 16
  for (int j = 0; j < LANES; ++j) {
    low[j] = j & STEP ? LANES + j - STEP : j;
    high[j] = j & STEP ? LANES + j : j + STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Vec upper = __builtin_shuffle(v[i], v[i + STEP], low);
    v[i + STEP] = __builtin_shuffle(v[i], v[i + STEP], high);
    v[i] = upper;
  }
#else
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j)
      if (!(i & STEP) && (j & STEP)) {
        const float kept = v[i][j];
        v[i][j] = v[i + STEP][j - STEP];
        v[i + STEP][j - STEP] = kept;
      }
#endif
  if constexpr (2 * STEP < LANES) transpose_stage<2 * STEP>(v);
}

// to (columns, rows) = from (rows, columns) transposed.
inline void transpose(Operand from, int64_t rows, int64_t columns, Operand to) {
  const int64_t whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
  for (int64_t r = 0; r < whole_rows; r += LANES) {
    for (int64_t c = 0; c < whole_columns; c += LANES) {
      Vec v[LANES];
      for (int i = 0; i < LANES; ++i) v[i] = load<Vec>(from.row(r + i) + c);
      transpose_stage<1>(v);
      for (int i = 0; i < LANES; ++i) store(to.row(c + i) + r, v[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to.row(c)[r] = from.row(r)[c];
}

}  // namespace
}  // namespace llamapro
