"""One engine at a time for all tests of this folder: everything vLLM does to a batch happens in it.

All run twice: with steps one after the other, as on CPUs, and with async scheduling, as on GPUs by default, where a
step is scheduled before the tokens of the one before are known.

Prompts longer than 32 tokens are prefilled in chunks; 11 blocks of 32 tokens hold a third of what 8 requests may need,
so long requests preempt each other; the prefix cache is on. Tests assert that what they are about really happened.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.llm_engine import LLMEngine

from guided_vllm.served import Served
from guided_vllm.tiny_models import MAX_MODEL_LEN, VALUE_MODELS, make_reference, make_value_model
from qtilt.vllm_plugin.config import PROCESSOR, WORKER_EXTENSION, PluginConfig


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session", params=["sync", "async"])
def served(models: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "async":
            allow_async_scheduling(patch)
        served = start(models / request.param)
    core = served.engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler) == (request.param == "async")
    yield served
    served.engine.engine_core.shutdown()


def allow_async_scheduling(patch: pytest.MonkeyPatch) -> None:
    """vLLM switches async scheduling off on CPUs, where nothing runs beside the device; it works there all the same."""
    check_and_update_config = CpuPlatform.check_and_update_config

    def check_and_keep_async(config: VllmConfig) -> None:
        check_and_update_config(config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_keep_async))


def start(models: Path) -> Served:
    reference = make_reference(models / "reference")
    directories = {
        (name, 1): make_value_model(models / name, *parts, seed=seed)
        for seed, (name, parts) in enumerate(VALUE_MODELS.items(), start=1)
    }
    plugin = PluginConfig(value_models={name: str(path) for (name, _), path in directories.items()}, max_top_k=128)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(reference),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            block_size=32,
            num_gpu_blocks_override=11,
            kv_cache_memory_bytes=1 << 24,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            enforce_eager=True,
            distributed_executor_backend="uni",
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            logits_processors=[PROCESSOR],
            worker_extension_cls=WORKER_EXTENSION,
            additional_config={"qtilt": plugin.to_dict()},
            disable_log_stats=False,
            seed=0,
        )
    )
    return Served(engine, reference, directories)


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that used the engine: no row, no record, no slot is left."""
    if "served" not in request.fixturenames:
        yield
        return
    served: Served = request.getfixturevalue("served")
    traces_before = served.rpc("qtilt_describe")["traces"]
    yield
    assert not served.engine.has_unfinished_requests()
    state = served.rpc("qtilt_describe")
    assert state["guided_rows"] == 0
    assert state["traces"] == traces_before
    assert {version["free_slots"] for version in state["value_models"]} == {served.max_seqs}
    assert {version["rows"] for version in state["value_models"]} == {0}
