"""What /metrics says of guidance is what was asked and answered."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from openai import OpenAI

from qtilt_server.metrics import KEPT_UNLOADED
from real_server.checking import encode
from real_server.models import make_value_model
from real_server.process import RunningServer
from real_server.scrapes import Scrape
from real_server.state import versions

VALUE = {"value_model": "value", "version": "1"}
COUNTED = (
    "qtilt_guided_requests_total",
    "qtilt_guided_tokens_total",
    "qtilt_guided_kl_nats_total",
    "qtilt_choice_kl_nats_count",
    "qtilt_choice_kl_nats_sum",
    "qtilt_scored_candidates_total",
    "qtilt_guided_step_requests_total",
    "qtilt_guided_steps_total",
    "qtilt_guided_step_seconds_total",
    "qtilt_value_forward_seconds_total",
)
WATCHED = (*COUNTED, "qtilt_guidance_failures_total")


@pytest.fixture
def counted(idle: RunningServer) -> Any:
    """What has been added to each series since the test began."""
    names = {"first", "again", "copied"}

    def now() -> dict[str, float]:
        scrape = Scrape.of(idle)
        tokens = {kind: scrape.get("qtilt_value_catch_up_tokens_total", kind=kind, **VALUE) for kind in names}
        return {
            name: value or 0.0 for name, value in {**{n: scrape.get(n, **VALUE) for n in WATCHED}, **tokens}.items()
        }

    before = now()
    return lambda: {name: value - before[name] for name, value in now().items()}


@pytest.fixture(scope="module")
def directory(models: Path) -> str:
    make_value_model(models / "published" / "scraped", seed=41)
    return "scraped"


@pytest.fixture
def published(idle: RunningServer, directory: str) -> Iterator[str]:
    """A name of two versions, of which the second is active."""
    name = f"scraped-{uuid4().hex[:8]}"
    for _ in range(2):
        assert publish(idle, name).status_code == 200
    yield name
    if name not in idle.get("/v1/guidance").text:
        return
    for version in sorted(versions(idle, name), key=lambda number: versions(idle, name)[number]["state"] == "active"):
        assert unload(idle, name, version).status_code == 200


def unload(server: RunningServer, name: str, version: int) -> httpx.Response:
    return httpx.delete(f"{server.origin}/v1/guidance/value_models/{name}/{version}", timeout=30)


def publish(server: RunningServer, name: str, path: str = "scraped") -> httpx.Response:
    return server.post("/v1/guidance/value_models", {"name": name, "path": path})


def ask(client: OpenAI, server: RunningServer, prompt: str, **more: Any) -> Any:
    guidance = more.pop("guidance", {})
    body = {"ignore_eos": True, **({} if guidance is None else {"guidance": guidance})}
    return client.completions.create(model=server.model, prompt=prompt, extra_body=body, **more)


def test_a_request_is_counted_as_its_answer_says(client: OpenAI, idle: RunningServer, counted: Any) -> None:
    answer = ask(client, idle, "abc", max_tokens=8, n=2)
    added = counted()
    guidance = [choice.guidance for choice in answer.choices]
    assert added["qtilt_guided_requests_total"] == 1
    assert added["qtilt_guided_tokens_total"] == sum(each["guided_tokens"] for each in guidance) == 16
    assert added["qtilt_choice_kl_nats_count"] == 2
    kl = sum(each["kl"] for each in guidance)
    assert added["qtilt_guided_kl_nats_total"] == pytest.approx(kl, rel=1e-4)
    assert added["qtilt_choice_kl_nats_sum"] == pytest.approx(kl, rel=1e-4)
    assert added["qtilt_scored_candidates_total"] == sum(
        each["candidates"] * each["guided_tokens"] for each in guidance
    )
    assert added["qtilt_guidance_failures_total"] == 0


def test_the_worker_counts_steps_and_the_tokens_before_the_first(
    client: OpenAI, idle: RunningServer, counted: Any
) -> None:
    prompt = "where a prompt begins alike it is copied"
    started = time.monotonic()
    ask(client, idle, prompt, max_tokens=6)
    added, took = counted(), time.monotonic() - started
    length = len(encode(prompt))
    assert (added["qtilt_guided_steps_total"], added["qtilt_guided_step_requests_total"]) == (6, 6)
    assert (added["first"], added["again"], added["copied"]) == (length - 1, 0, 0)
    assert 0 < added["qtilt_value_forward_seconds_total"] < added["qtilt_guided_step_seconds_total"] < took
    ask(client, idle, prompt, max_tokens=6, n=3)
    added = counted()
    assert added["qtilt_guided_step_requests_total"] == 6 + 18
    assert added["first"] + added["copied"] == 4 * (length - 1)
    assert added["copied"] >= length - 1


def test_unguided_requests_are_not_counted(client: OpenAI, idle: RunningServer, counted: Any) -> None:
    ask(client, idle, "abc", max_tokens=8, guidance=None)
    assert set(counted().values()) == {0.0}


def test_leases_rows_and_pages_are_those_of_running_requests(client: OpenAI, idle: RunningServer) -> None:
    (cache,) = {
        cache
        for name, has, _ in Scrape.of(idle).series
        if name == "qtilt_value_cache_pages"
        for cache in [has["cache"]]
    }
    with ask(client, idle, "abc", max_tokens=4000, stream=True) as stream:
        next(iter(stream))
        scrape = Scrape.of(idle)
        assert scrape("qtilt_worker_answers") == 1
        assert scrape("qtilt_worker_age_seconds") < 5
        assert [scrape(name, **VALUE) for name in ("qtilt_leases", "qtilt_running_requests", "qtilt_value_pages")] == [
            1,
            1,
            1,
        ]
        assert scrape("qtilt_leases", value_model="graded") == 0
        # On a CPU each of the server's 40 slots is one page of 4096 tokens.
        assert (scrape("qtilt_value_cache_pages", cache=cache), scrape("qtilt_value_cache_page_tokens")) == (40, 4096)
        assert scrape("qtilt_value_cache_pages_used", cache=cache) == 1
    idle.wait_until(lambda: Scrape.of(idle)("qtilt_running_requests", **VALUE) == 0)
    scrape = Scrape.of(idle)
    assert scrape("qtilt_leases", **VALUE) == scrape("qtilt_value_cache_pages_used") == 0
    assert scrape("qtilt_value_cache_dropped_histories_total") == 0


def test_publications_and_activations_are_counted_by_outcome(idle: RunningServer, published: str) -> None:
    before = Scrape.of(idle)
    route = f"/v1/guidance/value_models/{published}/activate"
    for version in (1, 1, 2, 9):
        idle.post(route, {"version": version})
    assert publish(idle, published, "no such directory").status_code == 400
    after = Scrape.of(idle)

    def added(name: str, **labels: str) -> float:
        return after(name, **labels) - (before.get(name, **labels) or 0.0)

    assert before("qtilt_activations_total", value_model=published, cause="publication") == 2
    assert added("qtilt_activations_total", value_model=published, cause="rollback") == 2
    assert added("qtilt_activations_total", value_model=published, cause="publication") == 0
    outcomes = ("loaded", "refused", "timeout", "failed")
    assert [added("qtilt_value_model_loads_total", outcome=outcome) for outcome in outcomes] == [0, 1, 0, 0]
    assert after("qtilt_active_version", value_model=published) == 2
    assert publish(idle, published).status_code == 200
    assert (
        Scrape.of(idle)("qtilt_value_model_loads_total", outcome="loaded")
        == after("qtilt_value_model_loads_total", outcome="loaded") + 1
    )


def test_an_unloaded_version_has_no_gauges_and_no_series_of_the_worker(
    client: OpenAI, idle: RunningServer, published: str
) -> None:
    ask(client, idle, "abc", max_tokens=2, guidance={"value_model": f"{published}@1"})
    first = {"value_model": published, "version": "1"}
    of_the_worker = ("qtilt_running_requests", "qtilt_value_pages", "qtilt_guided_steps_total")
    gone = ("qtilt_leases", *of_the_worker, "qtilt_value_catch_up_tokens_total")
    scrape = Scrape.of(idle)
    assert None not in [scrape.get(name, **first) for name in gone]
    assert unload(idle, published, 1).status_code == 200
    scrape = Scrape.of(idle)
    assert {scrape.get(name, **first) for name in gone} == {None}
    assert scrape("qtilt_guided_tokens_total", **first) == 2, "what was counted since the last scrape isn't lost"
    assert scrape.get("qtilt_leases", value_model=published, version="2") == 0
    assert unload(idle, published, 2).status_code == 200
    for name in (*gone, "qtilt_active_version", "qtilt_activations_total"):
        assert Scrape.of(idle).get(name, value_model=published) is None


def test_labels_are_of_what_was_loaded_whatever_requests_ask_for(idle: RunningServer) -> None:
    for number in range(20):
        unknown = {
            "model": idle.model,
            "prompt": "a",
            "max_tokens": 1,
            "guidance": {"value_model": f"unknown-{number}"},
        }
        assert idle.post("/v1/completions", unknown).status_code == 400
        assert publish(idle, f"unknown-{number}", "no such directory").status_code == 400
    scrape = Scrape.of(idle)
    assert not any(name.startswith("unknown") for name in scrape.labels("value_model"))
    loaded = {entry["name"] for entry in idle.get("/v1/guidance").json()["value_models"]}
    assert loaded <= scrape.labels("value_model")
    assert len(scrape.labels("value_model") - loaded) <= KEPT_UNLOADED


def test_vllms_own_names_are_as_they_were(idle: RunningServer) -> None:
    names = {name for name, _, _ in Scrape.of(idle).series}
    assert {"vllm:num_requests_running", "vllm:generation_tokens_total", "http_requests_total"} <= names
    ours = {name for name in names if not name.startswith(("vllm:", "http_", "python_", "process_"))}
    assert all(name.startswith("qtilt_") for name in ours), ours


def test_a_paused_engine_is_scraped(client: OpenAI, idle: RunningServer) -> None:
    assert idle.post("/pause", {}).status_code == 200
    try:
        started = time.monotonic()
        scrape = Scrape.of(idle)
        assert time.monotonic() - started < 5
    finally:
        assert idle.post("/resume", {}).status_code == 200
    assert scrape("qtilt_leases", **VALUE) == 0
    assert scrape("qtilt_worker_answers") == 1
    ask(client, idle, "abc", max_tokens=2)
