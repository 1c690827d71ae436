// What tilt.py defines and explains, for logits in float32 on a CPU: four calls a step instead of sixty. Names, shapes
// and arguments are the same.
#pragma once

#include <functional>

#include "vectors.h"

namespace qtilt {

// Groups of numbers for each of the largest that are looked for, and in all: fewer would wait for each other.
constexpr int64_t GROUPS_OF_ONE = 3;
constexpr int64_t FEWEST_GROUPS = 8 * LANES;
// Mass that a float32 softmax can't tell from none.
constexpr double ROUNDING = 1e-6;
constexpr double LOG_OF_NOTHING = -std::numeric_limits<double>::infinity();

struct Found {
  float value;
  int64_t place;

  bool operator<(const Found& other) const { return value != other.value ? value > other.value : place < other.place; }
};

inline Vec only_finite(const Vec& x) { return Vec::blendv(Vec(-INF), x, x.abs() < Vec(INF)); }

inline float only_finite(float x) { return std::isfinite(x) ? x : -INF; }

// The k largest numbers of a row in order, the first of equal ones.
//
// The row is dealt out to some times k groups: as many numbers as groups have a larger one are at least as large as the
// k-th largest of the groups' largest, so what is less than that needn't be looked at. No branch depends on the rest.
inline void find_largest(
    const float* x, int64_t size, int64_t k, std::vector<float>& largest, std::vector<Found>& found) {
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
    const float number = only_finite(x[at]);
    if (number > least || (number == least && equal++ < k)) found.push_back({number, at});
  };
  for (; i + LANES <= size; i += LANES)
    for (int hits = ~(only_finite(Vec::loadu(x + i)) >= Vec(least)).zero_mask() & ((1 << LANES) - 1); hits;
         hits &= hits - 1)
      keep(i + __builtin_ctz(hits));
  for (; i < size; i++) keep(i);
  std::partial_sort(found.begin(), found.begin() + k, found.end());
}

inline std::tuple<Tensor, Tensor> top_candidates(
    const Tensor& logits_BV, int64_t k, int64_t scorable, const std::optional<Tensor>& top_k) {
  const int64_t rows = logits_BV.size(0), size = std::min(scorable, logits_BV.size(1)), count = std::min(k, size);
  Tensor token_ids_BK = at::empty({rows, count}, logits_BV.options().dtype(at::kLong));
  Tensor valid_BK = at::empty({rows, count}, logits_BV.options().dtype(at::kBool));
  const Tensor top_k_B = top_k ? top_k->contiguous() : Tensor();
  const int64_t* top_ks = top_k ? top_k_B.const_data_ptr<int64_t>() : nullptr;
  int64_t* ids = token_ids_BK.mutable_data_ptr<int64_t>();
  bool* valid = valid_BK.mutable_data_ptr<bool>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> largest;
    std::vector<Found> found;
    for (int64_t b = begin; b < end; b++) {
      find_largest(numbers(logits_BV) + b * logits_BV.stride(0), size, count, largest, found);
      for (int64_t i = 0; i < count; i++) {
        ids[b * count + i] = found[i].place;
        valid[b * count + i] = found[i].value > -INF && (!top_ks || i < top_ks[b]);
      }
    }
  });
  return {token_ids_BK, valid_BK};
}

// So many vectors are summed in float32, then in double: beside a sum of 1 a float32 drops what is below 2^-24.
constexpr int64_t IN_FLOAT = 256 * LANES;

// ln Σ e^(x/scale) of a row.
inline double log_sum_exp(const float* x, int64_t size, double scale) {
  const int64_t whole = size / LANES * LANES;
  Vec largest(-INF);
  for (int64_t i = 0; i < whole; i += LANES) largest = at::vec::maximum(largest, only_finite(Vec::loadu(x + i)));
  float most = max(largest);
  for (int64_t i = whole; i < size; i++) most = std::max(most, only_finite(x[i]));
  if (most == -INF) return LOG_OF_NOTHING;
  const Vec shift(most), factor(static_cast<float>(1 / scale));
  double sum_of_row = 0;
  for (int64_t first = 0; first < whole; first += IN_FLOAT) {
    Vec total(0);
    for (int64_t i = first; i < std::min(first + IN_FLOAT, whole); i += LANES)
      total = total + ((only_finite(Vec::loadu(x + i)) - shift) * factor).exp_u20();
    sum_of_row += sum(total);
  }
  for (int64_t i = whole; i < size; i++) sum_of_row += std::exp((only_finite(x[i]) - most) / scale);
  return most / scale + std::log(sum_of_row);
}

