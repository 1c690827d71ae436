"""How vLLM's Model Runner V2 calls the processor. Nothing but this folder knows that there is such a runner."""

from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from qtilt.vllm_plugin.guided import GuidedBatch


class V2Interface(LogitsProcessor):
    """The methods that V2 calls, ``apply`` aside."""

    batch: GuidedBatch

    def enter(self, slot: int, sampling_params: SamplingParams, *, has_tokens: bool) -> bool:
        """The processor's own, see there."""
        raise NotImplementedError

    def leave(self, slot: int) -> None:
        """The processor's own, see there."""
        raise NotImplementedError

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request has got a slot; whose it was has left."""
        self.leave(req_idx)
        return self.enter(req_idx, sampling_params, has_tokens=True)

    def apply_staged_writes(self) -> None:
        """Before a step."""
        self.batch.flush()
