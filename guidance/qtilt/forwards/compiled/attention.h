// Attention of the tokens of a packed step over the value cache, in place and no further than a history goes.
//
// H query heads and G key/value heads of size D; S slots of M pages of P positions, N pages in all; C tokens of a
// block, Q of their queries that read the same keys.
#pragma once

#include "products.h"

namespace qtilt {

// Fewer queries than this are multiplied by keys as they lie; for more it pays to turn the keys into a panel first.
constexpr int64_t QUERIES_OF_A_PANEL = 5;

// Most tokens of a block: the scores of all of them, at all positions, are in memory at once.
constexpr int64_t BLOCK_TOKENS = 32;

// Consecutive tokens of a step that read one slot. The first of them sees `visible` cached positions. When they are of a
// span, each sees one more than the one before. When they are of a tail, all see the same, and a candidate itself as
// well; `candidate` is then the number of the first one, 0 being the last token of the history.
struct Block {
  int64_t slot, first, tokens, visible, candidate;
  bool is_span;

  // Cached positions that a token sees, and that the last one does.
  int64_t visible_to(int64_t token) const { return is_span ? visible + token : visible; }
  int64_t longest() const { return visible_to(tokens - 1); }
  bool sees_itself(int64_t token) const { return !is_span && candidate + token > 0; }
};

// The value cache as one layer's attention sees it.
struct Cache {
  float *keys_NGPD, *values_NGPD;
  const int64_t* table_SM;
  int64_t pages, page_size, kv_heads, head_size;

  int64_t offset(int64_t slot, int64_t head, int64_t position) const {
    const int64_t page = table_SM[slot * pages + position / page_size];
    return ((page * kv_heads + head) * page_size + position % page_size) * head_size;
  }
};

struct Heads {
  int64_t query, kv, size;

  int64_t group() const { return query / kv; }
  // A token's queries, keys and values, one after the other.
  int64_t width() const { return (query + 2 * kv) * size; }
  const float* key(const float* qkv, int64_t head) const { return qkv + (query + head) * size; }
  const float* value(const float* qkv, int64_t head) const { return qkv + (query + kv + head) * size; }
};

// One thread's attention of one key/value head's queries over a block's positions.
class BlockAttention {
 public:
  BlockAttention(const Heads& heads, int64_t tokens, int64_t longest)
      : heads_(heads),
        width_((longest + PANEL - 1) / PANEL * PANEL),
        memory_(std::make_unique_for_overwrite<float[]>(
            tokens * heads.group() * (heads.size + width_ + 2) + heads.size * PANEL)) {
    const int64_t queries = tokens * heads.group();
    queries_QD_ = memory_.get();
    weights_QP_ = queries_QD_ + queries * heads.size;
    scale_Q_ = weights_QP_ + queries * width_;
    own_weight_Q_ = scale_Q_ + queries;
    panel_ = own_weight_Q_ + queries;
  }

  // qkv_C, out_CHD: of the block's first token.
  void operator()(
      const float* qkv_C, float* out_CHD, const Block& block, int64_t head, const Cache& cache, float scaling) {
    const int64_t group = heads_.group(), size = heads_.size, queries = block.tokens * group;
    const int64_t longest = block.longest();
    for (int64_t i = 0; i < queries; i++) {
      const float* query = qkv_C + i / group * heads_.width() + (head * group + i % group) * size;
      for (int64_t d = 0; d < size; d++) queries_QD_[i * size + d] = query[d] * scaling;
    }
    score(block.slot, head, cache, queries, longest);
    for (int64_t i = 0; i < queries; i++) {
      const int64_t token = i / group;
      const float* own_key = heads_.key(qkv_C + token * heads_.width(), head);
      softmax(i, block.visible_to(token), longest, block.sees_itself(token) ? own_key : nullptr);
    }
    int64_t d = 0;
    for (; d + PANEL <= size; d += PANEL) average<2>(qkv_C, out_CHD, block, head, cache, longest, d);
    for (; d < size; d += LANES) average<1>(qkv_C, out_CHD, block, head, cache, longest, d);
  }

 private:
  // Scores of all queries at all positions, as many positions at once as a panel has columns.
  void score(int64_t slot, int64_t head, const Cache& cache, int64_t queries, int64_t longest) {
    const int64_t size = heads_.size;
    for (int64_t start = 0; start < longest; start += PANEL) {
      const int64_t count = std::min(PANEL, longest - start), at = cache.offset(slot, head, start);
      // The values are read next; keys come from memory in order, which the processor sees by itself.
      prefetch(cache.values_NGPD + at, count * size);
      const float* keys_CD = cache.keys_NGPD + at;
      if (queries < QUERIES_OF_A_PANEL)
        score_by_key(keys_CD, count, queries, weights_QP_ + start);
      else
        score_by_panel(keys_CD, count, queries, weights_QP_ + start);
    }
  }

