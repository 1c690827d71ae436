// What torch knows of these files. They are one translation unit: most of the time to compile them is torch's headers.
#include <torch/custom_class.h>
#include <torch/library.h>

#include "llama_forward.h"
#include "q_head.h"
#include "tilt.h"

TORCH_LIBRARY(qtilt, library) {
  using at::Tensor;
  library.def("lanes() -> int", []() { return qtilt::LANES; });
  library.class_<qtilt::LlamaForward>("LlamaForward")
      .def(torch::init<Tensor, Tensor, Tensor, int64_t, int64_t, int64_t, int64_t, double>())
      .def("add_layer", &qtilt::LlamaForward::add_layer)
      .def("forward", &qtilt::LlamaForward::forward);
  library.def(
      "candidate_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor candidates, int atoms) -> Tensor",
      qtilt::candidate_logits);
  library.def(
      "top_candidates(Tensor logits, int k, int scorable, Tensor? top_k) -> (Tensor, Tensor)", qtilt::top_candidates);
  library.def(
      "reference_mass(Tensor logits, Tensor token_ids, Tensor valid, Tensor temperature) -> (Tensor, Tensor)",
      qtilt::reference_mass);
  library.def(
      "drops(Tensor log_mass, Tensor scored, Tensor offsets, Tensor floor, bool with_mean) -> (Tensor, Tensor)",
      qtilt::drops);
  library.def(
      "tilt_(Tensor(a!) logits, Tensor token_ids, Tensor drops, Tensor others, Tensor temperature) -> ()",
      qtilt::tilt_);
  library.def(
      "divergence(Tensor log_mass, Tensor rest, Tensor drops, Tensor others) -> Tensor", qtilt::divergence);
}