inline double scale_of(double temperature) { return temperature > 0 ? temperature : 1; }

inline std::tuple<Tensor, Tensor> reference_mass(
    const Tensor& logits_BV, const Tensor& token_ids, const Tensor& valid, const Tensor& temperature) {
  const int64_t rows = token_ids.size(0), count = token_ids.size(1);
  const Tensor token_ids_BK = token_ids.contiguous(), valid_BK = valid.contiguous();
  const Tensor temperature_B = temperature.to(at::kDouble).contiguous();
  Tensor candidates_BK = at::empty({rows, count}, logits_BV.options().dtype(at::kDouble));
  Tensor rest_B1 = at::empty({rows, 1}, candidates_BK.options());
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const float* logits = numbers(logits_BV) + b * logits_BV.stride(0);
      const int64_t* ids = token_ids_BK.const_data_ptr<int64_t>() + b * count;
      const bool* valid_K = valid_BK.const_data_ptr<bool>() + b * count;
      double* candidates = candidates_BK.mutable_data_ptr<double>() + b * count;
      const double scale = scale_of(temperature_B.const_data_ptr<double>()[b]);
      const double log_normaliser = log_sum_exp(logits, logits_BV.size(1), scale);
      double rest = 1;
      for (int64_t i = 0; i < count; i++) {
        candidates[i] = valid_K[i] ? logits[ids[i]] / scale - log_normaliser : LOG_OF_NOTHING;
        rest -= std::exp(candidates[i]);
      }
      rest_B1.mutable_data_ptr<double>()[b] = rest < ROUNDING ? LOG_OF_NOTHING : std::log(rest);
    }
  });
  return {candidates_BK, rest_B1};
}

// ln Σ e^x of a few numbers. NaN when one of them is.
inline double log_sum_exp(const double* x, int64_t size) {
  double most = LOG_OF_NOTHING, total = 0;
  for (int64_t i = 0; i < size; i++) most = x[i] <= most || std::isnan(most) ? most : x[i];
  if (most == LOG_OF_NOTHING) return most;
  for (int64_t i = 0; i < size; i++) total += std::exp(x[i] - most);
  return most + std::log(total);
}

// What tokens other than a row's scored candidates lose with the tail `mean`, given what the scored ones do.
inline double mean_drop(const double* log_mass_K, const bool* scored_K, const double* drops_K, int64_t count) {
  std::vector<double> before, after;
  double furthest = 0;
  for (int64_t i = 0; i < count; i++)
    if (scored_K[i]) {
      before.push_back(log_mass_K[i]);
      after.push_back(log_mass_K[i] - drops_K[i]);
      furthest = std::max(furthest, drops_K[i]);
    }
  const double log_total = log_sum_exp(before.data(), before.size());
  if (!(log_total > LOG_OF_NOTHING)) return 0;
  // A mean is between the ends, whatever was rounded.
  return std::clamp(log_total - log_sum_exp(after.data(), after.size()), 0.0, furthest);
}

inline std::tuple<Tensor, Tensor> drops(
    const Tensor& log_mass, const Tensor& scored, const Tensor& offsets, const Tensor& floor, bool with_mean) {
  const int64_t rows = scored.size(0), count = scored.size(1);
  const Tensor log_mass_BK = log_mass.contiguous(), scored_BK = scored.contiguous();
  const Tensor offsets_BK = offsets.to(at::kDouble).contiguous(), floor_B = floor.to(at::kDouble).contiguous();
  Tensor drops_BK = at::empty({rows, count}, offsets_BK.options());
  Tensor others_B1 = at::empty({rows, 1}, offsets_BK.options());
  for (int64_t b = 0; b < rows; b++) {
    const bool* scored_K = scored_BK.const_data_ptr<bool>() + b * count;
    const double* offsets_K = offsets_BK.const_data_ptr<double>() + b * count;
    double* drops_K = drops_BK.mutable_data_ptr<double>() + b * count;
    const double lowest = floor_B.const_data_ptr<double>()[b];
    // A NaN is the largest, as in torch.
    double largest = with_mean ? LOG_OF_NOTHING : lowest;
    for (int64_t i = 0; i < count; i++)
      if (scored_K[i]) largest = offsets_K[i] <= largest || std::isnan(largest) ? largest : offsets_K[i];
    for (int64_t i = 0; i < count; i++) drops_K[i] = largest - offsets_K[i];
    const double others = with_mean
        ? mean_drop(log_mass_BK.const_data_ptr<double>() + b * count, scored_K, drops_K, count)
        : largest - lowest;
    for (int64_t i = 0; i < count; i++) drops_K[i] = scored_K[i] ? drops_K[i] : others;
    others_B1.mutable_data_ptr<double>()[b] = others;
  }
  return {drops_BK, others_B1};
}

