"""One engine at a time for all tests of this folder: everything vLLM does to a batch happens in it.

All run twice: with steps one after the other, as on CPUs, and with async scheduling, as on GPUs by default, where a
step is scheduled before the tokens of the one before are known.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guided_vllm import tight_engine
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, make_reference, make_value_model
from guided_vllm.vllm_on_cpu import allow_async_scheduling
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
    assert tight_engine.schedules_asynchronously(served.engine) == (request.param == "async")
    yield served
    served.engine.engine_core.shutdown()


def start(models: Path) -> Served:
    reference = make_reference(models / "reference")
    directories = {
        (name, 1): make_value_model(models / name, *parts, seed=seed)
        for seed, (name, parts) in enumerate(VALUE_MODELS.items(), start=1)
    }
    plugin = PluginConfig(value_models={name: str(path) for (name, _), path in directories.items()}, max_top_k=128)
    engine = tight_engine.start(
        reference,
        logits_processors=[PROCESSOR],
        worker_extension_cls=WORKER_EXTENSION,
        additional_config={"qtilt": plugin.to_dict()},
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
