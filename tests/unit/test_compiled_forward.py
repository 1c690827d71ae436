"""Backbones as one compiled function against plain Hugging Face forwards, whatever the histories do between steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_histories import Histories, acquire, assert_only_tails_come_out, value_logits
from hf_oracle import CONFIGS, DISTRIBUTIONS, POSITIONS, make_backbone, plain_value_logits
from qtilt.engine import ValueEngine
from qtilt.forwards.compiled.llama_forward import CompiledForward
from qtilt.forwards.packing import LastTokens
from qtilt.forwards.probe import check_forward, measure_geometry
from qtilt.value_model import ValueModel, ValueType

pytestmark = pytest.mark.usefixtures("compiled")

FAMILIES = [family for family in CONFIGS if family != "gpt2"]
# These models are wider than others in the tests, and numbers of some tens come out: float32, whoever computes, is this
# close to float64.
EXACT = {"atol": 1e-4, "rtol": 1e-5}
# Neither a panel nor a vector divides what a layer puts out, and most sizes differ from each other.
SIZES = {"hidden_size": 64, "intermediate_size": 52, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_model(
    family: str, value_type: ValueType = "v", distribution: str = "bernoulli", *, bias: bool = True, **sizes: Any
) -> ValueModel:
    config = CONFIGS[family]
    backbone = make_backbone(
        type(config).from_dict(config.to_dict() | SIZES | {"attn_implementation": "eager"} | sizes)
    )
    model = ValueModel.from_backbone(backbone, value_type, DISTRIBUTIONS[distribution], 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and (bias or name == "head.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kv_fraction", [1.0, 0.5])
@pytest.mark.parametrize("value_type", ["q", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_happens_between_steps(family: str, value_type: ValueType, kv_fraction: float) -> None:
    run = Histories(make_model(family, value_type), exact=EXACT, kv_fraction=kv_fraction)
    assert run.engine.forward.name == "compiled"
    run.wander(steps=25)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 8), (6, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80])
def test_heads_of_any_number_and_size_with_every_bias(head_dim: int, heads: tuple[int, int], distribution: str) -> None:
    sizes = {"hidden_size": 96, "head_dim": head_dim, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    biases = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}
    for value_type in ("q", "v"):
        run = Histories(make_model("llama", value_type, distribution, **sizes, **biases), exact=EXACT)
        assert run.engine.forward.name == "compiled"
        run.check(*run.start(POSITIONS - 1, 40, 1, 33))
        for slot in run.tokens:
            if len(run.tokens[slot]) < POSITIONS - 1:
                run.grow(slot, 1)
        run.check(*run.tokens, columns=40)


@pytest.mark.parametrize("value_type", ["q", "v"])
def test_several_threads(value_type: ValueType) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Histories(make_model("qwen3", value_type), exact=EXACT).wander(steps=15)
    finally:
        torch.set_num_threads(before)


def test_long_catch_ups_take_several_forwards() -> None:
    run = Histories(make_model("llama"), exact=EXACT, max_new_tokens=7)
    run.check(*run.start(50, 3, 61, 90))


def test_drafts_of_one_history_are_rows_of_one_step() -> None:
    model = make_model("mistral")
    engine = ValueEngine(model, 2, POSITIONS - 1)
    slot = acquire(engine)
    history, drafts = [5, 9, 2, 40, 7], [11, 3, 60]
    candidates_BK = torch.tensor([[1, 2]]).expand(len(drafts) + 1, -1)
    value_logits(engine, [slot], [history[:-1]], candidates_BK[:1])
    tokens_B = torch.tensor([history[-1], *drafts])
    positions_B = len(history) - 1 + torch.arange(len(tokens_B))
    last = LastTokens(torch.full_like(tokens_B, slot), positions_B, tokens_B, int(positions_B[-1]) + 1, has_drafts=True)
    engine.cache.hold(np.array([slot]), np.array([last.longest]))
    histories = [history + drafts[:count] for count in range(len(drafts) + 1)]
    torch.testing.assert_close(
        engine.score(last, candidates_BK), plain_value_logits(model, histories, candidates_BK), **EXACT
    )


@pytest.mark.parametrize("kv_fraction", [1.0, 0.5])
@pytest.mark.parametrize("value_type", ["q", "v"])
def test_what_is_no_number_reaches_no_other_history(value_type: ValueType, kv_fraction: float) -> None:
    model = make_model("llama", value_type)
    broken = 13
    engine = ValueEngine(model, 3, POSITIONS - 1, kv_fraction=kv_fraction)
    model.backbone.get_input_embeddings().weight.data[broken] = torch.nan
    slots = [acquire(engine) for _ in range(3)]
    histories = [[1, 2, 3], [4, broken, 6, 7], [8] * 20]
    candidates_BK = torch.tensor([[1, 2], [1, 2], [broken, 3]])
    got_BKA = value_logits(engine, slots, histories, candidates_BK)
    assert got_BKA[1].isnan().all()
    assert got_BKA[2, 0].isnan().all() == (value_type == "v")
    torch.testing.assert_close(got_BKA[:1], plain_value_logits(model, histories[:1], candidates_BK[:1]), **EXACT)
    torch.testing.assert_close(
        got_BKA[2:, 1:], plain_value_logits(model, histories[2:], candidates_BK[2:, 1:]), **EXACT
    )
    engine.release(slots[1])
    slot = acquire(engine)
    again_BKA = value_logits(engine, [slot], [[9] * 30], candidates_BK[:1])
    torch.testing.assert_close(again_BKA, plain_value_logits(model, [[9] * 30], candidates_BK[:1]), **EXACT)


@pytest.mark.parametrize("candidate", [61, -1])
@pytest.mark.parametrize("value_type", ["q", "v"])
def test_candidates_that_are_no_tokens_are_refused(value_type: ValueType, candidate: int) -> None:
    run = Histories(make_model("llama", value_type))
    slots = run.start(5)
    with pytest.raises(IndexError, match=f"{candidate} isn't from 0 to 60"):
        value_logits(run.engine, slots, [run.tokens[slots[0]]], torch.tensor([[1, candidate]]))


def test_a_model_that_computes_something_else_is_refused() -> None:
    backbone = make_model("llama").backbone
    geometry = measure_geometry(backbone, 8)
    compiled = CompiledForward(backbone, geometry, 8)
    backbone.layers[0].input_layernorm.weight.data *= 2  # type: ignore[union-attr, operator]
    backbone.layers[1].mlp.down_proj.weight.data *= 2  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="computes something else"):
        check_forward(backbone, compiled, geometry, 8)


@pytest.mark.parametrize(("family", "sizes"), [("llama", {"head_dim": 24}), ("llama", {"hidden_act": "gelu"})])
def test_other_models_run_as_before(family: str, sizes: dict[str, Any]) -> None:
    run = Histories(make_model(family, **sizes), exact=EXACT)
    assert run.engine.forward.name == "transformers"
    run.wander(steps=5)


def test_half_precision_runs_as_before() -> None:
    model = make_model("llama").to(torch.bfloat16)
    assert ValueEngine(model, 1, 8).forward.name == "transformers"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU runs the tests so anyway")
def test_the_same_with_narrower_vectors() -> None:
    chosen = "whatever_happens or heads_of_any or no_number"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout[-3000:]


def test_only_tails_come_out_and_of_spans_nothing() -> None:
    assert_only_tails_come_out(ValueEngine(make_model("llama-gqa"), 2, 32))
