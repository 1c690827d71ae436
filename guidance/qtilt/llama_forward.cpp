// The forward of Llama-like decoders over one packed step, in float32 on a CPU: see native_forward.py.
//
// Shapes: T packed tokens, E hidden size, N outputs and K inputs of a layer, H query heads and G key/value heads of size
// D, Q queries that read the same keys; S slots of M pages of P positions. The innermost dimension is contiguous.
//
// A step of few tokens is bound by how fast weights, keys and values come from memory, and by the number of calls; so
// the step is one call, what is read next is asked for ahead, and weights lie in the order in which they are read.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
using Weights = std::optional<Tensor>;

constexpr int64_t LANES = Vec::size();
// Columns of a product that are computed together; a weight is packed in panels [K, PANEL] of so many outputs.
constexpr int64_t PANEL = 2 * LANES;
// Rows of a product that are computed together: their sums, two vectors a row, fill the registers.
constexpr int TILE = LANES == 16 ? 12 : 6;
// Numbers of a cache line.
constexpr int64_t LINE = 16;
// Fewer queries than this are multiplied by keys as they lie; for more it pays to turn the keys into a panel first.
constexpr int64_t QUERIES_OF_A_PANEL = 5;
// Groups of numbers for each of the largest that are looked for, and in all: fewer wait for each other.
constexpr int64_t GROUPS_OF_ONE = 3;
constexpr int64_t FEWEST_GROUPS = 8 * LANES;
// Rows of a Q-type head that are asked for before they are read.
constexpr int64_t FETCHED_AHEAD = 4;
// Tokens of a span that are one block of attention.
constexpr int64_t SPAN_TOKENS = 16;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

const float* read(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }
const float* read(const Weights& weights) { return weights ? read(*weights) : nullptr; }
float* write(Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

void fetch(const float* first, int64_t count) {
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(first + i);
}

float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

float max(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

float dot(const float* a, const float* b, int64_t size) {
  Vec products(0);
  for (int64_t d = 0; d < size; d += LANES) products = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), products);
  return sum(products);
}

// sums[i][j] += Σ_k a[i, k] · b[k, j] for a tile of rows and one panel. `ahead`: PANEL/2 · depth numbers to come next.
template <int ROWS, bool FETCH>
inline __attribute__((always_inline)) void multiply(
    const float* a, int64_t row, const float* b, int64_t b_row, int64_t depth, Vec (&sums)[ROWS][2],
    const float* ahead = nullptr) {
  // A local copy, and loops without a branch: else the sums don't stay in registers.
  Vec local[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) local[i][0] = sums[i][0], local[i][1] = sums[i][1];
  for (int64_t k = 0; k < depth; k++) {
    if constexpr (FETCH) __builtin_prefetch(ahead + k * LANES);
    const Vec left = Vec::loadu(b + k * b_row), right = Vec::loadu(b + k * b_row + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const Vec x(a[i * row + k]);
      local[i][0] = at::vec::fmadd(x, left, local[i][0]);
      local[i][1] = at::vec::fmadd(x, right, local[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) sums[i][0] = local[i][0], sums[i][1] = local[i][1];
}

template <int ROWS, typename F>
inline void call_with_rows(int64_t rows, int64_t first, const F& f) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return f.template operator()<ROWS>(first);
    call_with_rows<ROWS - 1>(rows, first, f);
  }
}

// f<ROWS>(first) for rows 0 to `rows`, cut into tiles of nearly equal size.
template <typename F>
inline void for_tiles(int64_t rows, const F& f) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = rows * tile / tiles;
    call_with_rows<TILE>(rows * (tile + 1) / tiles - first, first, f);
  }
}

// What becomes of a product. GATE: a panel is LANES outputs of the gate and the same of what it lets through.
enum class Then { WRITE, ADD, GATE };

// A layer: weight [panels, K, PANEL], bias [panels, PANEL], both padded with zeros (native_forward.py packs them).
struct Linear {
  Tensor weight;
  Weights bias;

