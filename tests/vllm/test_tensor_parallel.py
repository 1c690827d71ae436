"""Guided distributions with the reference split between two worker processes, each of which guides the whole batch.

A selection of the tests of tests/guided_vllm: what a batch goes through doesn't depend on how the reference is split,
but the workers must agree on every value. Every call of a worker's method checks that all of them answer the same.
"""

import os
from collections.abc import Iterator

import pytest

from guided_vllm import guided_engine
from guided_vllm.exactness import (
    test_a_crowd_that_queues_is_preempted_amid_prefills_and_partly_aborted_leaves_the_others_exact,
    test_chunked_prefill,
    test_every_choice_of_n_is_exact,
    test_every_kind_of_value_model_is_exact_at_several_temperatures_and_eta,
    test_mixed_batches_of_guided_unguided_and_several_value_models_with_staggered_arrivals,
    test_prefix_cache_hits,
)
from guided_vllm.sampling import (
    test_structured_output_is_guided_within_its_grammar,
    test_top_k_and_top_p_truncate_the_guided_distribution_at_its_temperature,
)
from guided_vllm.seeds import test_a_seed_gives_the_same_tokens_alone_and_in_company
from guided_vllm.served import Served
from guided_vllm.swapping import test_requests_keep_their_version_through_a_swap


@pytest.fixture(scope="module", params=["tensor-parallel-2"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The workers are processes of their own, on a core each where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        served = guided_engine.start(
            tmp_path_factory.mktemp("models"),
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            ask_plain=False,
        )
    assert len(served.engine.collective_rpc("qtilt_describe")) == 2
    yield served
    served.engine.engine_core.shutdown()
