"""Guided distributions with the reference split between two worker processes, each of which guides the whole batch.

Every call of a worker's method, those for the records among them, checks that all workers answer the same.
"""

from collections.abc import Iterator

import pytest

from guided_vllm import guided_engine
from guided_vllm.equality import *
from guided_vllm.exactness import *
from guided_vllm.sampling import *
from guided_vllm.seeds import *
from guided_vllm.served import Served
from guided_vllm.swapping import test_requests_keep_their_version_through_a_swap
from vllm import envs


@pytest.fixture(scope="module", params=["tensor-parallel-2"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The workers are processes of their own, with a thread each; vLLM would give each a NUMA node."""
    envs.disable_envs_cache()  # engines of this process have read the environment before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        served = guided_engine.start(
            tmp_path_factory.mktemp("models"), tensor_parallel_size=2, distributed_executor_backend="mp"
        )
    assert len(served.engine.collective_rpc("qtilt_describe")) == 2
    yield served
    served.engine.engine_core.shutdown()
