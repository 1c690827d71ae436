"""The plan of a device's memory: against sums written out, and against what is really allocated."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from guided_vllm.tiny_models import make_value_model
from qtilt.checkpoint import load_value_model
from qtilt.distributions import Bernoulli, Categorical
from qtilt.engine import ValueEngine
from qtilt.engine import cache as cache_module
from qtilt.engine.cache import KVCache
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.probe import measure_geometry
from qtilt.vllm_plugin.plan import (
    GIB,
    ModelSize,
    PlanError,
    Published,
    Serving,
    all_of,
    plan_memory,
    reference_size,
)
from qtilt.vllm_plugin.records import StepTable
from qtilt.vllm_plugin.reserve import Reserve
from running_batch import CPU, PlayedRequests

BFLOAT16 = torch.bfloat16
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False, **LLAMA
)
LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True, **LLAMA
)
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
ON_80_GB = Serving(slots=1024, max_length=4096, batched_tokens=8192, max_top_k=64, on_gpu=True)


def saved(config: LlamaConfig, directory: Path, layers: int | None = None) -> Published:
    config.save_pretrained(directory)
    return Published(str(directory), layers)


def test_the_pair_of_the_documentation_on_80_gib(tmp_path: Path) -> None:
    """Numbers of parameters as the models' cards have them."""
    reference = reference_size(LLAMA_8B, BFLOAT16)
    value = saved(LLAMA_1B, tmp_path / "backbone").size(BFLOAT16)
    assert reference.weights == 2 * 8_030_261_248
    assert value.weights == 2 * (1_235_814_400 + 2048 + 1)
    assert (reference.token, value.token) == (128 * 1024, 32 * 1024)
    plan = plan_memory(int(0.92 * 80 * GIB), reference, value, ON_80_GB)
    assert plan.value_weights == 3 * value.weights, "in use, still named, and being loaded"
    # Both caches hold the same tokens, up to a page.
    assert abs(plan.value_tokens - plan.cache_tokens) <= 64
    assert plan.value_tokens > 250_000
    parts = (plan.reference_weights, plan.reference_activations, plan.guidance, plan.cache)
    assert sum(parts) == plan.budget == int(0.92 * 80 * GIB)
    assert f"value pages, {plan.value_tokens:,} tokens" in plan.table()


def test_the_models_of_the_demo(tmp_path: Path) -> None:
    value = saved(SMOLLM2, tmp_path / "backbone", layers=12)
    reference, size = reference_size(SMOLLM2, BFLOAT16), value.size(BFLOAT16)
    assert reference.weights == 2 * 134_515_008
    layer = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536 + 2 * 576
    assert size.weights == 2 * (49152 * 576 + 12 * layer + 576 + 577)
    assert size.token == 2 * 12 * 3 * 64 * 2
    assert value.geometry(BFLOAT16, CPU).token_bytes == size.token


def test_tensor_parallel_ranks_share_the_reference_and_not_the_value_model() -> None:
    whole, half = reference_size(LLAMA_8B, BFLOAT16), reference_size(LLAMA_8B, BFLOAT16, ranks=2)
    assert (half.weights, half.token) == (whole.weights // 2, whole.token // 2)


def test_what_the_user_has_said_of_vllms_cache_decides_both() -> None:
    reference, value = reference_size(LLAMA_8B, BFLOAT16), ModelSize(10**9, 2**15, 70_000, 128256)
    given = plan_memory(73 * GIB, reference, value, ON_80_GB, cache=100_000 * reference.token)
    assert (given.value_tokens, given.cache_tokens, given.cache) == (100_000, 100_000, 100_000 * reference.token)
    with pytest.raises(PlanError, match="the size that vLLM's cache is given"):
        plan_memory(73 * GIB, reference, value, ON_80_GB, cache=500 * GIB)
    asked = plan_memory(73 * GIB, reference, value, ON_80_GB, value_tokens=50_000)
    assert asked.value_tokens == 50_016  # whole pages
    assert asked.cache_tokens > 200_000
    most = plan_memory(73 * GIB, reference, value, Serving(4, 4096, 2048, 64), value_tokens=10**9)
    assert most.value_tokens == 4 * 4096
    assert most.kv_fraction(Serving(4, 4096, 2048, 64)) == 1


@pytest.mark.parametrize("max_length", [31, 32, 33, 100, 1000, 2048])
@pytest.mark.parametrize("tokens", [1, 200, 560, 1000, 3000, 10**6])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_cache_of_the_planned_fraction_has_the_planned_size_at_any_length(
    max_length: int, tokens: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "has_one_piece", lambda _: not on_gpu)
    serving = Serving(5, max_length, 64, 8, on_gpu=on_gpu)
    geometry = CacheGeometry(1, 1, 8, torch.float32, CPU)
    size = ModelSize(0, geometry.token_bytes, 8, 90)
    plan = plan_memory(GIB, size, size, serving, value_tokens=tokens)
    cache = KVCache(geometry, serving.slots, serving.max_length, plan.kv_fraction(serving))
    assert plan.value_cache == sum(content.nbytes for content in cache.memory.content)
    assert plan.value_tokens == cache.pages.total * cache.pages.size
    assert plan.value_tokens >= min(tokens, serving.slots * max_length)


def test_drafts_are_rows_of_a_step_too() -> None:
    value = ModelSize(10**9, 2**15, 70_000, 128256)
    plain, drafted = (
        plan_memory(73 * GIB, value, value, Serving(64, 4096, 2048, 20, drafts=drafts), 10_000) for drafts in (0, 3)
    )
    rows = 3 * 64
    assert drafted.step_activations - plain.step_activations == rows * (21 * 70_000 + 6 * 4 * 128256)


def test_what_stays_with_captured_steps_is_planned() -> None:
    """Of a V-type's rows as many as have 4,096 tokens, twice; and a copy of the logits, of at most 256 rows."""
    value = ModelSize(10**9, 2**15, 70_000, 128256)
    few, many = (Serving(slots, 4096, 2048, 20, on_gpu=True) for slots in (64, 1024))
    activations = [plan_memory(73 * GIB, value, value, serving, 10_000).step_activations for serving in (few, many)]
    of_steps = [(2048 + rows * 21) * 70_000 + rows * 128256 * 4 for rows in (64, 1024)]
    captured = [2 * 64 * 21 * 70_000 + 64 * 128256 * 4, 2 * 4096 * 70_000 + 256 * 128256 * 4]
    assert activations == [step + kept for step, kept in zip(of_steps, captured, strict=True)]


def test_a_reference_whose_size_is_unknown_leaves_it_to_the_user(tmp_path: Path) -> None:
    unknown, value = ModelSize(0, 0, 0, 128256), ModelSize(10**9, 2**15, 70_000, 128256)
    with pytest.raises(PlanError, match="--guidance-kv-tokens"):
        plan_memory(73 * GIB, unknown, value, ON_80_GB)
    plan = plan_memory(73 * GIB, unknown, value, ON_80_GB, value_tokens=50_000)
    assert plan.cache == 73 * GIB - plan.guidance
    assert "reference: weights" not in plan.table()

    class OwnConfig(PreTrainedConfig):
        model_type = "nobody-knows"
        vocab_size, hidden_size = 90, 8
        auto_map: ClassVar = {"AutoModel": "their_code.TheirModel"}

    with pytest.raises(ValueError, match=r"OwnConfig|trust_remote_code"):
        reference_size(OwnConfig(), BFLOAT16)


def test_what_does_not_fit_is_refused_in_one_line_that_says_what_to_change() -> None:
    reference, value = reference_size(LLAMA_8B, BFLOAT16), ModelSize(2 * 10**9, 2**15, 70_000, 128256)
    with pytest.raises(PlanError, match=r"of the 22\.0 GiB .* 4096 tokens.*--max-num-seqs.*--guidance-kv-tokens") as no:
        plan_memory(22 * GIB, reference, value, ON_80_GB)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.0, 1.0, 5)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize(("type_", "family"), [("v", "llama"), ("q", "gpt2")])
