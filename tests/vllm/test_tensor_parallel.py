"""Guided distributions with the reference split between two worker processes, of which the first guides.

Each draws every token itself and feeds it: were their logits different, the reference's would be wrong in later steps.
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
