// The forward of Llama-like decoders over one packed step, in float32 on a CPU: see llama_forward.py.
//
// Shapes: T packed tokens, E hidden size, H query heads and G key/value heads of size D, W numbers of a token's queries,
// keys and values, I intermediate size; otherwise as in attention.h.
//
// A step of few tokens waits for calls and for memory: so it is one call, weights lie in the order in which they are
// read, and what is read next is asked for ahead.
#pragma once

#include <torch/custom_class.h>

#include "attention.h"

namespace qtilt {

inline void rms_norm(const float* x_n, const float* weight_n, float* out_n, int64_t n, float epsilon) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += x_n[i] * x_n[i];
  const float scale = 1 / std::sqrt(squares / n + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out_n[i] = x_n[i] * scale * weight_n[i];
}

// rotation_D: the cosines of half a head, then its sines.
inline void rotate(float* head_D, const float* rotation_D, int64_t size) {
  const int64_t half = size / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float cosine = rotation_D[i], sine = rotation_D[half + i], x = head_D[i], y = head_D[half + i];
    head_D[i] = x * cosine - y * sine;
    head_D[half + i] = y * cosine + x * sine;
  }
}

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
  // embedding [V, E], norm [E] after the last layer, rotation [positions, D] (rotation_table in fused.py).
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

  // Hidden states [X, E] of the tails: of spans the last layer stores keys and values, and no more is computed. ids,
  // positions: int64 [T]. spans: int64 [spans, 3] of slot, start and tokens, first in the step. row_slots, row_positions:
  // int64 [B] of the rows' last tokens, whose tails of so many tokens, int64 [B], come after the spans.
  Tensor forward(
      const Tensor& ids, const Tensor& positions, const Tensor& spans, const Tensor& row_slots,
      const Tensor& row_positions, const Tensor& tails, const Tensor& keys_LNGPD, const Tensor& values_LNGPD,
      const Tensor& table, double scaling) {
    const Tensor slots = row_slots.contiguous(), last_positions = row_positions.contiguous();
    const int64_t tokens = ids.size(0), width = heads_.width();
    const auto options = embedding_.options();
    Tensor residual_TE = at::empty({tokens, hidden_size_}, options);
    Tensor hidden_TE = at::empty({tokens, hidden_size_}, options);
    Tensor qkv_TW = at::empty({tokens, width}, options);
    Tensor heads_THD = at::empty({tokens, heads_.query * heads_.size}, options);
    Tensor gated_TI = at::empty({tokens, intermediate_size_}, options);
    float *residual = writable(residual_TE), *hidden = writable(hidden_TE), *qkv = writable(qkv_TW);
    float *attended = writable(heads_THD), *gated = writable(gated_TI);

    check_below(ids, embedding_.size(0), "token id");
    check_below(positions, rotation_.size(0), "position");
    check_below(slots, table.size(0), "slot");
    check_below(last_positions, table.size(1) * keys_LNGPD.size(3), "cached position");
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; t++)
      std::copy_n(numbers(embedding_) + id[t] * hidden_size_, hidden_size_, residual + t * hidden_size_);
    std::vector<Block> blocks = cut_blocks(tokens, spans, slots, last_positions, tails);
    // From this token on hidden states are wanted.
    int64_t first = 0;
    Cache cache{
        nullptr, nullptr, table.const_data_ptr<int64_t>(), table.size(1), keys_LNGPD.size(3), heads_.kv, heads_.size};
    for (size_t number = 0; number < layers_.size(); number++) {
      const Layer& layer = layers_[number];
      cache.keys_NGPD = keys_LNGPD.data_ptr<float>() + number * keys_LNGPD.stride(0);
      cache.values_NGPD = values_LNGPD.data_ptr<float>() + number * values_LNGPD.stride(0);
      norm_rows(residual, layer.input_norm, hidden, tokens);
      layer.qkv.run<Then::WRITE>(hidden, qkv, tokens, width);
      rotate_rows(layer, positions, qkv, tokens);
      for (const Block& block : blocks) store(block, qkv, cache);
      if (number + 1 == layers_.size()) {
        std::erase_if(blocks, [](const Block& block) { return block.is_span; });
        first = blocks.empty() ? tokens : blocks.front().first;
        if (first == tokens) return hidden_TE.slice(0, tokens);
      }
      attend(blocks, qkv, attended, cache, static_cast<float>(scaling));
      const int64_t wanted = tokens - first;
      float* sum = residual + first * hidden_size_;
      layer.out.run<Then::ADD>(attended + first * heads_.query * heads_.size, sum, wanted, hidden_size_);
      norm_rows(sum, layer.post_norm, hidden, wanted);
      layer.gate_up.run<Then::GATE>(hidden, gated, wanted, intermediate_size_);
      layer.down.run<Then::ADD>(gated, sum, wanted, hidden_size_);
    }
    norm_rows(residual + first * hidden_size_, norm_, hidden, tokens - first);
    return hidden_TE.slice(0, 0, tokens - first);
  }

 private:
  static std::vector<Block> cut_blocks(
      int64_t tokens, const Tensor& spans, const Tensor& slots, const Tensor& last_positions, const Tensor& tails) {
    std::vector<Block> blocks;
    int64_t first = 0;
    const auto cut = [&](int64_t slot, int64_t count, int64_t visible, bool is_span) {
      for (int64_t done = 0; done < count; done += BLOCK_TOKENS, first += blocks.back().tokens)
        blocks.push_back(
            {slot, first, std::min(BLOCK_TOKENS, count - done), is_span ? visible + done : visible, done, is_span});
    };
    const int64_t* span = spans.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < spans.size(0); s++, span += 3) cut(span[0], span[2], span[1] + 1, true);
    TORCH_CHECK(tails.size(0) == slots.size(0), slots.size(0), " rows have ", tails.size(0), " tails");
    for (int64_t b = 0; b < slots.size(0); b++)
      cut(slots.const_data_ptr<int64_t>()[b], tails.const_data_ptr<int64_t>()[b],
          last_positions.const_data_ptr<int64_t>()[b] + 1, false);
    TORCH_CHECK(first == tokens, "spans and tails have ", first, " tokens, the step has ", tokens);
    return blocks;
  }

  void norm_rows(const float* x, const Tensor& weight, float* out, int64_t tokens) const {
    QTILT_EVENT("norm");
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        rms_norm(x + t * hidden_size_, numbers(weight), out + t * hidden_size_, hidden_size_, epsilon_);
    });
  }

  // Queries and keys are normalised, where the layer does so, and rotated by their positions.
  void rotate_rows(const Layer& layer, const Tensor& positions, float* qkv, int64_t tokens) const {
    QTILT_EVENT("rotation");
    const int64_t* position = positions.const_data_ptr<int64_t>();
    const float *query_norm = numbers(layer.query_norm), *key_norm = numbers(layer.key_norm);
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t head = 0; head < heads_.query + heads_.kv; head++) {
          float* at = qkv + t * heads_.width() + head * heads_.size;
          const float* norm = head < heads_.query ? query_norm : key_norm;
          if (norm) rms_norm(at, norm, at, heads_.size, epsilon_);
          rotate(at, numbers(rotation_) + position[t] * heads_.size, heads_.size);
        }
    });
  }

  // Caches a span's keys and values, or those of a tail's last token, its first.
  void store(const Block& block, const float* qkv, const Cache& cache) const {
    const int64_t stored = block.is_span ? block.tokens : block.candidate == 0;
    for (int64_t t = 0; t < stored; t++)
      for (int64_t head = 0; head < heads_.kv; head++) {
        const float* from = qkv + (block.first + t) * heads_.width();
        const int64_t at = cache.offset(block.slot, head, block.visible - 1 + t);
        std::copy_n(heads_.key(from, head), heads_.size, cache.keys_NGPD + at);
        std::copy_n(heads_.value(from, head), heads_.size, cache.values_NGPD + at);
      }
  }

  void attend(
      const std::vector<Block>& blocks, const float* qkv, float* out, const Cache& cache, float scaling) const {
    QTILT_EVENT("attention");
    int64_t tokens = 0, longest = 0;
    for (const Block& block : blocks) {
      tokens = std::max(tokens, block.tokens);
      longest = std::max(longest, block.longest());
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

}  // namespace qtilt
