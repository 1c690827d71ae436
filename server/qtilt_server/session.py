"""One guided HTTP request: its resolved parameters, its lease, and the records of what was done to each choice."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Literal
from uuid import uuid4

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qtilt.params import EXTRA_ARGS_KEY, GuidanceParams
from qtilt.vllm_plugin.failure import GuidanceFailure
from qtilt_server.details import TokenTexts
from qtilt_server.failures import FailureWatch, GuidanceFailedError
from qtilt_server.metrics import GuidanceMetrics
from qtilt_server.registry import Lease, ResidentVersion
from qtilt_server.schema import AppliedGuidance, ChoiceGuidance, TokenDetails, TotalGuidance
from qtilt_server.worker import GuidanceWorker, WorkerError

logger = logging.getLogger("vllm.qtilt_server.session")  # vLLM configures the loggers below its own name only


class GuidedSession:
    """The lease is released when the response has ended and the engine has let go of every prompt's request.

    returns_tokens: False when the request is answered with its prompt alone (echo without new tokens).
    """

    def __init__(
        self,
        params: GuidanceParams,
        lease: Lease,
        worker: GuidanceWorker,
        watch: FailureWatch,
        metrics: GuidanceMetrics,
        texts: TokenTexts,
        *,
        choices_per_prompt: int,
        returns_tokens: bool,
    ) -> None:
        self.params = params
        self.worker = worker
        self.watch = watch
        self.metrics = metrics
        self.texts = texts
        self.returns_tokens = returns_tokens
        self._lease = lease
        self._choices_per_prompt = choices_per_prompt
        self._traces: list[Trace] = []
        self._running = 0
        self._closed = False
        self._failed = False
        self._refused = False

    @property
    def failed(self) -> bool:
        """Whether the response is an error because guidance failed."""
        return self._failed

    @property
    def outcome(self) -> Literal["finished", "failed", "refused", "aborted"]:
        """Of a session that is closed. refused: by vLLM, before the engine had it. aborted: the client has left, or the
        engine has stopped.
        """
        if self._failed:
            return "failed"
        if self._refused or not self._traces:
            return "refused"
        has_all = all(len(trace.records) == self._choices_per_prompt for trace in self._traces)
        return "finished" if has_all else "aborted"

    @property
    def version(self) -> ResidentVersion:
        return self._lease.version

    @property
    def applied(self) -> AppliedGuidance:
        """``guidance`` of the response."""
        return AppliedGuidance(
            value_model=self.version.label,
            eta=self.params.eta,
            top_k=self.params.top_k,
            method=self.params.method,  # type: ignore[arg-type]
            tail=self.params.tail,  # type: ignore[arg-type]
            candidate_mass=self.params.candidate_mass,
            kl_budget=self.params.kl_budget,
        )

    @property
    def has_finished(self) -> bool:
        """Whether some choice has."""
        return any(trace.records for trace in self._traces)

    @property
    def total(self) -> TotalGuidance:
        """What ``usage.completion_tokens_details`` of the response says, over the choices that have finished."""
        records = [record for trace in self._traces for record in trace.records.values()]
        return TotalGuidance(
            guided_tokens=sum(record.guided_tokens for record in records),
            guidance_kl=sum(record.kl for record in records),
            guidance_kl_candidates=sum(record.kl_candidates for record in records),
        )

    def open_trace(self, prompt_ids: list[int]) -> "Trace":
        """Called once per prompt, in the order of the prompts."""
        trace = Trace(self, replace(self.params, trace_id=uuid4().hex), prompt_ids)
        self._traces.append(trace)
        return trace

    def choice(self, index: int) -> ChoiceGuidance:
        """The record of a finished choice; choices are numbered prompt by prompt."""
        prompt, child = divmod(index, self._choices_per_prompt)
        return self._traces[prompt].records[child]

    @property
    def has_news(self) -> bool:
        """Whether some choice has details that haven't been said."""
        return any(trace.news for trace in self._traces)

    def take_news(self, index: int) -> list[TokenDetails]:
        """The details of a choice that haven't been said yet."""
        prompt, child = divmod(index, self._choices_per_prompt)
        return self._traces[prompt].news.pop(child, [])

    def sampled(self) -> list[tuple[list[int], list[list[int]]]]:
        """By prompt, its tokens, and those of each choice."""
        return [(trace.prompt_ids, trace.answers) for trace in self._traces]

    def fail(self, failure: GuidanceFailure) -> GuidanceFailedError:
        """Count the failure, once for the whole request; returns the error to raise."""
        if not self._failed:
            self._failed = True
            self.version.failed += 1
            self.metrics.failure(self.params.value_model, self.params.version, failure["kind"])
        return GuidanceFailedError(self.version.label, failure)

    def refuse(self) -> None:
        """vLLM has, when it was to hand a prompt to the engine."""
        self._refused = True

    def engine_started(self) -> None:
        self._running += 1

    def engine_stopped(self) -> None:
        self._running -= 1
        self._release_if_over()

    def close(self) -> None:
        """The response has ended, one way or another."""
        self._closed = True
        self._release_if_over()

    def _release_if_over(self) -> None:
        if self._closed and self._running == 0:
            self._lease.release()


