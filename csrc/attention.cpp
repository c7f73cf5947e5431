// Flash attention; the formulas are in llamapro_kernels/attention.py.
//
// Scores are held transposed, keys by queries: 64 queries are the lanes of a few vectors, so that
// maxima, sums and masks need no work across lanes. The copies that bring q, k, v and do into the
// forms that products take are those of one head at a time.
#include <cmath>

#include "packer.h"

namespace llamapro {
namespace {

constexpr int64_t QUERIES = 64;  // of a block
constexpr int64_t KEYS = 128;
constexpr float LOG2E = 1.442695041f;

// One head of a (B, T, H, D) tensor: rows of D numbers.
template <class T>
struct Head : Rows<T> {
  Head(const Tensor& tensor, int64_t batch, int64_t head)
      : Rows<T>(
            static_cast<T*>(tensor.data_ptr()) + batch * tensor.stride(0) +
                head * tensor.stride(2),
            tensor.size(1), tensor.size(3), tensor.stride(1), tensor.stride(3)) {}
};

// Of one head of (B, H, 2, T): each query's largest score, and log2 of the sum of 2^(its scores,
// less that one, in base 2).
struct Stats {
  Stats(const Tensor& stats, int64_t batch, int64_t head)
      : peak(static_cast<float*>(stats.data_ptr()) +
             (batch * stats.size(1) + head) * 2 * stats.size(3)),
        log_total(peak + stats.size(3)) {}

  float *peak, *log_total;
};

// What is seen: each query sees the keys low..high. Both rise with the query.
class Visible {
 public:
  Visible(
      int64_t queries, int64_t keys, const std::optional<Tensor>& documents, bool causal,
      std::optional<int64_t> window)
      : low_(round_up(queries, QUERIES), 0), high_(low_.size(), 0) {
    const int32_t* cuts =
        documents ? static_cast<const int32_t*>(documents->data_ptr()) : nullptr;
    for (int64_t query = 0, document = 0; query < queries; ++query) {
      int64_t low = 0, high = keys;
      if (cuts) {
        while (document + 2 < documents->numel() && cuts[document + 1] <= query) ++document;
        low = std::clamp<int64_t>(cuts[document], 0, keys);
        high = std::clamp<int64_t>(cuts[document + 1], low, keys);
      }
      if (causal) {
        high = std::min(high, std::max<int64_t>(0, query + keys - queries + 1));
        if (window) low = std::max(low, high - *window);
      }
      low_[query] = static_cast<int32_t>(low);
      high_[query] = static_cast<int32_t>(high);
    }
  }

  // Keys that some query of first..first + count sees.
  int64_t begin(int64_t first) const { return low_[first]; }
  int64_t end(int64_t first, int64_t count) const { return high_[first + count - 1]; }

  // Whether all of these queries see all the keys begin..end.
  bool all(int64_t first, int64_t count, int64_t begin, int64_t end) const {
    return low_[first + count - 1] <= begin && end <= high_[first];
  }

  // For LANES queries, whether they see a key.
  IntVec lanes(int64_t first, int32_t key) const {
    return (load<IntVec>(&low_[first]) <= key) & (load<IntVec>(&high_[first]) > key);
  }

 private:
  std::vector<int32_t> low_, high_;  // with queries that see nothing up to a whole block
};

// In how many parts the blocks of a head are cut, so that each thread finds a few tasks.
int64_t parts_of_a_head(int64_t heads, int64_t blocks, int64_t tasks_per_thread) {
  const int64_t wanted = tasks_per_thread * torch::stable::get_num_threads();
  const int64_t parts = (wanted + heads - 1) / std::max<int64_t>(1, heads);
  return std::max<int64_t>(1, std::min(parts, blocks));
}

struct Options {
  float scale;
  Visible visible;
};

// Forward. A task is the query heads of one key head, and a part of their query blocks.

template <class T>
class Forward {
  using Element = typename ElementOf<T>::type;

 public:
  Forward(int64_t keys, int64_t dim, const Options& options)
      : options_(options),
        scale_(options.scale * LOG2E),
        packer_(dim, KEYS),
        dim_(dim),
        k_(round_up(keys, KEYS) * packer_.elements()),
        v_(round_up(keys, KEYS) * packer_.padded()),
        q_(packer_.elements() * QUERIES),
        scores_(KEYS * QUERIES),
        p_(KEYS * QUERIES),
        o_(packer_.padded() * QUERIES),
        turned_(QUERIES * dim) {}

