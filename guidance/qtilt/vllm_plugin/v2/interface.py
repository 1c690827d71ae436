"""How vLLM's Model Runner V2 calls the processor. Beside processor.py only this folder knows of that runner."""

from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from qtilt.vllm_plugin.guided import GuidedBatch
from qtilt.vllm_plugin.ranks import FollowingBatch
from qtilt.vllm_plugin.runner import TakesRequests


class V2Interface(TakesRequests, LogitsProcessor):
    """The methods that V2 calls, ``apply`` aside."""

    batch: GuidedBatch | FollowingBatch

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request has got a slot; whose it was has left."""
        self.leave(req_idx)
        return self.enter(req_idx, sampling_params, has_tokens=True)

    def apply_staged_writes(self) -> None:
        """Before a step."""
        self.batch.flush()