  template <Then then>
  void operator()(const float* x_TK, float* out_TN, int64_t tokens, int64_t outputs) const {
    const int64_t panels = weight.size(0), depth = weight.size(1);
    const float *weights = read(weight), *biases = read(bias);
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const float* b = weights + panel * depth * PANEL;
        const float* next = panel + 1 < end ? b + depth * PANEL : b;
        Vec offset[2] = {Vec(0), Vec(0)};
        if (biases)
          for (int j = 0; j < 2; j++) offset[j] = Vec::loadu(biases + panel * PANEL + j * LANES);
        for_tiles(tokens, [&]<int ROWS>(int64_t first) {
          Vec sums[ROWS][2];
          for (int i = 0; i < ROWS; i++) sums[i][0] = offset[0], sums[i][1] = offset[1];
          // The first tile asks for one half of the next panel, the others for the other half.
          multiply<ROWS, true>(x_TK + first * depth, depth, b, PANEL, depth, sums, next + (first ? depth * LANES : 0));
          for (int i = 0; i < ROWS; i++) finish<then>(sums[i], out_TN + (first + i) * outputs, panel, outputs);
        });
      }
    });
  }

  template <Then then>
  static void finish(const Vec (&sums)[2], float* out_N, int64_t panel, int64_t outputs) {
    if constexpr (then == Then::GATE) {
      const Vec gate = sums[0];
      const int64_t first = panel * LANES;
      (gate / (Vec(1) + gate.neg().exp_u20()) * sums[1]).store(out_N + first, std::min(LANES, outputs - first));
      return;
    }
    for (int j = 0; j < 2; j++) {
      const int64_t first = panel * PANEL + j * LANES, count = std::min(LANES, outputs - first);
      if (count <= 0) return;
      const Vec before = then == Then::ADD ? Vec::loadu(out_N + first, count) : Vec(0);
      (before + sums[j]).store(out_N + first, count);
    }
  }
};

void rms_norm(const float* x_n, const float* weight_n, float* out_n, int64_t n, float epsilon) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += x_n[i] * x_n[i];
  const float scale = 1 / std::sqrt(squares / n + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out_n[i] = x_n[i] * scale * weight_n[i];
}

// rotation_D: the cosines of half a head, then its sines.
void rotate(float* head_D, const float* rotation_D, int64_t size) {
  const int64_t half = size / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float cosine = rotation_D[i], sine = rotation_D[half + i], x = head_D[i], y = head_D[half + i];
    head_D[i] = x * cosine - y * sine;
    head_D[half + i] = y * cosine + x * sine;
  }
}

