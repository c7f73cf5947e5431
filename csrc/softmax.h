// The online softmax of a row of logits, for the losses on a linear head.
#pragma once

#include <cmath>

#include "common.h"

namespace llamapro {

constexpr int64_t PIECE = 1024;  // elements whose largest is taken before any is raised to a power

// Of a row: its largest logit, and the log of the sum of exp(scale * (logits less that one)).
struct Stats {
  float peak, log_total;
};

// Of logits: their peak, and the log total of those times `scale`, by an online softmax over pieces
// that stay in the first cache. The peak is subtracted first: a fused product and difference of
// large logits would be their rounding.
template <class T>
inline Stats stats_of(const T* logits, int64_t count, float scale = 1) {
  float peak = -INFINITY, total = 0;
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t end = std::min(count, start + PIECE);
    float higher = peak;
#pragma omp simd reduction(max : higher)
    for (int64_t i = start; i < end; ++i) higher = std::max(higher, float(logits[i]));
    const float base = higher == -INFINITY ? 0 : higher;  // -inf - -inf would be NaN
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) sum += exp(scale * (float(logits[i]) - base));
    total = total * exp(scale * (peak - base)) + sum;
    peak = higher;
  }
  return {peak, std::log(total)};
}

}  // namespace llamapro