  // Keys begin..end, which start at a block.
  void take_keys(const Head<T>& k, const Head<T>& v, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += KEYS) {
      const int64_t count = std::min(KEYS, end - first);
      packer_.pack_rows(k, first, count, k_block(first));
      packer_.pack_interleaved_columns(v, first, count, v_block(first));
    }
  }

  void attend_queries(const Head<T>& q, int64_t first, const Head<T>& o, const Stats& stats) {
    const int64_t count = std::min(QUERIES, q.count - first);
    const int64_t end = options_.visible.end(first, count);
    packer_.pack_columns(q, first, count, {q_, QUERIES});
    std::fill_n(peak_, QUERIES, -INFINITY);
    std::fill_n(total_, QUERIES, 0.0f);
    bool seen = false;
    for (int64_t key = options_.visible.begin(first) / KEYS * KEYS; key < end; key += KEYS) {
      attend(first, count, key, std::min(KEYS, end - key), seen);
      seen = true;
    }
    if (!seen) std::fill_n(static_cast<float*>(o_), dim_ * QUERIES, 0.0f);
    finish(o, first, count, stats);
  }

 private:
  Operand k_block(int64_t first) const {
    return {k_ + first * packer_.elements(), packer_.elements()};
  }
  Operand v_block(int64_t first) const {
    return {v_ + first / Element::WIDTH * packer_.padded(), KEYS / Element::WIDTH};
  }

  void attend(int64_t first, int64_t queries, int64_t key, int64_t keys, bool seen) {
    const int64_t columns = round_up(queries, LANES), rows = round_up(keys, Element::DEPTH);
    // Rows that fill up the last product are hidden too.
    const bool masked =
        queries < columns || !options_.visible.all(first, queries, key, key + rows);
    multiply<Element>(
        k_block(key), {q_, QUERIES}, {scores_, QUERIES}, keys, columns, packer_.elements(), false);
    for (int64_t lane = 0; lane < columns; lane += LANES) {
      if (masked) hide(first + lane, lane, key, rows);
      softmax(lane, rows, seen);
    }
    const int64_t depth = rows / Element::WIDTH;
    multiply<Element>(v_block(key), {p_, QUERIES}, {o_, QUERIES}, dim_, columns, depth, seen);
  }

  void hide(int64_t query, int64_t lane, int64_t key, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      float* score = scores_ + i * QUERIES + lane;
      const IntVec seen = options_.visible.lanes(query, static_cast<int32_t>(key + i));
      store(score, seen ? load<Vec>(score) : Vec{} - INFINITY);
    }
  }

  // The online softmax of one vector of queries: scores become p, what there was is scaled down.
  void softmax(int64_t lane, int64_t rows, bool seen) {
    const float* scores = scores_ + lane;
    float* pairs = p_ + lane;
    const float scale = scale_;
    const Vec before = load<Vec>(peak_ + lane);
    const Vec peak = larger(before, largest(scores, rows));
    // A query that has seen nothing has a peak of -inf; 0 in its place gives p = 0 and not NaN.
    const Vec base = peak == -INFINITY ? Vec{} : peak;
    // Not score * scale - base: one rounding of that is half a unit of a peak that may be huge.
    Vec sums[Element::WIDTH] = {};
    for (int64_t i = 0; i < rows; i += Element::WIDTH) {
      Vec p[Element::WIDTH];
      for (int64_t j = 0; j < Element::WIDTH; ++j) {
        p[j] = exp2((load<Vec>(scores + (i + j) * QUERIES) - base) * scale);
        sums[j] += p[j];
      }
      Element::store_pair(pairs + i / Element::WIDTH * QUERIES, p[0], p[Element::WIDTH - 1]);
    }
    for (int64_t j = 1; j < Element::WIDTH; ++j) sums[0] += sums[j];
    const Vec alpha = exp2((before - base) * scale);
    store(total_ + lane, load<Vec>(total_ + lane) * alpha + sums[0]);
    store(peak_ + lane, peak);
    if (!seen || all_equal(before, peak)) return;
    float* o = o_ + lane;
    for (int64_t i = 0; i < dim_; ++i, o += QUERIES) store(o, load<Vec>(o) * alpha);
  }

  static Vec largest(const float* scores, int64_t rows) {
    Vec best[4];  // four, so that one need not wait for the other
    for (int i = 0; i < 4; ++i) best[i] = Vec{} - INFINITY;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      for (int j = 0; j < 4; ++j) best[j] = larger(load<Vec>(scores + (i + j) * QUERIES), best[j]);
    for (; i < rows; ++i) best[0] = larger(load<Vec>(scores + i * QUERIES), best[0]);
    return larger(larger(best[0], best[1]), larger(best[2], best[3]));
  }

