"""How vLLM's Model Runner V2 calls the processor. Beside processor.py only this folder knows of that runner."""

from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from qtilt.vllm_plugin.guided import GuidedBatch
from qtilt.vllm_plugin.ranks import FollowingBatch
from qtilt.vllm_plugin.runner import TakesRequests


class V2Interface(TakesRequests, LogitsProcessor):
    """The methods that V2 calls, ``apply`` aside."""

    batch: GuidedBatch | FollowingBatch
    guided_step: LogitsContext | None = None
    """The step that was guided last."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request has got a slot; whose it was has left."""
        self.leave(req_idx)
        return self.enter(req_idx, sampling_params, has_tokens=True)

    def apply_staged_writes(self) -> None:
        """Before a step."""
        self.batch.flush()


_processors: WeakSet[V2Interface] = WeakSet()


def show_forced_tokens(processor: V2Interface) -> None:
    """Let its batch know the logits once vLLM has forced tokens on requests whose thinking budget is used up.

    That comes after all processors. Changes the class for the whole process.
    """
    from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState

    _processors.add(processor)
    state_class: Any = ThinkingBudgetState
    apply = state_class.apply
    if hasattr(apply, "shows_forced"):
        return

    @wraps(apply)
    def apply_showing_forced(state: Any, logits: Tensor, ctx: LogitsContext) -> None:
        apply(state, logits, ctx)
        if state.enabled and state.use_thinking_budget[ctx.idx_mapping_np].any():
            for guides in [each for each in _processors if each.guided_step is ctx]:
                guides.batch.leave_out_forced(logits)

    state_class.apply = apply_showing_forced
    state_class.apply.shows_forced = True
