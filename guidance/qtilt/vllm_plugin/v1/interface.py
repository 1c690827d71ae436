"""How vLLM's V1 model runner calls the processor. Beside processor.py only this folder knows of that runner."""

from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from qtilt.forwards.arrays import IntArray
from qtilt.method.params import asks_for_guidance
from qtilt.vllm_plugin.guided import GuidedBatch
from qtilt.vllm_plugin.ranks import FollowingBatch
from qtilt.vllm_plugin.runner import StepRows, TakesRequests
from qtilt.vllm_plugin.v1.requests import V1Requests
from qtilt.vllm_plugin.v1.seeded_prefill import keep_seeds_through_chunked_prefill


class V1Interface(TakesRequests, LogitsProcessor):
    """The methods that V1 calls, ``apply`` aside."""

    requests: Any
    """V1Requests, when it is V1 that calls."""
    batch: GuidedBatch | FollowingBatch
    _step: tuple[IntArray, Tensor] | None = None

    def is_argmax_invariant(self) -> bool:
        """Guidance isn't."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The batch changes before a step."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._remove(index)
        for index, sampling_params, prompt_token_ids, output_token_ids in batch_update.added:
            self._remove(index)
            slot = self.requests.add(index)
            if asks_for_guidance(sampling_params.extra_args):
                self.requests.fill(slot, prompt_token_ids or [0], output_token_ids)
                self.enter(slot, sampling_params, has_tokens=prompt_token_ids is not None)
        for source, target, direction in batch_update.moved:
            if direction != MoveDirectionality.SWAP:
                self._remove(target)
            self.requests.swap(source, target)

    def before_sampling(self, lengths_N: IntArray, token_ids_N: Tensor) -> None:
        """What ``apply`` isn't told of the step it is called in: see :func:`show_steps`."""
        self._step = lengths_N, token_ids_N

    def v1_rows(self) -> StepRows:
        """The layout of the step."""
        if self._step is None:
            raise RuntimeError("vLLM's V1 model runner has called the processor in an unknown way")
        rows: StepRows = self.requests.step_rows(*self._step)
        self._step = None
        return rows

    def _remove(self, index: int) -> None:
        slot = self.requests.remove(index)
        if slot is not None:
            self.leave(slot)


def v1_requests(device: torch.device, slots: int, max_length: int) -> V1Requests:
    """The requests of this runner, which is prepared for guidance."""
    show_steps()
    show_forced_tokens()
    if device.type == "cpu":
        keep_seeds_through_chunked_prefill()
    return V1Requests(device, slots, max_length)


def show_steps() -> None:
    """Let processors see how many tokens each request of a step has, and which was fed last.

    V1 passes nothing but logits to ``apply``, so that a processor can't tell the chunks of a prefill apart, nor know
    the last token before async scheduling does. Model Runner V2 passes both (``LogitsContext``).

    Nothing is looked up while no request is guided. Idempotent; changes the class for the whole process.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner_class: Any = GPUModelRunner
    sample = runner_class._sample
    if hasattr(sample, "shows_steps"):
        return

    @wraps(sample)
    def sample_showing_steps(runner: Any, *args: Any, **kwargs: Any) -> Any:
        ours = (each for each in runner.input_batch.logitsprocs.all if isinstance(each, V1Interface))
        processors = [processor for processor in ours if len(processor.batch)]
        if processors:
            count = runner.input_batch.num_reqs
            lengths_N = runner.optimistic_seq_lens_cpu[:count].numpy().astype(np.int64)
            fed_last_N = runner.query_start_loc.gpu[1 : count + 1].long() - 1
            for processor in processors:
                processor.before_sampling(lengths_N, runner.input_ids.gpu[fed_last_N])
        if runner.input_batch.thinking_budget_state_holder is not None:
            runner.input_batch.thinking_budget_state_holder.guidance = processors
        return sample(runner, *args, **kwargs)

    runner_class._sample = sample_showing_steps
    runner_class._sample.shows_steps = True


def show_forced_tokens() -> None:
    """Let the batch know the logits once vLLM has forced tokens on requests whose thinking budget is used up.

    That comes after all processors. Idempotent; changes the class for the whole process.
    """
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    holder_class: Any = ThinkingBudgetStateHolder
    apply = holder_class.apply_to_logits
    if hasattr(apply, "shows_forced"):
        return

    @wraps(apply)
    def apply_showing_forced(holder: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = apply(holder, logits, *args, **kwargs)
        for processor in getattr(holder, "guidance", ()):
            processor.batch.leave_out_forced(logits)
        return logits

    holder_class.apply_to_logits = apply_showing_forced
    holder_class.apply_to_logits.shows_forced = True
