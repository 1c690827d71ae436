"""Series of /metrics that are made when somebody asks: leases, and what only the worker knows.

vLLM's route gathers all series at once and can't wait, so the worker is asked before the request gets there. One
question at a time, however many ask, for at most ``WAIT_S``: a worker in a long step answers after it, and the next
scrape has that answer. Until then there are the figures of the last one, or none, and ``qtilt_worker_answers`` is 0.
"""

import asyncio
import logging
import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from qtilt.vllm_plugin.measures import CacheMeasures, Measures, VersionMeasures
from qtilt_server.metrics import OF_A_VERSION
from qtilt_server.registry import ValueModelRegistry
from qtilt_server.worker import GuidanceWorker, WorkerError

logger = logging.getLogger("vllm.qtilt_server.worker_figures")

WAIT_S = 0.5


class WorkerFigures(Collector):
    """Made once per server. Of versions only those that are loaded have series."""

    def __init__(self, worker: GuidanceWorker, registry: ValueModelRegistry, wait_s: float = WAIT_S) -> None:
        self._worker = worker
        self._registry = registry
        self._wait_s = wait_s
        self._asking: asyncio.Task[None] | None = None
        self._measures: Measures | None = None
        self._measured_at = 0.0
        self._series: list[Metric] = []

    async def refresh(self) -> None:
        """Ask the worker, unless it still owes an answer, and give it a moment. Makes the series of the scrape, here on
        the event loop: vLLM's route collects them in a thread.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        await asyncio.wait([self._asking], timeout=self._wait_s)
        self._series = list(self._make_series())

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def collect(self) -> list[Metric]:
        """Called by prometheus_client, in any thread."""
        return self._series

    def _make_series(self) -> Iterator[Metric]:
        yield self._leases()
        has_answered = self._measures is not None and self._asking is not None and self._asking.done()
        answers = GaugeMetricFamily("qtilt_worker_answers", "Whether the worker has answered this scrape: 1 or 0.")
        answers.add_metric([], int(has_answered))
        yield answers
        if self._measures is not None:
            age = GaugeMetricFamily("qtilt_worker_age_seconds", "How old the worker's answer is.", unit="seconds")
            age.add_metric([], time.monotonic() - self._measured_at)
            yield age
            loaded = {(version.name, version.version) for version in self._registry}
            yield from _of_versions([v for v in self._measures["versions"] if (v["name"], v["version"]) in loaded])
            yield from _of_caches(self._measures["caches"])

    async def _ask(self) -> None:
        try:
            self._measures = await self._worker.measure()
            self._measured_at = time.monotonic()
        except WorkerError as error:
            self._measures = None
            logger.warning("the worker's part of /metrics is missing: %s", error)

    def _leases(self) -> Metric:
        leases = GaugeMetricFamily(
            "qtilt_leases", "Guided requests that hold the version: running, waiting or preempted.", labels=OF_A_VERSION
        )
        for version in self._registry:
            leases.add_metric([version.name, str(version.version)], version.leases)
        return leases


class AskWorkerBeforeScrape:
    """ASGI middleware around the whole app, for /metrics alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") == "/metrics":
            await scope["app"].state.guidance.figures.refresh()
        await self.app(scope, receive, send)


def _of_versions(versions: list[VersionMeasures]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "qtilt_running_requests", "Guided requests in the engine's running batch.", labels=OF_A_VERSION
    )
    pages = GaugeMetricFamily("qtilt_value_pages", "Pages of the value cache that it has.", labels=OF_A_VERSION)
    steps = CounterMetricFamily(
        "qtilt_guided_steps", "Steps of the engine in which it had requests.", labels=OF_A_VERSION
    )
    requests = CounterMetricFamily(
        "qtilt_guided_step_requests",
        "Requests that drew a token under guidance, summed over steps.",
        labels=OF_A_VERSION,
    )
    step_seconds = CounterMetricFamily(
        "qtilt_guided_step_seconds",
        "Of the host in guidance, value model and tilt; on a GPU that is starting the work, not doing it.",
        labels=OF_A_VERSION,
    )
    forward_seconds = CounterMetricFamily(
        "qtilt_value_forward_seconds", "In the value model; on CPUs only, no such series on a GPU.", labels=OF_A_VERSION
    )
    catch_up = CounterMetricFamily(
        "qtilt_value_catch_up_tokens",
        "Before the tokens that are drawn on: computed for the first time (first) or again after the request's history "
        "was dropped or preempted (again), or copied from a request that begins alike (copied).",
        labels=(*OF_A_VERSION, "kind"),
    )
    for version in versions:
        label = [version["name"], str(version["version"])]
        running.add_metric(label, version["running"])
        pages.add_metric(label, version["pages"])
        steps.add_metric(label, version["steps"])
        requests.add_metric(label, version["step_requests"])
        step_seconds.add_metric(label, version["step_seconds"])
        if version["forward_seconds"] is not None:
            forward_seconds.add_metric(label, version["forward_seconds"])
        catch_up.add_metric([*label, "first"], version["first"])
        catch_up.add_metric([*label, "again"], version["again"])
        catch_up.add_metric([*label, "copied"], version["copied"])
    yield from (running, pages, steps, requests, step_seconds, forward_seconds, catch_up)


def _of_caches(caches: list[CacheMeasures]) -> Iterator[Metric]:
    """Models of one geometry share a cache, so these are no version's: cache is LAYERSxHEADSxSIZE-DTYPE."""
    pages = GaugeMetricFamily("qtilt_value_cache_pages", "Pages that the cache has in all.", labels=["cache"])
    used = GaugeMetricFamily("qtilt_value_cache_pages_used", "Pages that running requests have.", labels=["cache"])
    page_tokens = GaugeMetricFamily("qtilt_value_cache_page_tokens", "Tokens of one page.", labels=["cache"])
    dropped = CounterMetricFamily(
        "qtilt_value_cache_dropped_histories", "Histories dropped to make room for others.", labels=["cache"]
    )
    for cache in caches:
        pages.add_metric([cache["cache"]], cache["pages"])
        used.add_metric([cache["cache"]], cache["pages_used"])
        page_tokens.add_metric([cache["cache"]], cache["page_tokens"])
        dropped.add_metric([cache["cache"]], cache["dropped"])
    yield from (pages, used, page_tokens, dropped)
