"""vLLM's batch updates, word for word: what is added, moved, swapped and refilled ends where vLLM says."""

from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from guided_vllm.served import Served
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.processor import GuidanceProcessor
from vllm import SamplingParams


def test_additions_moves_swaps_and_refilled_indices(served: Served) -> None:
    processor = _processor(served)
    outputs: list[list[int]] = [[] for _ in range(5)]
    guided = SamplingParams(extra_args={"qtilt": GuidanceParams("v-bernoulli", 1, 0.1, 4).to_extra_args()})
    plain = SamplingParams()

    processor.update_state(
        BatchUpdate(
            batch_size=4,
            removed=[],
            added=[
                (0, guided, [1], outputs[0]),
                (1, plain, [1], outputs[1]),
                (2, guided, [1], outputs[2]),
                (3, guided, [1], outputs[3]),
            ],
            moved=[],
        )
    )
    assert _seats(processor, outputs) == {0: 0, 2: 2, 3: 3}

    processor.update_state(None)
    swap = (0, 1, MoveDirectionality.SWAP)
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=[], moved=[swap]))
    assert _seats(processor, outputs) == {1: 0, 2: 2, 3: 3}

    both_guided = (2, 3, MoveDirectionality.SWAP)
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=[], moved=[both_guided]))
    assert _seats(processor, outputs) == {1: 0, 2: 3, 3: 2}

    # Request 3 has finished and 2 slides into its index, request 0 has finished and 4 is added at its index:
    # neither index is in `removed`.
    slide = (3, 2, MoveDirectionality.UNIDIRECTIONAL)
    added = [(1, guided, [1], outputs[4])]
    processor.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[slide]))
    assert _seats(processor, outputs) == {1: 4, 2: 2}

    processor.update_state(BatchUpdate(batch_size=0, removed=[2, 1, 0], added=[], moved=[]))
    assert _seats(processor, outputs) == {}


def _processor(served: Served) -> GuidanceProcessor:
    worker = served.engine.engine_core.engine_core.model_executor.driver_worker.worker
    processor: GuidanceProcessor = worker._qtilt_processor()
    return processor


def _seats(processor: GuidanceProcessor, outputs: list[list[int]]) -> dict[int, int]:
    """Which request sits at which index, told by the identity of its output list."""
    numbers = {id(output): number for number, output in enumerate(outputs)}
    return {index: numbers[id(row.output_token_ids)] for index, row in processor.batch._rows.items()}
