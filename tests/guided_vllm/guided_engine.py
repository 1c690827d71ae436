"""The engine of tight_engine with guidance: every kind of value model is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guided_vllm import plain_vllm, tight_engine
from guided_vllm.driving import Answer
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, make_reference, make_value_model
from qtilt.vllm_plugin.config import PROCESSOR, WORKER_EXTENSION, PluginConfig
from vllm import envs

N_GRAM_SPECULATION = {
    "speculative_config": {
        "method": "ngram_gpu",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
}
"""Engine arguments, for Model Runner V2."""


def start(
    models: Path,
    processors: tuple[Any, ...] = (),
    *,
    ask_plain: bool = True,
    kv_fraction: float = 1.0,
    **more: Any,
) -> Served:
    """processors: further logits processors, after ours. more: further engine arguments.

    ask_plain: the same engine without the plugin is started, asked and shut down before.
    """
    reference = make_reference(models / "reference")
    plain = _answers_of_plain_vllm(reference, **more) if ask_plain else {}
    directories = {
        (name, 1): make_value_model(models / name, *parts, seed=seed)
        for seed, (name, parts) in enumerate(VALUE_MODELS.items(), start=1)
    }
    plugin = PluginConfig(
        value_models={name: str(path) for (name, _), path in directories.items()},
        max_top_k=128,
        kv_fraction=kv_fraction,
        behind_server=True,
    )
    engine = tight_engine.start(
        reference,
        logits_processors=[PROCESSOR, *processors],
        worker_extension_cls=WORKER_EXTENSION,
        additional_config={"qtilt": plugin.to_dict()},
        **more,
    )
    return Served(engine, reference, directories, plain, kv_fraction=kv_fraction)


def start_on_two_ranks(models: Path, patch: pytest.MonkeyPatch, **more: Any) -> Served:
    """The workers are processes of their own, with a thread each; vLLM would give each a NUMA node."""
    envs.disable_envs_cache()  # engines of this process have read the environment before
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.setenv("OMP_NUM_THREADS", "1")
    served = start(models, tensor_parallel_size=2, distributed_executor_backend="mp", **more)
    guides, follows = served.engine.collective_rpc("qtilt_describe")
    assert len(guides["value_models"]) == len(VALUE_MODELS)
    assert follows["value_models"] == []
    return served


def _answers_of_plain_vllm(reference: Path, **more: Any) -> dict[str, list[Answer]]:
    engine = tight_engine.start(reference, **more)
    answers = plain_vllm.answers(engine)
    engine.engine_core.shutdown()
    return answers


def assert_nothing_leaks(served: Served) -> Iterator[None]:
    """Around a test that uses the engine: no row, no record, no slot and no page is left after it."""
    before = served.rpc("qtilt_describe")
    yield
    assert not served.engine.has_unfinished_requests()
    state = served.rpc("qtilt_describe")
    assert state["guided_rows"] == 0
    assert state["traces"] == before["traces"]
    free = {version["name"]: version["free_slots"] for version in before["value_models"]}
    assert {version["name"]: version["free_slots"] for version in state["value_models"]} == free
    assert {version["held_pages"] for version in state["value_models"]} == {0}
    assert {version["rows"] for version in state["value_models"]} == {0}
