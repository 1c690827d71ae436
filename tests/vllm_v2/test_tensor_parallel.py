"""Guided distributions under Model Runner V2 with the reference split between two workers, which both guide the batch.

Every call of a worker's method, those for the records among them, checks that all workers answer the same.
"""

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
from vllm import envs

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["v2-tensor-parallel-2"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The workers are processes of their own, with a thread each; vLLM would give each a NUMA node."""
    envs.disable_envs_cache()  # engines of this process have read the environment before
    with pytest.MonkeyPatch.context() as patch:
        allow_async_scheduling(patch)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS / "guided_vllm" / "in_workers"), str(TESTS)]))
        served = guided_engine.start(
            tmp_path_factory.mktemp("models"),
            ask_plain=False,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
        )
    assert len(served.engine.collective_rpc("qtilt_describe")) == 2
    assert served.engine.vllm_config.use_v2_model_runner
    served.penalties_first = True
    yield served
    served.engine.engine_core.shutdown()
