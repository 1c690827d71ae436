"""Backbones on vLLM's CUDA kernels against plain Hugging Face forwards there."""

import pytest
import torch

from engine_histories import Histories
from hf_oracle import CONFIGS, make_value_model
from qtilt.vllm_plugin.kernels import VllmKernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_type", ["q", "v"])
@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "gpt2"])
def test_whatever_happens_between_steps(family: str, value_type: str, dtype: torch.dtype) -> None:
    model = make_value_model(family, value_type, "categorical", scored_by=0.1).to("cuda", dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2  # of logits up to about 5
    run = Histories(model, seed=7, exact={"atol": tolerance, "rtol": tolerance}, kernels=VllmKernels())
    assert run.engine.forward.name == "fused"
    run.wander(steps=15)