  void finish(const Head<T>& o, int64_t first, int64_t count, const Stats& stats) {
    transpose({o_, QUERIES}, dim_, round_up(count, LANES), {turned_, dim_});
    for (int64_t i = 0; i < count; ++i) {
      const float total = total_[i] > 0 || total_[i] != total_[i] ? total_[i] : 1.0f;
      const float* from = turned_ + i * dim_;
      fill_row(o[first + i], dim_, [&](int64_t j) { return from[j] / total; });
      stats.peak[first + i] = peak_[i] == -INFINITY ? 0 : peak_[i];
      stats.log_total[first + i] = std::log2(total);
    }
  }

  const Options& options_;
  float scale_;  // in base 2
  Packer<T> packer_;
  int64_t dim_;
  Buffer k_, v_, q_, scores_, p_, o_, turned_;
  alignas(64) float peak_[QUERIES], total_[QUERIES];
};

template <class T>
void forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Options& options, const Tensor& o,
    const Tensor& stats) {
  const int64_t queries = q.size(1), keys = k.size(1), heads = q.size(2), kv_heads = k.size(2);
  const int64_t pairs = q.size(0) * kv_heads, group = heads / std::max<int64_t>(1, kv_heads);
  const int64_t blocks = (queries + QUERIES - 1) / QUERIES;
  const int64_t parts = parts_of_a_head(pairs, blocks, 4);
  run_tasks(pairs * parts, [&] {
    return [&, worker = std::make_shared<Forward<T>>(keys, q.size(3), options)](int64_t task) {
      const int64_t part = parts - 1 - task / pairs;  // later queries see more: they come first
      const int64_t batch = task % pairs / kv_heads, kv_head = task % kv_heads;
      const int64_t first = blocks * part / parts * QUERIES;
      const int64_t last = std::min(queries, blocks * (part + 1) / parts * QUERIES);
      const int64_t begin = options.visible.begin(first) / KEYS * KEYS;
      worker->take_keys(
          {k, batch, kv_head}, {v, batch, kv_head}, begin,
          options.visible.end(first, last - first));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t query = first; query < last; query += QUERIES)
          worker->attend_queries(
              {q, batch, head}, query, {o, batch, head}, {stats, batch, head});
    };
  });
}

// Backward. A task is one key head with its query heads, and a part of its key blocks. It owns dk
// and dv of these keys; dq is summed over the parts afterwards, in their order.

struct Saved {
  const Tensor &grad, &q, &k;
  const std::optional<Tensor>&v, &o;
  const Tensor& stats;
};

template <class T>
class Backward {
  using Element = typename ElementOf<T>::type;

 public:
  Backward(
      const Saved& saved, const Options& options, int64_t most_keys, bool want_q, bool want_k,
      bool want_v)
      : saved_(saved),
        options_(options),
        want_q_(want_q),
        want_k_(want_k),
        want_v_(want_v),
        packer_(saved.q.size(3), KEYS),
        dim_(saved.q.size(3)),
        padded_queries_(round_up(saved.q.size(1), QUERIES)),
        k_(KEYS * packer_.elements()),
        v_(KEYS * packer_.elements()),
        k_columns_(want_q ? packer_.padded() * KEYS : 0),
        q_(padded_queries_ * packer_.elements()),
        do_(want_q || want_k ? padded_queries_ * packer_.elements() : 0),
        o_(want_q || want_k ? packer_.elements() * QUERIES : 0),
        q_rows_(want_k ? padded_queries_ * packer_.padded() : 0),
        do_rows_(want_v ? padded_queries_ * packer_.padded() : 0),
        peak_(padded_queries_),
        log_total_(padded_queries_),
        delta_(padded_queries_),
        scores_(KEYS * QUERIES),
        dp_(KEYS * QUERIES),
        p_(KEYS * QUERIES),
        ds_(KEYS * QUERIES),
        ds_pairs_(KEYS * QUERIES),
        dk_(want_k ? most_keys * packer_.padded() : 0),
        dv_(want_v ? most_keys * packer_.padded() : 0) {}

