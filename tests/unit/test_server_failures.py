"""Who notices that a running request has failed: one question for all of them, and none when nothing runs."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from vllm.outputs import CompletionOutput, RequestOutput

from guided_vllm.tiny_models import make_tokenizer
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.answers import ERROR
from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers, of_exception
from qtilt_server.details import TokenTexts
from qtilt_server.failures import FailureWatch, GuidanceFailedError
from qtilt_server.metrics import GuidanceMetrics
from qtilt_server.registry import Lease, ResidentVersion
from qtilt_server.schema import ChoiceGuidance
from qtilt_server.session import GuidedSession
from qtilt_server.worker import GuidanceWorker, WorkerError
from vllm import SamplingParams

POLL_S = 0.001
DONE = ChoiceGuidance(guided_tokens=2, kl=0.5, kl_candidates=0.4, mass=0.75, candidates=3.5)


class Engine:
    """Two ranks that answer each call with the next of the answers, the last one over and over."""

    errored = False

    def __init__(self, *answers: Sequence[Any] | Exception) -> None:
        self._answers = list(answers)
        self._called = asyncio.Event()

    def will_answer(self, *answers: Sequence[Any] | Exception) -> None:
        self._answers = list(answers)

    async def is_asked(self, times: int) -> None:
        """Until that many more calls have come."""
        for _ in range(times):
            self._called.clear()
            await asyncio.wait_for(self._called.wait(), 10)

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        self._called.set()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


class Ended:
    """What the watch has ended."""

    def __init__(self) -> None:
        self.failures: list[GuidanceFailure] = []
        self.happened = asyncio.Event()

    async def __call__(self, failure: GuidanceFailure) -> None:
        self.failures.append(failure)
        self.happened.set()


def test_a_failed_request_is_ended_once_and_the_others_are_watched_on() -> None:
    engine = Engine([{}, None], [{"a": not_numbers()}, None])

    async def scenario() -> None:
        watch, ended, other = FailureWatch(GuidanceWorker(engine), POLL_S), Ended(), Ended()
        watch.add("a", ended)
        watch.add("b", other)
        await asyncio.wait_for(ended.happened.wait(), 10)
        await engine.is_asked(times=3)
        watch.remove("a")
        watch.remove("b")
        assert ended.failures == [not_numbers()]
        assert other.failures == []

    asyncio.run(scenario())


def test_nothing_is_asked_while_nothing_runs() -> None:
    engine = Engine([{}, None])

    async def scenario() -> None:
        watch = FailureWatch(GuidanceWorker(engine), POLL_S)
        for _ in range(2):
            watch.add("a", Ended())
            await engine.is_asked(times=1)
            watch.remove("a")
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others)  # it ends by itself, and begins again with the next request
            assert watch._polling is not None
            assert watch._polling.done()

    asyncio.run(scenario())


def test_a_question_that_fails_is_asked_again() -> None:
    engine = Engine(RuntimeError("busy"), [{"a": not_numbers()}, None])

    async def scenario() -> None:
        watch, ended = FailureWatch(GuidanceWorker(engine), POLL_S), Ended()
        watch.add("a", ended)
        await asyncio.wait_for(ended.happened.wait(), 10)

    asyncio.run(scenario())


def test_what_the_first_rank_says_of_each_choice_is_its_record() -> None:
    done, failure = DONE.model_dump(), of_exception(MemoryError("one\ntwo"))
    assert failure == {"kind": "exception", "reason": "MemoryError: one"}
    engine = Engine([[done, failure], None])
    records = asyncio.run(GuidanceWorker(engine).read_records("a", [[1, 2], [3, 4]], more_to_come=False))
    assert records == [DONE, failure]


def test_an_error_of_a_rank_that_only_follows_is_an_error() -> None:
    engine = Engine([None, {ERROR: "no processor"}])
    with pytest.raises(WorkerError, match="no processor"):
        asyncio.run(GuidanceWorker(engine).commit("a", 2))


def test_the_error_names_the_value_model_and_the_reason_in_one_line() -> None:
    error = GuidanceFailedError("value@2", of_exception(ValueError("first " + "x" * 1000 + "\nsecond")))
    assert str(error).startswith("guidance failed in value model value@2: ValueError: first xxx")
    assert len(str(error)) < 300
    assert error.status_code == 500


@pytest.fixture
def metrics() -> Iterator[GuidanceMetrics]:
    made = GuidanceMetrics()
    yield made
    for metric in vars(made).values():
        if isinstance(metric, MetricWrapperBase):
            REGISTRY.unregister(metric)


def session_on(engine: Engine, metrics: GuidanceMetrics, poll_s: float) -> GuidedSession:
    version, worker = ResidentVersion("value", 1, "value", "v", {}, 10), GuidanceWorker(engine)
    watch = FailureWatch(worker, poll_s)
    params = GuidanceParams("value", 1, 0.2, 8)
    texts = TokenTexts(make_tokenizer())
    lease = Lease(version)
    return GuidedSession(params, lease, worker, watch, metrics, texts, choices_per_prompt=1, returns_tokens=True)


def output(*token_ids: int, finish_reason: str | None = None) -> RequestOutput:
    choice = CompletionOutput(0, "", list(token_ids), None, None, finish_reason=finish_reason)
    return RequestOutput("request", None, [1], None, [choice], finished=finish_reason is not None)


def test_a_failure_is_raised_when_the_engine_ends_an_aborted_request_without_another_output(
    metrics: GuidanceMetrics,
) -> None:
    engine = Engine([{}, None])

    async def scenario() -> None:
        session = session_on(engine, metrics, POLL_S)
        trace, aborted = session.open_trace([1]), asyncio.Event()

        async def outputs() -> AsyncGenerator[RequestOutput, None]:
            yield output(1)
            failure = {trace.params.trace_id: not_numbers()}
            engine.will_answer([failure, failure])
            await asyncio.wait_for(aborted.wait(), 10)

        async def abort() -> None:
            aborted.set()

        followed = trace.follow(outputs(), SamplingParams(), abort)
        assert not (await anext(followed)).finished
        with pytest.raises(GuidanceFailedError, match="value@1"):
            await anext(followed)
        assert session.failed
        session.close()
        assert session.version.leases == 0

    asyncio.run(scenario())


def test_a_failure_behind_the_last_returned_token_leaves_a_finished_answer_as_it_is(metrics: GuidanceMetrics) -> None:
    """The engine may have gone on to tokens that aren't returned."""
    engine = Engine([[DONE.model_dump()], [DONE.model_dump()]])

    async def scenario() -> None:
        session = session_on(engine, metrics, poll_s=60)
        trace = session.open_trace([1])

        async def outputs() -> AsyncGenerator[RequestOutput, None]:
            yield output(1, 2, finish_reason="length")
            await session.watch._watched[trace.params.trace_id](not_numbers())

        async def abort() -> None:
            pass

        came = [each async for each in trace.follow(outputs(), SamplingParams(), abort)]
        assert len(came) == 1
        assert session.choice(0) == DONE
        assert not session.failed

    asyncio.run(scenario())
