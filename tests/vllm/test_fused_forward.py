"""Backbones on vLLM's kernels against plain Hugging Face forwards, whatever the histories do between steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_histories import Histories, acquire, assert_only_tails_come_out, value_logits
from hf_oracle import CONFIGS, DISTRIBUTIONS, POSITIONS, make_backbone, make_value_model
from qtilt.engine import ValueEngine
from qtilt.forwards.compiled import library
from qtilt.forwards.fused import FusedForward, can_fuse
from qtilt.forwards.probe import check_forward, measure_geometry
from qtilt.value_model import ValueModel
from qtilt.vllm_plugin.kernels import VllmKernels


@pytest.fixture(autouse=True)
def _without_the_compiled_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", [])


FAMILIES = [family for family in CONFIGS if family != "gpt2"]


def llama3_rope(head_dim: int) -> Any:
    """Frequencies that depend on the position, and heads of another size than hidden size over heads."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = CONFIGS["llama-gqa"].to_dict() | {
        "head_dim": head_dim,
        "rope_parameters": rope,
        "attention_bias": True,
        "attn_implementation": "eager",
    }
    return type(CONFIGS["llama-gqa"]).from_dict(config)


@pytest.mark.parametrize("value_type", ["q", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_happens_between_steps(family: str, value_type: str) -> None:
    run = Histories(make_value_model(family, value_type), kernels=VllmKernels())
    assert run.engine.forward.name == "fused"
    run.wander(steps=25)


@pytest.mark.parametrize("head_dim", [4, 6, 24, 64])
def test_rotations_of_any_size_and_kind(head_dim: int) -> None:
    backbone = make_backbone(llama3_rope(head_dim))
    model = ValueModel.from_backbone(backbone, "v", DISTRIBUTIONS["bernoulli"], 0.5).eval()
    torch.nn.init.normal_(model.head.bias)
    run = Histories(model, kernels=VllmKernels())
    assert run.engine.forward.name == "fused"
    run.check(*run.start(POSITIONS - 1, 40, 1))


def test_half_precision_is_no_further_from_float32_than_transformers_own_operations() -> None:
    histories = [list(range(length)) for length in (3, 40, 17)]
    candidates_BK = torch.tensor([[1, 2, 3]]).expand(3, -1)

    def logits(dtype: torch.dtype, **settings: Any) -> Tensor:
        engine = ValueEngine(make_value_model("llama-gqa", "v").to(dtype), 3, POSITIONS - 1, **settings)
        return value_logits(engine, [acquire(engine) for _ in histories], histories, candidates_BK)

    exact = logits(torch.float32)
    plain = (logits(torch.bfloat16) - exact).norm()
    fused = (logits(torch.bfloat16, kernels=VllmKernels()) - exact).norm()
    assert 0 < fused < 1.5 * plain


def test_other_backbones_run_as_they_are() -> None:
    model = make_value_model("gpt2", "v")
    assert ValueEngine(model, 1, 8, kernels=VllmKernels()).forward.name == "transformers"
    with pytest.raises(ValueError, match=r"GPT2Model can't be fused"):
        FusedForward(model.backbone, VllmKernels(), 8)
    for change in ({"hidden_act": "gelu"}, {"hidden_size": 24}):
        config = type(CONFIGS["llama"]).from_dict(CONFIGS["llama"].to_dict() | change)
        assert not can_fuse(make_backbone(config))
    assert not can_fuse(make_backbone(CONFIGS["llama"]).double())
    quantised = make_backbone(CONFIGS["llama"])
    quantised.layers[1].mlp.up_proj = torch.nn.Sequential(quantised.layers[1].mlp.up_proj)
    assert not can_fuse(quantised)
    assert not can_fuse(make_backbone(type(CONFIGS["qwen3"]).from_dict(CONFIGS["qwen3"].to_dict() | {"head_dim": 8})))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1.0), id="norm"),
        pytest.param(lambda layer: setattr(layer.self_attn, "scaling", 0.1), id="attention"),
        pytest.param(lambda layer: layer.mlp.gate_proj.weight.data.mul_(1.1), id="weight"),
    ],
)
def test_a_forward_that_is_not_the_backbones_is_noticed(change: Callable[[Any], None]) -> None:
    backbone, other = make_backbone(CONFIGS["qwen3"]), make_backbone(CONFIGS["qwen3"])
    geometry = measure_geometry(backbone, POSITIONS)
    check_forward(backbone, FusedForward(other, VllmKernels(), POSITIONS), geometry, POSITIONS)
    change(other.layers[1])
    with pytest.raises(ValueError, match=r"Qwen3Model, run by fused, computes something else .* allowed 1e-03"):
        check_forward(backbone, FusedForward(other, VllmKernels(), POSITIONS), geometry, POSITIONS)


class NoRotation(VllmKernels):
    """vLLM's kernels but one."""

    rotary_embedding = staticmethod(lambda *_: None)


def test_an_engine_refuses_kernels_that_compute_something_else() -> None:
    with pytest.raises(ValueError, match="LlamaModel, run by fused, computes something else"):
        ValueEngine(make_value_model("llama", "v"), 1, 8, kernels=NoRotation())


def test_only_tails_come_out_and_of_spans_nothing() -> None:
    assert_only_tails_come_out(ValueEngine(make_value_model("llama-gqa", "v"), 2, 32, kernels=VllmKernels()))