  // dq: (query blocks, padded D, QUERIES) for each head of the group, this part's share.
  void differentiate_keys(
      int64_t batch, int64_t kv_head, int64_t begin, int64_t end, const std::optional<Tensor>& dk,
      const std::optional<Tensor>& dv, float* dq) {
    const int64_t group = saved_.q.size(2) / saved_.k.size(2);
    const int64_t sums = (end - begin) * packer_.padded();
    if (want_k_) std::fill_n(static_cast<float*>(dk_), sums, 0.0f);
    if (want_v_) std::fill_n(static_cast<float*>(dv_), sums, 0.0f);
    const int64_t head_size = padded_queries_ * packer_.padded();
    if (want_q_) std::fill_n(dq, group * head_size, 0.0f);
    for (int64_t member = 0; member < group; ++member) {
      take_queries(batch, kv_head * group + member);
      for (int64_t key = begin; key < end; key += KEYS) {
        const int64_t count = std::min(KEYS, end - key);
        take_keys(batch, kv_head, key, count);
        const int64_t row = (key - begin) * packer_.padded();
        for (int64_t query = 0; query < saved_.q.size(1); query += QUERIES)
          attend(query, key, count, dk_ + row, dv_ + row, dq + member * head_size);
      }
    }
    if (want_k_) put(dk_, options_.scale, {*dk, batch, kv_head}, begin, end);
    if (want_v_) put(dv_, 1, {*dv, batch, kv_head}, begin, end);
  }

 private:
  void take_queries(int64_t batch, int64_t head) {
    const Head<T> q(saved_.q, batch, head), grad(saved_.grad, batch, head);
    const Stats stats(saved_.stats, batch, head);
    for (int64_t first = 0; first < q.count; first += QUERIES) {
      const int64_t count = std::min(QUERIES, q.count - first);
      packer_.pack_columns(q, first, count, columns(q_, first));
      if (want_q_ || want_k_) packer_.pack_columns(grad, first, count, columns(do_, first));
      if (want_k_) packer_.pack_interleaved(q, first, count, rows(q_rows_, first));
      if (want_v_) packer_.pack_interleaved(grad, first, count, rows(do_rows_, first));
    }
    std::copy_n(stats.peak, q.count, static_cast<float*>(peak_));
    std::copy_n(stats.log_total, q.count, static_cast<float*>(log_total_));
    std::fill(peak_ + q.count, peak_ + padded_queries_, 0.0f);
    std::fill(log_total_ + q.count, log_total_ + padded_queries_, 0.0f);
    if (want_q_ || want_k_) take_delta({*saved_.o, batch, head});
  }

  // delta = rowsum(do * o), in the order of the products do v^T: of a query whose weight is all on
  // one key, o is that key's v, and ds is exactly 0. (With tiles, which sum in another order, it is
  // what fp32 rounds.)
  void take_delta(const Head<T>& o) {
    for (int64_t first = 0; first < padded_queries_; first += QUERIES) {
      const int64_t lanes = whole_lanes<Element>(std::min(QUERIES, o.count - first));
      packer_.pack_columns(o, first, std::min(QUERIES, o.count - first), {o_, QUERIES});
      const Operand grads = columns(do_, first), values{o_, QUERIES};
      for (int64_t lane = 0; lane < lanes; lane += LANES) {
        Vec sum{};
        for (int64_t i = 0; i < packer_.elements(); ++i)
          sum = Element::multiply_add(
              sum, load<Vec>(grads.row(i) + lane), load<Vec>(values.row(i) + lane));
        store(delta_ + first + lane, sum);
      }
    }
  }

  void take_keys(int64_t batch, int64_t kv_head, int64_t first, int64_t count) {
    const Head<T> k(saved_.k, batch, kv_head);
    packer_.pack_rows(k, first, count, {k_, packer_.elements()});
    if (want_q_ || want_k_)
      packer_.pack_rows(Head<T>(*saved_.v, batch, kv_head), first, count, {v_, packer_.elements()});
    if (want_q_)
      packer_.pack_interleaved_columns(k, first, count, {k_columns_, KEYS / Element::WIDTH});
  }

  Operand columns(float* data, int64_t first) const {
    return {data + first * packer_.elements(), QUERIES};
  }
  Operand rows(float* data, int64_t first) const {
    return {data + first / Element::WIDTH * packer_.padded(), packer_.padded()};
  }