class Trace:
    """One prompt's request in the engine: follows its outputs and fetches the record of each choice that finishes."""

    def __init__(self, session: GuidedSession, params: GuidanceParams, prompt_ids: list[int]) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.records: dict[int, ChoiceGuidance] = {}
        self.news: dict[int, list[TokenDetails]] = {}
        """By choice the details that haven't been said yet, if there are any."""
        self._session = session
        self._token_ids: dict[int, list[int]] = {}
        self._explained: dict[int, int] = {}
        self._forgotten = False
        self._failure: GuidanceFailure | None = None

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each choice so far."""
        return [self._token_ids[choice] for choice in sorted(self._token_ids)]

    async def follow(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        params: SamplingParams,
        abort: Callable[[], Awaitable[None]],
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, each after the records of the choices that it finishes; ``abort`` ends them early.

        Raises GuidanceFailedError, and ends the request in the engine, when guidance has failed on any choice.
        """

        async def end(failure: GuidanceFailure) -> None:
            self._failure = failure
            await abort()

        self._session.engine_started()
        self._session.watch.add(self.params.trace_id, end)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    await self._look_for_failure(output)
                    finished = [choice for choice in output.outputs if self._collect(choice, params.output_kind)]
                    if self.params.details and self._session.returns_tokens:
                        await self._fetch_details([choice.index for choice in output.outputs])
                    if finished:
                        await self._fetch([choice.index for choice in finished], more_to_come=not output.finished)
                    yield output
            if self._failure is not None and not self._forgotten:
                raise self._session.fail(self._failure)
        except (VLLMClientError, GracefulHTTPError):
            self._session.refuse()
            raise
        finally:
            self._session.watch.remove(self.params.trace_id)
            self._session.engine_stopped()
            if not self._forgotten:
                _in_background(self._forget())

    async def _look_for_failure(self, output: RequestOutput) -> None:
        """A failure the watch was told of, or one that made vLLM end the request (a grammar that lets nothing end)."""
        if any(choice.finish_reason == "error" for choice in output.outputs):
            self._failure = (await self._session.worker.failures()).get(self.params.trace_id)
        if self._failure is not None:
            raise self._session.fail(self._failure)

    def _collect(self, choice: CompletionOutput, kind: RequestOutputKind) -> bool:
        """Note a choice's tokens; whether that was its last output."""
        if kind is RequestOutputKind.DELTA:
            self._token_ids.setdefault(choice.index, []).extend(choice.token_ids)
        else:
            self._token_ids[choice.index] = list(choice.token_ids)
        return choice.finished() and choice.finish_reason != "error"

    async def _fetch_details(self, choices: list[int]) -> None:
        """Of the tokens that have come since the last time."""
        for choice in choices:
            first, token_ids = self._explained.get(choice, 0), self._token_ids[choice]
            if first < len(token_ids):
                measured = await self._session.worker.details(self.params.trace_id, first, token_ids)
                explained = self._session.texts.explain(token_ids[first:], measured)
                self.news.setdefault(choice, []).extend(explained)
                self._explained[choice] = len(token_ids)

    async def _fetch(self, choices: list[int], more_to_come: bool) -> None:
        returned = [self._token_ids[choice] if self._session.returns_tokens else [] for choice in choices]
        records = await self._session.worker.read_records(self.params.trace_id, returned, more_to_come=more_to_come)
        self._forgotten = not more_to_come
        for choice, record in zip(choices, records, strict=True):
            if not isinstance(record, ChoiceGuidance):
                raise self._session.fail(record)
            self.records[choice] = record
            self._session.metrics.choice(self.params.value_model, self.params.version, record)

    async def _forget(self) -> None:
        try:
            await self._session.worker.forget(self.params.trace_id)
        except WorkerError as error:
            logger.warning("could not drop the records of an aborted request: %s", error)


class GuidedEngine:
    """Stands in for vLLM's engine client in the handler of one guided request.

    Whatever the handler makes of the outputs afterwards (echo, stop strings, tool and reasoning parsers, hidden
    reasoning), the tokens are counted here, where they come out of the engine.
    """

    def __init__(self, engine: Any, session: GuidedSession, check_sampling: Callable[[SamplingParams], None]) -> None:
        self._engine = engine
        self._session = session
        self._check_sampling = check_sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's, for a prompt of tokens and the policy that the value model was fitted to.

        Raises VLLMValidationError (HTTP 400) for any other.
        """
        kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
        if kind != "token":
            raise VLLMValidationError(
                f"guidance needs a prompt of text or token ids, this one is of kind {kind!r}", parameter="guidance"
            )
        self._check_adapter(options.get("lora_request"))
        self._check_sampling(sampling_params)
        trace = self._session.open_trace(list(prompt["prompt_token_ids"]))
        sampling_params.extra_args = {
            **(sampling_params.extra_args or {}),
            EXTRA_ARGS_KEY: trace.params.to_extra_args(),
        }
        # Clients may give several requests one id (X-Request-Id), and vLLM would abort all that have it.
        request_id = f"{request_id}-{trace.params.trace_id}"
        outputs = self._engine.generate(prompt, sampling_params, request_id, **options)
        return trace.follow(outputs, sampling_params, partial(self._engine.abort, request_id))

    def _check_adapter(self, lora_request: LoRARequest | None) -> None:
        asked, version = lora_request.lora_name if lora_request is not None else None, self._session.version
        if asked != version.adapter:
            raise VLLMValidationError(
                f"{version.label} was fitted to {_policy(version.adapter)}, and this request asks for "
                f"{_policy(asked)}: its values are of another policy; take a value model whose adapter is the "
                "request's (GET /v1/guidance tells it)",
                parameter="guidance.value_model",
            )


def _policy(adapter: str | None) -> str:
    return "the reference model without an adapter" if adapter is None else f"the LoRA adapter {adapter!r}"


_background: set["asyncio.Task[None]"] = set()


def _in_background(work: Any) -> None:
    """Run to the end although the request is being cancelled; the event loop alone keeps no reference to a task."""
    task = asyncio.get_running_loop().create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
