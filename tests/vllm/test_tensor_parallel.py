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


@pytest.fixture(scope="module", params=["tensor-parallel-2"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        served = guided_engine.start_on_two_ranks(tmp_path_factory.mktemp("models"), patch)
    yield served
    served.engine.engine_core.shutdown()
