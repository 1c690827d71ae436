"""Guided distributions under Model Runner V2 with attention as on GPUs, by Triton's kernels, and with drafts."""

from collections.abc import Iterator
from typing import Any

import pytest

from guided_vllm import guided_engine
from guided_vllm.as_on_gpus import run_as_on_gpus
from guided_vllm.driving import Ask, drive
from guided_vllm.exactness import test_chunked_prefill, test_prefix_cache_hits  # noqa: F401 - interpreted, slow
from guided_vllm.matrix import covers
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, prompt
from guided_vllm.vllm_on_cpu import allow_async_scheduling
from qtilt.forwards.paged.triton_kernels import TritonKernels


class Checked(TritonKernels):
    """What a GPU would read without asking, and interpreted programs too."""

    def store_tails(self, *args: Any) -> None:
        rows = args[-1]
        assert int(rows.lengths_W.max()) <= rows.longest
        super().store_tails(*args)


@pytest.fixture(scope="module", params=["paged"])
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        allow_async_scheduling(patch)
        run_as_on_gpus(Checked(), patch)
        speculation = guided_engine.N_GRAM_SPECULATION
        served = guided_engine.start(tmp_path_factory.mktemp("paged"), ask_plain=False, kv_fraction=0.2, **speculation)
    served.penalties_first = True
    yield served
    served.engine.engine_core.shutdown()


def test_backbones_run_on_vllms_kernels_where_they_can(served: Served) -> None:
    forwards = {entry["name"]: entry["forward"] for entry in served.rpc("qtilt_describe")["value_models"]}
    assert forwards == {
        name: "transformers" if family == "gpt2" else "fused" for name, (_, _, family) in VALUE_MODELS.items()
    }


@covers("`candidate_mass`")
def test_rows_may_have_fewer_candidates_than_others(served: Served) -> None:
    settings = [("v-bernoulli", 0.5), ("v-categorical", 0.9), ("v-bernoulli", 1.0)]
    asks = [
        Ask(prompt(5 + index, seed=680 + index), served.guide(name, candidate_mass=mass), 0.3, max_tokens=5)
        for index, (name, mass) in enumerate(settings)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