// Consecutive tokens of a step that read one slot. The first of them sees `visible` cached positions. When they are a
// span, each sees one more than the one before. When they are a tail, all see the same, and a candidate itself as well.
struct Block {
  int64_t slot, first, tokens, visible;
  bool is_span;
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
    const int64_t longest = block.visible + (block.is_span ? block.tokens - 1 : 0);
    for (int64_t i = 0; i < queries; i++) {
      const float* query = qkv_C + i / group * heads_.width() + (head * group + i % group) * size;
      for (int64_t d = 0; d < size; d++) queries_QD_[i * size + d] = query[d] * scaling;
    }
    score(block.slot, head, cache, queries, longest);
    for (int64_t i = 0; i < queries; i++) {
      const int64_t token = i / group;
      const bool sees_itself = !block.is_span && token > 0;
      soften(
          i, block.visible + (block.is_span ? token : 0), longest,
          sees_itself ? heads_.key(qkv_C + token * heads_.width(), head) : nullptr);
    }
    for (int64_t d = 0; d < size; d += PANEL) average(qkv_C, out_CHD, block, head, cache, queries, longest, d);
  }

 private:
  // Scores of all queries at all positions, as many positions at once as a panel has columns.
  void score(int64_t slot, int64_t head, const Cache& cache, int64_t queries, int64_t longest) {
    const int64_t size = heads_.size;
    for (int64_t start = 0; start < longest; start += PANEL) {
      const int64_t count = std::min(PANEL, longest - start), at = cache.offset(slot, head, start);
      // The values are read next; keys come from memory in order, which the processor sees by itself.
      fetch(cache.values_NGPD + at, count * size);
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
      for (int64_t i = 0; i < queries; i++) scores_QP[i * width_ + c] = dot(queries_QD_ + i * size, keys_CD + c * size, size);
  }

  void score_by_panel(const float* keys_CD, int64_t count, int64_t queries, float* scores_QP) const {
    const int64_t size = heads_.size;
    for (int64_t c = 0; c < count; c += LANES)
      for (int64_t d = 0; d < size; d += LANES)
        at::vec::transpose_mxn<float>(
            keys_CD + c * size + d, size, panel_ + d * PANEL + c, PANEL, std::min(LANES, count - c), LANES);
    for_tiles(queries, [&]<int ROWS>(int64_t first) {
      Vec sums[ROWS][2];
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = Vec(0);
      multiply<ROWS, false>(queries_QD_ + first * size, size, panel_, PANEL, size, sums);
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sums[i][j].store(scores_QP + (first + i) * width_ + j * LANES);
    });
  }

  // Scores of a query → e^(score − the largest), 0 where nothing is visible, and what is to be multiplied by.
  void soften(int64_t query, int64_t visible, int64_t longest, const float* own_key_D) {
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

  // The weighted mean of the values, PANEL numbers of a head from d on.
  void average(
      const float* qkv_C, float* out_CHD, const Block& block, int64_t head, const Cache& cache, int64_t queries,
      int64_t longest, int64_t d) {
    const int64_t group = heads_.group(), size = heads_.size;
    for_tiles(queries, [&]<int ROWS>(int64_t first) {
      Vec sums[ROWS][2];
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = Vec(0);
      for (int64_t start = 0; start < longest; start += cache.page_size)
        multiply<ROWS, false>(
            weights_QP_ + first * width_ + start, width_,
            cache.values_NGPD + cache.offset(block.slot, head, start) + d, size,
            std::min(cache.page_size, longest - start), sums);
      for (int i = 0; i < ROWS; i++) {
        const int64_t query = first + i, token = query / group;
        const float* own_value_D = heads_.value(qkv_C + token * heads_.width(), head) + d;
        float* out_D = out_CHD + (token * heads_.query + head * group + query % group) * size + d;
        const bool sees_itself = !block.is_span && token > 0;
        for (int64_t j = 0; j < 2 && d + j * LANES < size; j++) {
          Vec mean = sums[i][j];
          if (sees_itself)
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

struct Layer {
  Tensor input_norm;
  Linear qkv;
  Weights query_norm, key_norm;
  Linear out;
  Tensor post_norm;
  Linear gate_up, down;
};

class LlamaForward : public torch::CustomClassHolder {
 public:
  // embedding [V, E], norm [E], rotation [positions, D]: what Heads and the layers' sizes don't say.
  LlamaForward(
      Tensor embedding, Tensor norm, Tensor rotation, int64_t heads, int64_t kv_heads, int64_t head_size,
      int64_t intermediate_size, double epsilon)
      : embedding_(std::move(embedding)),
        norm_(std::move(norm)),
        rotation_(std::move(rotation)),
        heads_{heads, kv_heads, head_size},
        hidden_size_(norm_.size(0)),
        intermediate_size_(intermediate_size),
        epsilon_(static_cast<float>(epsilon)) {}

  void add_layer(
      Tensor input_norm, Tensor qkv, Weights qkv_bias, Weights query_norm, Weights key_norm, Tensor out,
      Weights out_bias, Tensor post_norm, Tensor gate_up, Weights gate_up_bias, Tensor down, Weights down_bias) {
    layers_.push_back(
        {input_norm, {qkv, qkv_bias}, query_norm, key_norm, {out, out_bias}, post_norm, {gate_up, gate_up_bias},
         {down, down_bias}});
  }

  // Hidden states [T, E]. ids, positions: int64 [T]. spans: int64 [spans, 3] of slot, start and tokens, first in the
  // step. slots, last_positions: int64 [B] of the rows, whose tails of equal size come after the spans.
  Tensor forward(
      const Tensor& ids, const Tensor& positions, const Tensor& spans, const Tensor& slots,
      const Tensor& last_positions, const Tensor& keys_LNGPD, const Tensor& values_LNGPD, const Tensor& table,
      double scaling) {
    const int64_t tokens = ids.size(0), width = heads_.width();
    const auto options = embedding_.options();
    Tensor residual_TE = at::empty({tokens, hidden_size_}, options);
    Tensor hidden_TE = at::empty({tokens, hidden_size_}, options);
    Tensor qkv_TW = at::empty({tokens, width}, options);
    Tensor heads_THD = at::empty({tokens, heads_.query * heads_.size}, options);
    Tensor gated_TI = at::empty({tokens, intermediate_size_}, options);
    float *residual = write(residual_TE), *hidden = write(hidden_TE), *qkv = write(qkv_TW);
    float *attended = write(heads_THD), *gated = write(gated_TI);

    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; t++)
      std::copy_n(read(embedding_) + id[t] * hidden_size_, hidden_size_, residual + t * hidden_size_);
    const std::vector<Block> blocks = cut_blocks(tokens, spans, slots, last_positions);
    Cache cache{nullptr, nullptr, table.const_data_ptr<int64_t>(), table.size(1), keys_LNGPD.size(3), heads_.kv, heads_.size};
    for (size_t number = 0; number < layers_.size(); number++) {
      const Layer& layer = layers_[number];
      cache.keys_NGPD = keys_LNGPD.data_ptr<float>() + number * keys_LNGPD.stride(0);
      cache.values_NGPD = values_LNGPD.data_ptr<float>() + number * values_LNGPD.stride(0);
      norm_rows(residual, layer.input_norm, hidden, tokens);
      layer.qkv.operator()<Then::WRITE>(hidden, qkv, tokens, width);
      turn(layer, positions, qkv, tokens);
      for (const Block& block : blocks) store(block, qkv, cache);
      attend(blocks, qkv, attended, cache, static_cast<float>(scaling));
      layer.out.operator()<Then::ADD>(attended, residual, tokens, hidden_size_);
      norm_rows(residual, layer.post_norm, hidden, tokens);
      layer.gate_up.operator()<Then::GATE>(hidden, gated, tokens, intermediate_size_);
      layer.down.operator()<Then::ADD>(gated, residual, tokens, hidden_size_);
    }
    norm_rows(residual, norm_, hidden, tokens);
    return hidden_TE;
  }

 private:
  static std::vector<Block> cut_blocks(
      int64_t tokens, const Tensor& spans, const Tensor& slots, const Tensor& last_positions) {
    std::vector<Block> blocks;
    int64_t first = 0;
    const int64_t* span = spans.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < spans.size(0); s++, span += 3)
      for (int64_t done = 0; done < span[2]; done += SPAN_TOKENS) {
        const int64_t count = std::min(SPAN_TOKENS, span[2] - done);
        blocks.push_back({span[0], first, count, span[1] + done + 1, true});
        first += count;
      }
    const int64_t rows = slots.size(0), tail = rows ? (tokens - first) / rows : 0;
    for (int64_t b = 0; b < rows; b++)
      blocks.push_back(
          {slots.const_data_ptr<int64_t>()[b], first + b * tail, tail,
           last_positions.const_data_ptr<int64_t>()[b] + 1, false});
    return blocks;
  }

  void norm_rows(const float* x, const Tensor& weight, float* out, int64_t tokens) const {
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        rms_norm(x + t * hidden_size_, read(weight), out + t * hidden_size_, hidden_size_, epsilon_);
    });
  }

  // Queries and keys are normalised, where the layer does so, and turned by their positions.
  void turn(const Layer& layer, const Tensor& positions, float* qkv, int64_t tokens) const {
    const int64_t* position = positions.const_data_ptr<int64_t>();
    const float *query_norm = read(layer.query_norm), *key_norm = read(layer.key_norm);
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t head = 0; head < heads_.query + heads_.kv; head++) {
          float* at = qkv + t * heads_.width() + head * heads_.size;
          const float* norm = head < heads_.query ? query_norm : key_norm;
          if (norm) rms_norm(at, norm, at, heads_.size, epsilon_);
          rotate(at, read(rotation_) + position[t] * heads_.size, heads_.size);
        }
    });
  }

  // Caches a span's keys and values, or those of a tail's last token, its first.
  void store(const Block& block, const float* qkv, const Cache& cache) const {
    for (int64_t t = 0; t < (block.is_span ? block.tokens : 1); t++)
      for (int64_t head = 0; head < heads_.kv; head++) {
        const float* from = qkv + (block.first + t) * heads_.width();
        const int64_t at = cache.offset(block.slot, head, block.visible - 1 + t);
        std::copy_n(heads_.key(from, head), heads_.size, cache.keys_NGPD + at);
        std::copy_n(heads_.value(from, head), heads_.size, cache.values_NGPD + at);
      }
  }

  void attend(
      const std::vector<Block>& blocks, const float* qkv, float* out, const Cache& cache, float scaling) const {
    int64_t tokens = 0, longest = 0;
    for (const Block& block : blocks) {
      tokens = std::max(tokens, block.tokens);
      longest = std::max(longest, block.visible + block.tokens);
    }
    const int64_t parts = static_cast<int64_t>(blocks.size()) * heads_.kv;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      BlockAttention attend_block(heads_, tokens, longest);
      for (int64_t part = begin; part < end; part++) {
        const Block& block = blocks[part / heads_.kv];
        attend_block(
            qkv + block.first * heads_.width(), out + block.first * heads_.query * heads_.size, block,
            part % heads_.kv, cache, scaling);
      }
    });
  }

  const Tensor embedding_, norm_, rotation_;
  const Heads heads_;
  const int64_t hidden_size_, intermediate_size_;
  const float epsilon_;
  std::vector<Layer> layers_;
};

