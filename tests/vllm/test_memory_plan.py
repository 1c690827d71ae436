"""Value caches sized with vLLM's own, and the plan against what the processor really allocates."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS
from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.processor import GuidanceProcessor
from qtilt.vllm_plugin.sizing import bytes_of, plan_of

CPU = torch.device("cpu")
BLOCKS, BLOCK = 11, 32  # of tight_engine's key-value cache


def processor(served: Served, **config: object) -> GuidanceProcessor:
    """Another one, beside that of the engine."""
    parts = ("speculative", "parallel", "model", "scheduler", "cache", "device", "lora")
    changed = {f"{part}_config": getattr(served.engine.vllm_config, f"{part}_config") for part in parts}
    changed["additional_config"] = {"qtilt": PluginConfig(**config).to_dict()}
    return GuidanceProcessor(SimpleNamespace(**changed), CPU)


def directories(served: Served) -> dict[str, str]:
    return {name: str(served.directories[name, 1]) for name in VALUE_MODELS}


def test_auto_is_as_many_tokens_as_vllms_cache_holds(served: Served) -> None:
    made = processor(served, value_models=directories(served), kv_tokens="auto")
    for version in made.residents:
        pages = version.engine.cache.pages
        assert pages.total * pages.size == BLOCKS * BLOCK


@pytest.mark.parametrize("asked", [{"kv_tokens": 200}, {"kv_fraction": 0.3}, {"kv_fraction": 1.0}], ids=str)
def test_what_is_planned_is_what_is_allocated(served: Served, asked: dict[str, float]) -> None:
    config = PluginConfig(value_models=directories(served), **asked)
    made = processor(served, **config.to_dict())
    plan = plan_of(served.engine.vllm_config, config, bytes_of(CPU))
    versions = list(made.residents)
    caches = {id(version.engine.cache): version.engine.cache for version in versions}.values()
    assert plan.value_cache == pytest.approx(
        sum(content.nbytes for cache in caches for content in cache.memory.content), rel=0.05
    )
    records = made.batch.table.divergence_SP3.nbytes + made.batch.table.candidates_SP.nbytes
    assert plan.records == pytest.approx(records, rel=0.05)


def test_the_plan_is_in_the_servers_log(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has handlers for the loggers below its own name, and for no others."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    processor(served, value_models=directories(served), kv_tokens=200)
    assert any("what vLLM may use" in line for line in lines)


def test_the_cache_of_value_models_to_come_is_there_from_the_start(served: Served, tmp_path: Path) -> None:
    """And is theirs: nothing of it is allocated when they are published."""
    backbone = served.directories["v-bernoulli", 1] / "backbone"
    made = processor(served, backbone=str(backbone), kv_tokens=4 * 128)
    (held,) = made.residents._held_caches
    assert held.pages.total == 16
    version = made.residents.load_at_start("value", str(served.directories["v-bernoulli", 1]))
    assert version.engine.cache is held


def test_a_backbone_that_is_nowhere_is_refused(served: Served) -> None:
    with pytest.raises(ValueError, match="no-such-model"):
        processor(served, backbone="/no-such-model", kv_tokens="auto")
