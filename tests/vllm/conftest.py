"""One engine at a time for all tests of this folder: everything vLLM does to a batch happens in it.

All run twice: with steps one after the other, as on CPUs, and with async scheduling, as on GPUs by default, where a
step is scheduled before the tokens of the one before are known; then with little memory for the value caches, too.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guided_vllm import guided_engine, tight_engine
from guided_vllm.served import Served
from guided_vllm.vllm_on_cpu import allow_async_scheduling


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session", params=["sync", "async"])
def served(models: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "async":
            allow_async_scheduling(patch)
        served = guided_engine.start(models / request.param, kv_fraction=0.2 if request.param == "async" else 1.0)
    assert tight_engine.schedules_asynchronously(served.engine) == (request.param == "async")
    yield served
    served.engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if "served" in request.fixturenames:
        yield from guided_engine.assert_nothing_leaks(request.getfixturevalue("served"))
    else:
        yield