// A Q-type head's logits of candidates [B, K, A]. hidden [B, E], weight [V·A, E], bias [V·A], candidates [B, K].
Tensor candidate_logits(const Tensor& hidden, const Tensor& weight, const Weights& bias, const Tensor& candidates, int64_t atoms) {
  const int64_t rows = candidates.size(0), count = candidates.size(1), size = hidden.size(1);
  Tensor logits_BKA = at::empty({rows, count, atoms}, hidden.options());
  const float *hidden_BE = read(hidden), *weight_NE = read(weight), *bias_N = read(bias);
  const int64_t* ids_BK = candidates.const_data_ptr<int64_t>();
  float* logits = write(logits_BKA);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * count; i < end * count; i++) {
      if (i + FETCHED_AHEAD < end * count) fetch(weight_NE + ids_BK[i + FETCHED_AHEAD] * atoms * size, atoms * size);
      for (int64_t atom = 0; atom < atoms; atom++) {
        const int64_t n = ids_BK[i] * atoms + atom;
        logits[i * atoms + atom] = dot(hidden_BE + i / count * size, weight_NE + n * size, size) + (bias_N ? bias_N[n] : 0);
      }
    }
  });
  return logits_BKA;
}

struct Found {
  float value;
  int64_t place;

  bool operator<(const Found& other) const { return value != other.value ? value > other.value : place < other.place; }
};

