"""One engine at a time with Model Runner V2, in which everything vLLM does to a batch happens.

All tests that take it run twice: plain, and with n-gram speculative decoding and little memory for the value caches.
Both with async scheduling, as on GPUs by default. This folder's tests run in a process of their own: see own_process
and vllm_on_cpu.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from guided_vllm import guided_engine, tight_engine
from guided_vllm.served import Served
from guided_vllm.v2_watcher import Watcher
from guided_vllm.vllm_on_cpu import allow_async_scheduling

ENGINES: dict[str, dict[str, Any]] = {"plain": {}, "ngram": guided_engine.N_GRAM_SPECULATION}


@pytest.fixture(scope="session", params=ENGINES)
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        allow_async_scheduling(patch)
        served = guided_engine.start(
            tmp_path_factory.mktemp("models"),
            (Watcher,),
            kv_fraction=0.2 if request.param == "ngram" else 1.0,
            **ENGINES[request.param],
        )
    assert tight_engine.schedules_asynchronously(served.engine)
    assert served.engine.vllm_config.use_v2_model_runner
    served.penalties_first = True
    yield served
    served.engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if "served" in request.fixturenames:
        yield from guided_engine.assert_nothing_leaks(request.getfixturevalue("served"))
    else:
        yield


@pytest.fixture
def speculative(served: Served) -> bool:
    return served.engine.vllm_config.speculative_config is not None


@pytest.fixture
def watcher(served: Served) -> Watcher:
    """Of the running engine; what it saw before this test is forgotten."""
    (watcher,) = [part for part in sampler(served).logits_processors if isinstance(part, Watcher)]
    watcher.forget()
    return watcher


def sampler(served: Served) -> Any:
    return tight_engine.worker(served.engine).model_runner.sampler
