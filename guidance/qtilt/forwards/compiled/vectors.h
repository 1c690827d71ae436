// What all of these files are written with. The innermost dimension of every tensor is contiguous.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

// The rest of the block is an event of torch's profiler.
#define QTILT_EVENT(name) RECORD_FUNCTION("qtilt::" name, c10::ArrayRef<const c10::IValue>{})

namespace qtilt {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
using Weights = std::optional<Tensor>;

constexpr int64_t LANES = Vec::size();
// Numbers of a cache line.
constexpr int64_t LINE = 16;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

inline const float* numbers(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }
inline const float* numbers(const Weights& weights) { return weights ? numbers(*weights) : nullptr; }
inline float* writable(Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

// Raises IndexError: who reads or writes at these places doesn't look.
inline void check_below(const Tensor& indices, int64_t limit, const char* what) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); i++)
    TORCH_CHECK_INDEX(0 <= index[i] && index[i] < limit, what, " ", index[i], " isn't from 0 to ", limit - 1);
}

inline void prefetch(const float* first, int64_t count) {
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(first + i);
}

inline float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float max(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

inline float dot(const float* a, const float* b, int64_t size) {
  Vec products(0);
  for (int64_t d = 0; d < size; d += LANES) products = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), products);
  return sum(products);
}

}  // namespace qtilt