Vec only_finite(const Vec& x) { return Vec::blendv(Vec(-INF), x, x.abs() < Vec(INF)); }

// The k largest numbers of a row in order, the first of equal ones; what isn't finite counts as −inf.
//
// The row is dealt out to some times k groups: as many numbers as groups have a larger one are at least as large as the
// k-th largest of the groups' largest, so what is less than that needn't be looked at. No branch depends on the rest.
void find_largest(const float* x, int64_t size, int64_t k, std::vector<float>& largest, std::vector<Found>& found) {
  const int64_t groups = std::max(FEWEST_GROUPS, (GROUPS_OF_ONE * k + LANES - 1) / LANES * LANES);
  float least = -INF;
  if (groups <= size) {
    largest.assign(groups, -INF);
    for (int64_t i = 0; i + groups <= size; i += groups)
      for (int64_t j = 0; j < groups; j += LANES)
        at::vec::maximum(Vec::loadu(&largest[j]), only_finite(Vec::loadu(x + i + j))).store(&largest[j]);
    std::nth_element(largest.begin(), largest.begin() + k - 1, largest.end(), std::greater<>());
    least = largest[k - 1];
  }
  found.clear();
  int64_t equal = 0, i = 0;
  const auto keep = [&](int64_t at) {
    const float number = std::isfinite(x[at]) ? x[at] : -INF;
    if (number > least || (number == least && equal++ < k)) found.push_back({number, at});
  };
  for (; i + LANES <= size; i += LANES)
    for (int hits = ~(only_finite(Vec::loadu(x + i)) >= Vec(least)).zero_mask() & ((1 << LANES) - 1); hits; hits &= hits - 1)
      keep(i + __builtin_ctz(hits));
  for (; i < size; i++) keep(i);
  std::partial_sort(found.begin(), found.begin() + k, found.end());
}

