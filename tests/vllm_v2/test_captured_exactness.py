"""Guided distributions under Model Runner V2 as on GPUs: steps that are captured and replayed, by Triton's kernels.

While a step is captured or replayed, its host neither gives it a number nor reads one: see played_graphs.
"""

from collections.abc import Iterator

import pytest

from guided_vllm import guided_engine
from guided_vllm.as_on_gpus import run_as_on_gpus
from guided_vllm.exactness import (  # not all: interpreted, they are slow
    test_chunked_prefill,
    test_mixed_batches_of_guided_unguided_and_several_value_models_with_staggered_arrivals,
    test_preemption_and_resumption,
)
from guided_vllm.served import Served
from guided_vllm.vllm_on_cpu import allow_async_scheduling
from played_graphs import PlayedGraphs
from qtilt.forwards.paged.triton_kernels import TritonKernels
from qtilt.vllm_plugin import processor


@pytest.fixture(scope="module", params=["captured"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    graphs = PlayedGraphs(is_strict=True)
    with pytest.MonkeyPatch.context() as patch:
        allow_async_scheduling(patch)
        patch.setattr(processor, "choose_graphs", lambda *_, **__: graphs)
        run_as_on_gpus(TritonKernels(), patch)
        served = guided_engine.start(tmp_path_factory.mktemp("captured"), ask_plain=False, kv_fraction=0.2)
    served.penalties_first = True
    yield served
    served.engine.engine_core.shutdown()
    assert graphs.replayed > 50