inline void tilt_(
    const Tensor& logits_BV, const Tensor& token_ids, const Tensor& drops, const Tensor& others,
    const Tensor& temperature) {
  const int64_t rows = token_ids.size(0), count = token_ids.size(1), size = logits_BV.size(1);
  const Tensor token_ids_BK = token_ids.contiguous(), drops_BK = drops.contiguous(), others_B1 = others.contiguous();
  const Tensor temperature_B = temperature.to(at::kDouble).contiguous();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tilted(count);
    for (int64_t b = begin; b < end; b++) {
      float* logits = logits_BV.mutable_data_ptr<float>() + b * logits_BV.stride(0);
      const int64_t* ids = token_ids_BK.const_data_ptr<int64_t>() + b * count;
      const double* drops_K = drops_BK.const_data_ptr<double>() + b * count;
      const double scale = scale_of(temperature_B.const_data_ptr<double>()[b]);
      const float others_drop = static_cast<float>(scale * others_B1.const_data_ptr<double>()[b]);
      for (int64_t i = 0; i < count; i++)
        tilted[i] = logits[ids[i]] - static_cast<float>(scale * drops_K[i]);
      if (others_drop != 0) {
#pragma omp simd
        for (int64_t v = 0; v < size; v++) logits[v] -= others_drop;
      }
      for (int64_t i = 0; i < count; i++) logits[ids[i]] = tilted[i];
    }
  });
}

inline Tensor divergence(const Tensor& log_mass, const Tensor& rest, const Tensor& drops, const Tensor& others) {
  const int64_t rows = log_mass.size(0), count = log_mass.size(1);
  const Tensor log_mass_BK = log_mass.contiguous(), rest_B1 = rest.contiguous();
  const Tensor drops_BK = drops.contiguous(), others_B1 = others.contiguous();
  Tensor divergence_B3 = at::empty({rows, 3}, log_mass_BK.options());
  // Of the candidates and, last, of all other tokens.
  std::vector<double> dropped(count + 1), log_weight(count + 1);
  for (int64_t b = 0; b < rows; b++) {
    const double* log_mass_K = log_mass_BK.const_data_ptr<double>() + b * count;
    std::copy_n(drops_BK.const_data_ptr<double>() + b * count, count, dropped.begin());
    dropped[count] = others_B1.const_data_ptr<double>()[b];
    double kl = 0, kl_candidates = 0;
    for (int64_t i = 0; i < count; i++) log_weight[i] = log_mass_K[i] - dropped[i];
    log_weight[count] = rest_B1.const_data_ptr<double>()[b] - dropped[count];
    const double log_z = log_sum_exp(log_weight.data(), count + 1), log_z_K = log_sum_exp(log_weight.data(), count);
    const double log_mass_of_all = log_sum_exp(log_mass_K, count);
    for (int64_t i = 0; i <= count; i++) {
      if (log_weight[i] == LOG_OF_NOTHING) continue;
      kl += std::exp(log_weight[i] - log_z) * (-dropped[i] - log_z);
      if (i < count) kl_candidates += std::exp(log_weight[i] - log_z_K) * (log_mass_of_all - dropped[i] - log_z_K);
    }
    const double mass = std::exp(log_mass_of_all);
    const double measured[3] = {std::max(kl, 0.0), std::max(kl_candidates, 0.0), std::min(mass, 1.0)};
    std::copy_n(measured, 3, divergence_B3.mutable_data_ptr<double>() + b * 3);
  }
  return divergence_B3;
}

}  // namespace qtilt