  void attend(int64_t first, int64_t key, int64_t most_keys, float* dk, float* dv, float* dq) {
    const int64_t count = std::min(QUERIES, saved_.q.size(1) - first);
    const int64_t keys = std::min(most_keys, options_.visible.end(first, count) - key);
    if (keys <= 0 || options_.visible.begin(first) >= key + keys) return;
    const int64_t lanes = whole_lanes<Element>(count), elements = packer_.elements();
    const Operand scores{scores_, QUERIES}, dp{dp_, QUERIES};
    multiply<Element>({k_, elements}, columns(q_, first), scores, keys, lanes, elements, false);
    if (want_q_ || want_k_)
      multiply<Element>({v_, elements}, columns(do_, first), dp, keys, lanes, elements, false);
    const int64_t rows_of_keys = round_up(keys, Element::DEPTH);
    const bool masked =
        count < lanes || !options_.visible.all(first, count, key, key + rows_of_keys);
    for (int64_t lane = 0; lane < lanes; lane += LANES)
      differentiate(first + lane, lane, key, rows_of_keys, masked);
    const int64_t along_q = round_up(count, Element::DEPTH) / Element::WIDTH;
    const int64_t along_k = rows_of_keys / Element::WIDTH;
    const Operand p{p_, QUERIES / Element::WIDTH}, ds{ds_, QUERIES / Element::WIDTH};
    const int64_t padded = packer_.padded();
    if (want_v_)
      multiply<Element>(p, rows(do_rows_, first), {dv, padded}, keys, padded, along_q, true);
    if (want_k_)
      multiply<Element>(ds, rows(q_rows_, first), {dk, padded}, keys, padded, along_q, true);
    if (want_q_)
      multiply<Element>(
          {k_columns_, KEYS / Element::WIDTH}, {ds_pairs_, QUERIES},
          {dq + first * padded, QUERIES}, dim_, lanes, along_k, true);
  }

  // Scores of one vector of queries become p, and dp becomes ds without the scale.
  void differentiate(int64_t query, int64_t lane, int64_t key, int64_t rows, bool masked) {
    constexpr int64_t W = Element::WIDTH;
    const bool want_q = want_q_, want_k = want_k_, want_v = want_v_;
    const float *const scores = scores_, *const dps = dp_;
    float *const p_rows = p_, *const ds_rows = ds_, *const ds_pairs = ds_pairs_;
    const Vec peak = load<Vec>(peak_ + query), log_total = load<Vec>(log_total_ + query);
    const Vec delta = load<Vec>(delta_ + query);
    const float scale = options_.scale * LOG2E;
    for (int64_t i = 0; i < rows; i += W) {
      Vec p[W], ds[W];
      for (int64_t j = 0; j < W; ++j) {
        const int64_t at = (i + j) * QUERIES + lane;
        p[j] = exp2((load<Vec>(scores + at) - peak) * scale - log_total);
        ds[j] = p[j] * (load<Vec>(dps + at) - delta);
        if (masked) {
          const IntVec seen = options_.visible.lanes(query, static_cast<int32_t>(key + i + j));
          p[j] = seen ? p[j] : Vec{};
          ds[j] = seen ? ds[j] : Vec{};
        }
        if (want_v) Element::store_row(p_rows, at, p[j]);
        if (want_k) Element::store_row(ds_rows, at, ds[j]);
      }
      if (want_q) Element::store_pair(ds_pairs + i / W * QUERIES + lane, ds[0], ds[W - 1]);
    }
  }

  void put(const float* sums, float scale, const Head<T>& to, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i, sums += packer_.padded()) {
      fill_row(to[i], dim_, [&](int64_t j) { return sums[j] * scale; });
    }
  }

  const Saved& saved_;
  const Options& options_;
  bool want_q_, want_k_, want_v_;
  Packer<T> packer_;
  int64_t dim_, padded_queries_;
  Buffer k_, v_, k_columns_, q_, do_, o_, q_rows_, do_rows_, peak_, log_total_, delta_, scores_, dp_, p_,
      ds_, ds_pairs_, dk_, dv_;
};

// dq of one block of queries: the sum of the parts, (padded D, QUERIES) each, turned round.
template <class T>
void put_queries(
    const float* parts, int64_t count, int64_t part_size, float scale, const Head<T>& dq,
    int64_t first) {
  const int64_t dim = dq.width, rows = std::min(QUERIES, dq.count - first);
  Buffer sums(dim * QUERIES), turned(QUERIES * dim);
  std::copy_n(parts, dim * QUERIES, static_cast<float*>(sums));
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < dim * QUERIES; ++i) sums[i] += parts[part * part_size + i];
  transpose({sums, QUERIES}, dim, round_up(rows, LANES), {turned, dim});
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = turned + i * dim;
    fill_row(dq[first + i], dim, [&](int64_t j) { return from[j] * scale; });
  }
}

