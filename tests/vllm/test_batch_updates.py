"""vLLM's batch updates, word for word: what is added, moved, swapped and refilled ends where vLLM says."""

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from guided_vllm import tight_engine
from guided_vllm.served import Served
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.processor import GuidanceProcessor
from vllm import SamplingParams


def test_additions_moves_swaps_and_refilled_indices(served: Served) -> None:
    processor = _processor(served)
    guidance = GuidanceParams("v-bernoulli", 1, 0.1, 4, trace_id="updates")
    guided = SamplingParams(extra_args={"qtilt": guidance.to_extra_args()})
    plain = SamplingParams()

    added = [(index, plain if index == 1 else guided, [10 + index], []) for index in range(4)]
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    assert _prompts(processor, 4) == [10, None, 12, 13]

    processor.update_state(None)
    swap = (0, 1, MoveDirectionality.SWAP)
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=[], moved=[swap]))
    assert _prompts(processor, 4) == [None, 10, 12, 13]

    both_guided = (2, 3, MoveDirectionality.SWAP)
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=[], moved=[both_guided]))
    assert _prompts(processor, 4) == [None, 10, 13, 12]

    # The request of prompt 13 has finished and that of 12 slides into its index, that of 10 has finished and another is
    # added at its index: neither index is in `removed`.
    slide = (3, 2, MoveDirectionality.UNIDIRECTIONAL)
    refilled = [(1, guided, [14], [])]
    processor.update_state(BatchUpdate(batch_size=3, removed=[], added=refilled, moved=[slide]))
    assert _prompts(processor, 3) == [None, 14, 12]

    processor.update_state(BatchUpdate(batch_size=0, removed=[2, 1, 0], added=[], moved=[]))
    assert len(processor.batch) == 0
    processor.records.take(guidance.trace_id, [])


def _processor(served: Served) -> GuidanceProcessor:
    processor: GuidanceProcessor = tight_engine.worker(served.engine)._qtilt_processor()
    return processor


def _prompts(processor: GuidanceProcessor, count: int) -> list[int | None]:
    """The first token of the request at each index, None for one that isn't guided."""
    rows = processor.requests.step_rows(np.ones(count, dtype=np.int64), torch.zeros(count))
    guided = processor.batch._guided
    return [int(processor.requests.prefill(slot)[0]) if slot in guided else None for slot in rows.slots_N.tolist()]
