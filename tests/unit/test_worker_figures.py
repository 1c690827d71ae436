"""The worker's part of /metrics: asked for once a scrape, never waited for, and never taken for newer than it is."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import PlainTextResponse

from qtilt.vllm_plugin.measures import Measures, VersionMeasures
from qtilt_server.registry import ResidentVersion, ValueModelRegistry
from qtilt_server.worker import GuidanceWorker
from qtilt_server.worker_figures import AskWorkerBeforeScrape, WorkerFigures

WAIT_S = 0.05


class Engine:
    """Answers when it is let, and counts who asked."""

    def __init__(self) -> None:
        self.errored = False
        self.asked = 0
        self.steps = 0
        self.on_gpu = False
        self.is_free = asyncio.Event()
        self.is_free.set()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        assert (method, args) == ("qtilt_measure", ())
        self.asked += 1
        if self.errored:
            raise RuntimeError("the engine is dead")
        await self.is_free.wait()
        measures: Measures = {
            "versions": [self.measures("value", 1), self.measures("value", 2)],
            "caches": [{"cache": "1x1x8-float32", "pages": 9, "pages_used": 4, "page_tokens": 32, "dropped": 2}],
        }
        return [measures]

    def measures(self, name: str, version: int) -> VersionMeasures:
        return {
            "name": name,
            "version": version,
            "running": 1,
            "pages": 3,
            "steps": self.steps,
            "step_requests": 8,
            "step_seconds": 0.5,
            "forward_seconds": None if self.on_gpu else 0.25,
            "first": 10,
            "again": 20,
            "copied": 30,
        }


class Scraped:
    """value@1 is loaded in the server, value@2 isn't yet."""

    def __init__(self) -> None:
        self.engine, self.registry, self.series = Engine(), ValueModelRegistry(), CollectorRegistry()
        self.registry.activate(ResidentVersion("value", 1, "value", "v", {}, 10))
        self.figures = WorkerFigures(GuidanceWorker(self.engine), self.registry, WAIT_S)
        self.series.register(self.figures)

    async def __call__(self) -> dict[str, float]:
        await self.figures.refresh()
        return read(generate_latest(self.series))


def read(scraped: bytes) -> dict[str, float]:
    """The value of each series."""
    lines = scraped.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


STEPS = 'qtilt_guided_steps_total{value_model="value",version="1"}'
FORWARDS = 'qtilt_value_forward_seconds_total{value_model="value",version="1"}'


def scraping(test: Callable[[Scraped], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await test(Scraped())

    asyncio.run(run())


def test_a_scrape_asks_once_and_tells_what_was_answered() -> None:
    async def test(scrape: Scraped) -> None:
        scrape.engine.steps = 7
        series = await scrape()
        assert (scrape.engine.asked, series["qtilt_worker_answers"], series[STEPS]) == (1, 1, 7)
        assert 0 <= series["qtilt_worker_age_seconds"] < 5
        assert series[FORWARDS] == 0.25
        tokens = 'qtilt_value_catch_up_tokens_total{kind="%s",value_model="value",version="1"}'
        assert [series[tokens % kind] for kind in ("first", "again", "copied")] == [10, 20, 30]
        assert series['qtilt_value_cache_pages{cache="1x1x8-float32"}'] == 9
        assert series['qtilt_value_cache_pages_used{cache="1x1x8-float32"}'] == 4
        assert series['qtilt_value_cache_dropped_histories_total{cache="1x1x8-float32"}'] == 2

    scraping(test)


def test_only_what_is_loaded_has_series() -> None:
    async def test(scrape: Scraped) -> None:
        assert not any('version="2"' in name for name in await scrape())
        (version,) = scrape.registry
        lease = scrape.registry.lease("value")
        assert (await scrape())['qtilt_leases{value_model="value",version="1"}'] == 1
        lease.release()
        scrape.registry.remove(version)
        assert not any("value_model" in name for name in await scrape())

    scraping(test)


def test_a_busy_worker_is_not_asked_again_and_its_last_answer_is_told_with_its_age() -> None:
    async def test(scrape: Scraped) -> None:
        assert (await scrape())["qtilt_worker_answers"] == 1
        scrape.engine.is_free.clear()
        scrape.engine.steps = 9
        async with asyncio.timeout(20 * WAIT_S):
            several = [await scrape(), *await asyncio.gather(scrape(), scrape())]
        assert scrape.engine.asked == 2, "the pending question is everybody's"
        for series in several:
            assert (series["qtilt_worker_answers"], series[STEPS]) == (0, 0)
            assert series["qtilt_worker_age_seconds"] >= WAIT_S
        scrape.engine.is_free.set()
        await asyncio.sleep(0.01)
        series = await scrape()
        assert (scrape.engine.asked, series["qtilt_worker_answers"], series[STEPS]) == (3, 1, 9)

    scraping(test)


def test_a_worker_that_never_answered_has_no_series_but_the_server_has() -> None:
    async def test(scrape: Scraped) -> None:
        scrape.engine.is_free.clear()
        assert await scrape() == {'qtilt_leases{value_model="value",version="1"}': 0, "qtilt_worker_answers": 0}

    scraping(test)


def test_a_dead_engine_takes_its_series_along() -> None:
    async def test(scrape: Scraped) -> None:
        assert STEPS in await scrape()
        scrape.engine.errored = True
        series = await scrape()
        assert (series["qtilt_worker_answers"], STEPS in series, "qtilt_worker_age_seconds" in series) == (
            0,
            False,
            False,
        )

    scraping(test)


def test_a_gpus_worker_has_no_series_of_how_long_forwards_took() -> None:
    async def test(scrape: Scraped) -> None:
        scrape.engine.on_gpu = True
        series = await scrape()
        assert STEPS in series
        assert FORWARDS not in series

    scraping(test)


def test_the_worker_is_asked_before_a_scrape_and_for_nothing_else() -> None:
    asked: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scraped = Scraped()
        app.state.guidance = scraped
        app.state.engine = scraped.engine
        yield

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await PlainTextResponse("ok")(scope, receive, send)

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(AskWorkerBeforeScrape)
    app.mount("/", answer)
    with TestClient(app) as client:
        for path, times in (("/health", 0), ("/v1/metrics", 0), ("/metrics", 1), ("/metrics/", 2)):
            assert client.get(path).status_code == 200
            assert app.state.engine.asked == times
    assert asked == ["/health", "/v1/metrics", "/metrics", "/metrics/"]


def test_what_is_collected_in_a_thread_was_made_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's route collects it, while versions come and go."""

    async def test(scrape: Scraped) -> None:
        told = await scrape()
        for of_the_loop in ("_registry", "_measures", "_asking"):
            monkeypatch.setattr(scrape.figures, of_the_loop, None)
        lines = (await asyncio.to_thread(generate_latest, scrape.series)).decode().splitlines()
        assert {
            name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        } == told

    scraping(test)