template <class T>
void backward(
    const Saved& saved, const Options& options, const std::optional<Tensor>& dq,
    const std::optional<Tensor>& dk, const std::optional<Tensor>& dv) {
  const Tensor& q = saved.q;
  const bool want_q = dq.has_value(), want_k = dk.has_value(), want_v = dv.has_value();
  const int64_t queries = q.size(1), keys = saved.k.size(1), heads = q.size(2);
  const int64_t kv_heads = saved.k.size(2), pairs = q.size(0) * kv_heads;
  const int64_t group = heads / std::max<int64_t>(1, kv_heads);
  const int64_t blocks = (keys + KEYS - 1) / KEYS;
  const int64_t parts = parts_of_a_head(pairs, blocks, 2);
  const int64_t padded = round_up(q.size(3), LANES);
  const int64_t head_size = round_up(queries, QUERIES) * padded;
  const int64_t part_size = q.size(0) * heads * head_size;
  const int64_t most_keys = (blocks + parts - 1) / parts * KEYS;
  Buffer dq_parts(want_q ? parts * part_size : 0);
  run_tasks(pairs * parts, [&] {
    auto worker = std::make_shared<Backward<T>>(saved, options, most_keys, want_q, want_k, want_v);
    return [&, worker](int64_t task) {
      const int64_t part = task / pairs, pair = task % pairs;  // earlier keys are seen by more
      const int64_t begin = blocks * part / parts * KEYS;
      const int64_t end = std::min(keys, blocks * (part + 1) / parts * KEYS);
      float* share = want_q ? dq_parts + part * part_size + pair * group * head_size : nullptr;
      worker->differentiate_keys(pair / kv_heads, pair % kv_heads, begin, end, dk, dv, share);
    };
  });
  if (!want_q) return;
  const int64_t query_blocks = (queries + QUERIES - 1) / QUERIES;
  const auto put = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / query_blocks, first = i % query_blocks * QUERIES;
      const float* sums = dq_parts + head * head_size + first * padded;
      put_queries<T>(
          sums, parts, part_size, options.scale, {*dq, head / heads, head % heads}, first);
    }
  };
  torch::stable::parallel_for(0, q.size(0) * heads * query_blocks, 1, put);
}

// q: (B, T, H, D); k, v: (B, S, Hkv, D); o: contiguous like q; stats: (B, H, 2, T) fp32.
void flash_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
    bool causal, double scale, std::optional<int64_t> window, const Tensor& o, const Tensor& stats) {
  const Options options{
      static_cast<float>(scale), {q.size(1), k.size(1), cu_seqlens, causal, window}};
  if (q.numel() == 0) return;
  dispatch(q, [&](auto zero) { forward<decltype(zero)>(q, k, v, options, o, stats); });
}

// grad: like o; v and o are there where dq or dk is wanted; dq, dk, dv: where they are wanted, each
// with the numbers of a head as neighbours.
void flash_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
    const std::optional<Tensor>& o, const Tensor& stats, const std::optional<Tensor>& cu_seqlens,
    bool causal, double scale, std::optional<int64_t> window, const std::optional<Tensor>& dq,
    const std::optional<Tensor>& dk, const std::optional<Tensor>& dv) {
  const Options options{
      static_cast<float>(scale), {q.size(1), k.size(1), cu_seqlens, causal, window}};
  if (k.numel() == 0 && q.numel() == 0) return;
  for (const std::optional<Tensor>& out : {dq, dk, dv})
    STD_TORCH_CHECK(
        !out || out->size(3) < 2 || out->stride(3) == 1,
        "gradients with steps of 1 in a head expected, got ", out->stride(3));
  dispatch(q, [&](auto zero) {
    const Saved saved{grad, q, k, v, o, stats};
    backward<decltype(zero)>(saved, options, dq, dk, dv);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamapro_cpp, library) {
  library.def(
      "flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal,"
      " float scale, int? window, Tensor(a!) o, Tensor(b!) stats) -> ()");
  library.def(
      "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor? v, Tensor? o, Tensor stats,"
      " Tensor? cu_seqlens, bool causal, float scale, int? window, Tensor(a!)? dq,"
      " Tensor(b!)? dk, Tensor(c!)? dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llamapro_cpp, CPU, library) {
  library.impl("flash_attention_forward", TORCH_BOX(&flash_attention_forward));
  library.impl("flash_attention_backward", TORCH_BOX(&flash_attention_backward));
}

}  // namespace llamapro
