// Matrix products, of few rows and of many: T tokens, N outputs and K inputs of a layer.
//
// Weights lie in panels, in the order in which they are read, and each panel is read once for all rows. With few rows
// memory is what counts: the next panel is asked for while this one is multiplied.
#pragma once

#include "vectors.h"

namespace qtilt {

// Columns of a product that are computed together; a weight is packed in panels [K, PANEL] of so many outputs.
constexpr int64_t PANEL = 2 * LANES;
// Rows of a product that are computed together: their sums, two vectors a row, fill the registers.
constexpr int TILE = LANES == 16 ? 12 : 6;

// The sums of a tile: one or two vectors for each of its rows.
template <int ROWS, int VECTORS>
using Sums = Vec[ROWS][VECTORS];

// sums[i][j] += Σ_k a[i, k] · b[k, j] for a tile of rows. `next`: AHEAD · LANES · depth numbers that are soon to be read.
template <int AHEAD = 0, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void multiply(
    const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, Sums<ROWS, VECTORS>& sums,
    const float* next = nullptr) {
  // A local copy, and inner loops that are written out: else the sums don't stay in registers.
  Sums<ROWS, VECTORS> local;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) local[i][j] = sums[i][j];
  for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 2
    for (int j = 0; j < AHEAD; j++) __builtin_prefetch(next + (k * AHEAD + j) * LANES);
    Vec columns[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) columns[j] = Vec::loadu(b + k * b_row + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const Vec x(a[i * a_row + k]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) local[i][j] = at::vec::fmadd(x, columns[j], local[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) sums[i][j] = local[i][j];
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

// Of a product of many rows, so many panels are multiplied with one tile of them, which stays in the nearest cache.
constexpr int64_t PANELS_OF_A_TILE = 4;
// Rows of which it waits for weights rather than for multiplication.
constexpr int64_t FEW_ROWS = 8 * TILE;

// A layer: weight [panels, K, PANEL], bias [panels, PANEL], both padded with zeros (llama_forward.py packs them).
class Linear {
 public:
  Linear(Tensor packed_weight, Weights packed_bias)
      : weight_(std::move(packed_weight)), bias_(std::move(packed_bias)) {}

  template <Then then>
  void run(const float* x_TK, float* out_TN, int64_t tokens, int64_t outputs) const {
    QTILT_EVENT("linear");
    // While a panel is multiplied, a single tile asks for all of the next one, and each of a few for one half of it.
    if (tokens <= TILE)
      run_panels<then, 2>(x_TK, out_TN, tokens, outputs, 1);
    else if (tokens <= FEW_ROWS)
      run_panels<then, 1>(x_TK, out_TN, tokens, outputs, 1);
    else
      run_panels<then, 0>(x_TK, out_TN, tokens, outputs, PANELS_OF_A_TILE);
  }

 private:
  template <Then then, int AHEAD>
  void run_panels(const float* x_TK, float* out_TN, int64_t tokens, int64_t outputs, int64_t together) const {
    const int64_t depth = weight_.size(1);
    const float *weights = numbers(weight_), *biases = numbers(bias_);
    at::parallel_for(0, weight_.size(0), together, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += together)
        for_tiles(tokens, [&]<int ROWS>(int64_t row) {
          for (int64_t panel = first; panel < std::min(first + together, end); panel++) {
            const float* b = weights + panel * depth * PANEL;
            const float* next = panel + 1 < end ? b + depth * PANEL : b;
            Sums<ROWS, 2> sums;
            for (int j = 0; j < 2; j++) {
              const Vec bias = biases ? Vec::loadu(biases + panel * PANEL + j * LANES) : Vec(0);
              for (int i = 0; i < ROWS; i++) sums[i][j] = bias;
            }
            multiply<AHEAD>(x_TK + row * depth, depth, b, PANEL, depth, sums, next + (row ? depth * LANES : 0));
            for (int i = 0; i < ROWS; i++) finish<then>(sums[i], out_TN + (row + i) * outputs, panel, outputs);
          }
        });
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

  Tensor weight_;
  Weights bias_;
};

}  // namespace qtilt