// ln Σ e^(x/scale) of each row, float64 [B]; what isn't finite counts as −inf.
Tensor log_sum_exp(const Tensor& rows, const Tensor& scales) {
  const int64_t count = rows.size(0), size = rows.size(1), whole = size / LANES * LANES;
  Tensor result = at::empty({count}, scales.options());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* x = read(rows) + row * rows.stride(0);
      const double scale = scales.const_data_ptr<double>()[row];
      Vec largest(-INF);
      for (int64_t i = 0; i < whole; i += LANES) largest = at::vec::maximum(largest, only_finite(Vec::loadu(x + i)));
      float most = max(largest);
      for (int64_t i = whole; i < size; i++) most = std::isfinite(x[i]) ? std::max(most, x[i]) : most;
      const Vec shift(most), factor(static_cast<float>(1 / scale));
      Vec total(0);
      for (int64_t i = 0; i < whole; i += LANES)
        total = total + ((only_finite(Vec::loadu(x + i)) - shift) * factor).exp_u20();
      double sum_of_row = sum(total);
      for (int64_t i = whole; i < size; i++)
        if (std::isfinite(x[i])) sum_of_row += std::exp((x[i] - most) / scale);
      result.mutable_data_ptr<double>()[row] = most == -INF ? -INF : most / scale + std::log(sum_of_row);
    }
  });
  return result;
}

// The k largest numbers of each row, and where they are.
std::tuple<Tensor, Tensor> top_k(const Tensor& rows, int64_t k) {
  const int64_t count = rows.size(0), size = rows.size(1);
  Tensor values = at::empty({count, k}, rows.options());
  Tensor places = at::empty({count, k}, rows.options().dtype(at::kLong));
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> largest;
    std::vector<Found> found;
    for (int64_t row = begin; row < end; row++) {
      find_largest(read(rows) + row * rows.stride(0), size, k, largest, found);
      for (int64_t i = 0; i < k; i++) {
        write(values)[row * k + i] = found[i].value;
        places.mutable_data_ptr<int64_t>()[row * k + i] = found[i].place;
      }
    }
  });
  return {values, places};
}

}  // namespace

TORCH_LIBRARY(qtilt, library) {
  library.def("lanes() -> int", []() { return LANES; });
  library.def("top_k(Tensor rows, int k) -> (Tensor, Tensor)", top_k);
  library.def("log_sum_exp(Tensor rows, Tensor scales) -> Tensor", log_sum_exp);
  library.def("candidate_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor candidates, int atoms) -> Tensor", candidate_logits);
  library.class_<LlamaForward>("LlamaForward")
      .def(torch::init<Tensor, Tensor, Tensor, int64_t, int64_t, int64_t, int64_t, double>())
      .def("add_layer", &LlamaForward::add_layer)
      .def("forward", &LlamaForward::forward);
}
