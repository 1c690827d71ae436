"""What the server can ask of the worker, through ``engine_client.collective_rpc``.

vLLM mixes this class into its worker, so every name starts with ``qtilt`` to collide with none of the worker's. A call
runs between two steps: nothing here waits for long. Arguments and results are JSON-able.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from qtilt.vllm_plugin.answers import answers_errors
from qtilt.vllm_plugin.details import TokenDetails
from qtilt.vllm_plugin.failure import GuidanceFailure
from qtilt.vllm_plugin.guided import GuidedBatch
from qtilt.vllm_plugin.measures import Measures, measure
from qtilt.vllm_plugin.processor import GuidanceProcessor
from qtilt.vllm_plugin.records import GuidanceSummary
from qtilt.vllm_plugin.scoring import Text, TextValues
from qtilt.vllm_plugin.versions import PreparationStatus

P = ParamSpec("P")
Answer = TypeVar("Answer")


def by_the_first_rank(
    method: Callable[Concatenate["GuidanceWorkerExtension", P], Answer],
) -> Callable[Concatenate["GuidanceWorkerExtension", P], Answer | None]:
    """Have the other ranks of tensor parallelism, which hold no value models, answer None."""

    @wraps(method)
    def answer(self: "GuidanceWorkerExtension", /, *args: P.args, **kwargs: P.kwargs) -> Answer | None:
        return None if self._qtilt_processor().follows else method(self, *args, **kwargs)

    return answer


class GuidanceWorkerExtension:
    """Mixed into the worker by ``worker_extension_cls``. Errors are answers, see answers.py, unless said otherwise.

    Under tensor parallelism the first rank's answer is the one that counts.
    """

    model_runner: Any
    """The worker's own."""

    def qtilt_describe(self) -> dict[str, Any]:
        """What is loaded. Raises RuntimeError when the processor isn't live in the model runner: then it is in none."""
        return self._qtilt_processor().describe()

    @answers_errors
    @by_the_first_rank
    def qtilt_prepare_value_model(self, name: str, version: int, path: str) -> None:
        """Begin to read and check the directory ``path`` off the step path."""
        self._qtilt_processor().residents.prepare(name, version, path)

    @answers_errors
    @by_the_first_rank
    def qtilt_prepare_status(self, name: str, version: int) -> PreparationStatus:
        """How the preparation goes."""
        return self._qtilt_processor().residents.status(name, version)

    @answers_errors
    @by_the_first_rank
    def qtilt_commit_value_model(self, name: str, version: int) -> None:
        """Make a ready version one that requests may name."""
        self._qtilt_processor().residents.commit(name, version)

    @answers_errors
    @by_the_first_rank
    def qtilt_discard_value_model(self, name: str, version: int) -> None:
        """Drop a prepared version, or a resident one that guides no running request."""
        self._qtilt_processor().residents.discard(name, version)

    @answers_errors
    @by_the_first_rank
    def qtilt_take_records(
        self, trace_id: str, returned: Sequence[Sequence[int]], more_to_come: bool = False
    ) -> list[GuidanceSummary | GuidanceFailure]:
        """Per returned token sequence its summary, or why its guidance failed.

        Then forget the trace unless more is to come; ``[]`` forgets it.
        """
        return self._qtilt_processor().records.take(trace_id, returned, more_to_come)

    @answers_errors
    @by_the_first_rank
    def qtilt_details(self, trace_id: str, first: int, token_ids: Sequence[int]) -> list[TokenDetails | None]:
        """Of a choice's tokens from ``first`` on; token_ids: all that it has so far. None where one wasn't guided."""
        return self._qtilt_processor().records.details(trace_id, first, token_ids)

    @answers_errors
    @by_the_first_rank
    def qtilt_begin_text(
        self, text: str, name: str, version: int, token_ids: Sequence[int], first: int, wants_all: bool
    ) -> None:
        """The tokens from number ``first`` on are to be scored, see scoring.py; ``text`` names them from now on."""
        processor = self._qtilt_processor()
        resident, vocabulary = processor.residents.get(name, version), processor.reference.vocab_size
        processor.texts.begin(text, Text(resident, token_ids, first, vocabulary, wants_all=wants_all))

    @answers_errors
    @by_the_first_rank
    def qtilt_advance_text(self, text: str) -> TextValues | None:
        """Run a part of it: its values if that was the last, else None."""
        return self._qtilt_processor().texts.advance(text)

    @answers_errors
    @by_the_first_rank
    def qtilt_end_text(self, text: str) -> None:
        """Forget it, done or not."""
        self._qtilt_processor().texts.end(text)

    @answers_errors
    @by_the_first_rank
    def qtilt_measure(self) -> Measures:
        """What guidance has done so far. Waits for nothing."""
        return measure(self._qtilt_processor().residents)

    @answers_errors
    @by_the_first_rank
    def qtilt_failures(self) -> dict[str, GuidanceFailure]:
        """The traces, not taken yet, of which a request has failed."""
        processor = self._qtilt_processor()
        assert isinstance(processor.batch, GuidedBatch), "the others don't answer"
        processor.batch.look_for_failures()
        return processor.records.failures()

    def _qtilt_processor(self) -> GuidanceProcessor:
        runner = self.model_runner
        on_v2 = hasattr(runner, "req_states")
        for processor in runner.sampler.logits_processors if on_v2 else runner.input_batch.logitsprocs.all:
            if isinstance(processor, GuidanceProcessor):
                if on_v2:
                    processor.batch.keep_only(runner.req_states.index_to_req_id)
                return processor
        raise RuntimeError("the guidance processor isn't live in vLLM's model runner: every request would be unguided")