def test_sizes_are_those_of_what_is_allocated(tmp_path: Path, type_: str, family: str, distribution: Bernoulli) -> None:
    directory = make_value_model(tmp_path / "value", type_, distribution, family, seed=1)
    published, serving = Published(str(directory)), Serving(6, 64, 32, 8)
    size = published.size(torch.float32)
    model = load_value_model(directory)
    assert size.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert published.geometry(torch.float32, CPU) == measure_geometry(model.backbone, 64)
    for tokens, held in ((200, 224), (10_000, 6 * 64)):
        plan = plan_memory(GIB, size, size, serving, value_tokens=tokens)
        cache = ValueEngine(model, serving.slots, serving.max_length, kv_fraction=plan.kv_fraction(serving)).cache
        assert plan.value_tokens == cache.pages.total * cache.pages.size == held
        assert plan.value_cache == sum(content.nbytes for content in cache.memory.content)
    requests = PlayedRequests(serving.slots, speculates=False)
    table = StepTable(requests)
    assert plan.records == table.divergence_SP3.nbytes + table.candidates_SP.nbytes


def test_a_reference_is_as_large_as_vllm_will_load_it(tmp_path: Path) -> None:
    for tied in (True, False):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=90, tie_word_embeddings=tied
        )
        model = LlamaForCausalLM(config)
        assert reference_size(config, torch.float32).weights == sum(weight.nbytes for weight in model.parameters())


def test_value_models_of_one_geometry_share_a_cache_and_others_of_as_many_bytes_do_not(tmp_path: Path) -> None:
    small = saved(LLAMA_1B, tmp_path / "1b")
    eight_layers = saved(LLAMA_8B, tmp_path / "8b", layers=8)
    token = small.size(BFLOAT16).token
    assert eight_layers.size(BFLOAT16).token == token
    both = all_of([small, eight_layers, small], BFLOAT16)
    assert both.token == 2 * token
    assert both.weights == 2 * small.size(BFLOAT16).weights + eight_layers.size(BFLOAT16).weights


def test_a_backbone_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-place"):
        Published(str(tmp_path / "no-such-place")).size(BFLOAT16)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none of these"}))
    with pytest.raises(ValueError, match="none of these"):
        Published(str(tmp_path)).size(BFLOAT16)


def test_the_reserve_is_given_up_for_what_it_stands_for() -> None:
    reserve = Reserve(CPU, activations=1000, weights=100, versions=2)
    assert reserve.held_bytes == 1200
    reserve.begin_to_serve()
    assert reserve.held_bytes == 200
    with reserve.room_for_a_version():
        assert reserve.held_bytes == 100
    with pytest.raises(KeyError), reserve.room_for_a_version():
        raise KeyError("the version is no good")
    assert reserve.held_bytes == 100, "held again for the next one"
    reserve.hold_again()
    assert reserve.held_bytes == 200
