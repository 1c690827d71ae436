"""Guided distributions under Model Runner V2, the reference split between two workers, of which the first guides."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guided_vllm import guided_engine
from guided_vllm.exactness import (
    test_chunked_prefill,
    test_mixed_batches_of_guided_unguided_and_several_value_models_with_staggered_arrivals,
    test_preemption_and_resumption,
    test_prefix_cache_hits,
)
from guided_vllm.sampling import test_penalties_act_after_guidance_on_v1_and_before_it_on_v2
from guided_vllm.served import Served
from guided_vllm.vllm_on_cpu import allow_async_scheduling

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["v2-tensor-parallel-2"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        allow_async_scheduling(patch)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS / "guided_vllm" / "in_workers"), str(TESTS)]))
        served = guided_engine.start_on_two_ranks(tmp_path_factory.mktemp("models"), patch, ask_plain=False)
    assert served.engine.vllm_config.use_v2_model_runner
    served.penalties_first = True
    yield served
    served.engine.engine_core.shutdown()
