// The head of Q-type value models.
#pragma once

#include "vectors.h"

namespace qtilt {

// Candidates whose rows of the head are asked for before they are read, as they lie anywhere, and numbers of each.
constexpr int64_t FETCHED_AHEAD = 4;
constexpr int64_t FETCHED = 512;

// Logits of candidates [B, K, A]. hidden [B, E], weight [V·A, E], bias [V·A], candidates [B, K].
inline Tensor candidate_logits(
    const Tensor& hidden, const Tensor& weight, const Weights& bias, const Tensor& token_ids, int64_t atoms) {
  const Tensor candidates = token_ids.contiguous();
  const int64_t rows = candidates.size(0), count = candidates.size(1), size = hidden.size(1);
  Tensor logits_BKA = at::empty({rows, count, atoms}, hidden.options());
  check_below(candidates, weight.size(0) / atoms, "candidate");
  const float *hidden_BE = numbers(hidden), *weight_NE = numbers(weight), *bias_N = numbers(bias);
  const int64_t* ids_BK = candidates.const_data_ptr<int64_t>();
  float* logits = writable(logits_BKA);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * count; i < end * count; i++) {
      if (i + FETCHED_AHEAD < end * count)
        prefetch(weight_NE + ids_BK[i + FETCHED_AHEAD] * atoms * size, std::min(atoms * size, FETCHED));
      for (int64_t atom = 0; atom < atoms; atom++) {
        const int64_t n = ids_BK[i] * atoms + atom;
        const float product = dot(hidden_BE + i / count * size, weight_NE + n * size, size);
        logits[i * atoms + atom] = bias_N ? product + bias_N[n] : product;
      }
    }
  });
  return logits_BKA;
}

}  // namespace qtilt