  void score_by_key(const float* keys_CD, int64_t count, int64_t queries, float* scores_QP) const {
    const int64_t size = heads_.size;
    for (int64_t c = 0; c < count; c++)
      for (int64_t i = 0; i < queries; i++)
        scores_QP[i * width_ + c] = dot(queries_QD_ + i * size, keys_CD + c * size, size);
  }

  void score_by_panel(const float* keys_CD, int64_t count, int64_t queries, float* scores_QP) const {
    const int64_t size = heads_.size;
    for (int64_t c = 0; c < count; c += LANES)
      for (int64_t d = 0; d < size; d += LANES)
        at::vec::transpose_mxn<float>(
            keys_CD + c * size + d, size, panel_ + d * PANEL + c, PANEL, std::min(LANES, count - c), LANES);
    for_tiles(queries, [&]<int ROWS>(int64_t first) {
      Sums<ROWS, 2> sums;
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = Vec(0);
      multiply(queries_QD_ + first * size, size, panel_, PANEL, size, sums);
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sums[i][j].store(scores_QP + (first + i) * width_ + j * LANES);
    });
  }

  // Scores of a query → e^(score − the largest), 0 where nothing is visible, and what is to be multiplied by.
  void softmax(int64_t query, int64_t visible, int64_t longest, const float* own_key_D) {
    float* weights_P = weights_QP_ + query * width_;
    const int64_t end = (longest + LANES - 1) / LANES * LANES;
    std::fill(weights_P + visible, weights_P + end, -INF);
    Vec largest = Vec::loadu(weights_P);
    for (int64_t p = LANES; p < end; p += LANES) largest = at::vec::maximum(largest, Vec::loadu(weights_P + p));
    float most = max(largest);
    float own = -INF;
    if (own_key_D) {
      own = dot(queries_QD_ + query * heads_.size, own_key_D, heads_.size);
      most = own > most || std::isnan(own) ? own : most;
    }
    Vec total(0);
    for (int64_t p = 0; p < end; p += LANES) {
      const Vec weight = (Vec::loadu(weights_P + p) - Vec(most)).exp_u20();
      weight.store(weights_P + p);
      total = total + weight;
    }
    const float own_weight = own_key_D ? std::exp(own - most) : 0;
    // exp_u20 makes numbers of what is none.
    scale_Q_[query] = std::isfinite(most) ? 1 / (sum(total) + own_weight) : NOT_A_NUMBER;
    own_weight_Q_[query] = own_weight;
  }

  // The weighted means of the values, so many vectors of a head from number d on.
  template <int VECTORS>
  void average(
      const float* qkv_C, float* out_CHD, const Block& block, int64_t head, const Cache& cache, int64_t longest,
      int64_t d) const {
    const int64_t group = heads_.group(), size = heads_.size;
    for_tiles(block.tokens * group, [&]<int ROWS>(int64_t first) {
      Sums<ROWS, VECTORS> sums;
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sums[i][j] = Vec(0);
      for (int64_t start = 0; start < longest; start += cache.page_size)
        multiply(
            weights_QP_ + first * width_ + start, width_,
            cache.values_NGPD + cache.offset(block.slot, head, start) + d, size,
            std::min(cache.page_size, longest - start), sums);
      for (int i = 0; i < ROWS; i++) {
        const int64_t query = first + i, token = query / group;
        const float* own_value_D = heads_.value(qkv_C + token * heads_.width(), head) + d;
        float* out_D = out_CHD + (token * heads_.query + head * group + query % group) * size + d;
        for (int j = 0; j < VECTORS; j++) {
          Vec mean = sums[i][j];
          if (block.sees_itself(token))
            mean = at::vec::fmadd(Vec(own_weight_Q_[query]), Vec::loadu(own_value_D + j * LANES), mean);
          (mean * Vec(scale_Q_[query])).store(out_D + j * LANES);
        }
      }
    });
  }

  const Heads heads_;
  const int64_t width_;
  std::unique_ptr<float[]> memory_;
  float *queries_QD_, *weights_QP_, *scale_Q_, *own_weight_Q_, *panel_;
};

}  // namespace qtilt
