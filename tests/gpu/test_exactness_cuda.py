"""Guided distributions on CUDA under both model runners: the tests of tests/guided_vllm.

To see that no step waits for the device, run these with ``VLLM_GPU_SYNC_CHECK=error`` (steps that aren't captured wait
on purpose for a V-type's ``candidate_mass``: with drafts those tests fail then).
"""

from collections.abc import Iterator
from typing import Any

import pytest

from guided_vllm import equality, guided_engine
from guided_vllm.driving import Ask, drive
from guided_vllm.equality import *
from guided_vllm.exactness import *
from guided_vllm.sampling import *
from guided_vllm.seeds import *
from guided_vllm.served import Served
from guided_vllm.swapping import *
from guided_vllm.tiny_models import VALUE_MODELS, prompt
from vllm import envs

del test_backbones_run_compiled_where_they_can  # noqa: F821 - they don't here

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")

V2 = "VLLM_USE_V2_MODEL_RUNNER"
ENGINES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "async": ({V2: "0"}, {}),
    "plain": ({V2: "1"}, {}),
    "ngram": ({V2: "1"}, {"kv_fraction": 0.2, **guided_engine.N_GRAM_SPECULATION}),
}


@pytest.fixture(scope="module", params=ENGINES)
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    environment, arguments = ENGINES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        envs.disable_envs_cache()  # engines of this process have read the environment before
        for name, value in environment.items():
            patch.setenv(name, value)
        served = guided_engine.start(
            tmp_path_factory.mktemp("cuda"),
            gpu_memory_utilization=0.1,
            # Not eager, so that guidance captures its steps; vLLM itself compiles and captures nothing.
            enforce_eager=False,
            compilation_config={"mode": 0, "cudagraph_mode": "NONE"},
            **arguments,
        )
    served.penalties_first = request.param != "async"
    assert bool(served.engine.vllm_config.use_v2_model_runner) == served.penalties_first
    yield served
    served.engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def same_bits(served: Served, request: pytest.FixtureRequest) -> None:
    """What a row's bits are depends on the shape of its batch, and with drafts that on which of them come true."""
    if served.speculates and request.function.__module__ == equality.__name__:
        pytest.skip("with drafts no two runs need have batches of the same shapes")


@pytest.fixture(autouse=True)
def nothing_leaks(served: Served) -> Iterator[None]:
    yield from guided_engine.assert_nothing_leaks(served)


def test_steady_steps_are_captured(served: Served) -> None:
    asks = [Ask(prompt(5 + index, seed=700 + index), served.guide(name)) for index, name in enumerate(VALUE_MODELS)]
    for answer in drive(served.engine, asks):
        served.check(answer)
    for entry in served.rpc("qtilt_describe")["value_models"]:
        assert (entry["captured_steps"] > 0) == (entry["forward"] == "fused" and not served.speculates), entry["name"]


def test_backbones_run_on_vllms_kernels_where_they_can(served: Served) -> None:
    forwards = {entry["name"]: entry["forward"] for entry in served.rpc("qtilt_describe")["value_models"]}
    assert forwards == {
        name: "transformers" if family == "gpt2" else "fused" for name, (_, _, family) in VALUE_MODELS.items()
    }
