"""Every query of Grafana's dashboard reads series and labels that a server has after a few guided requests."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from openai import OpenAI

from dashboard import BOARD, PATH, Query, queries
from real_server.process import RunningServer, free_port
from real_server.scrapes import Scrape

QUERIES = list(queries())


@pytest.fixture(scope="module")
def used(server: RunningServer, client: OpenAI) -> RunningServer:
    """The server, which has answered a few guided requests."""
    ask(server, client)
    return server


def ask(server: RunningServer, client: OpenAI) -> None:
    for prompt in ("abc", "where a prompt begins alike it is copied"):
        client.completions.create(model=server.model, prompt=prompt, n=2, max_tokens=6, extra_body={"guidance": {}})


def labels_of(scrape: Scrape) -> dict[str, set[str]]:
    """By the name of a series, the labels that all of that name have."""
    labels: dict[str, set[str]] = {}
    for name, has, _ in scrape.series:
        labels[name] = labels.get(name, set(has)) & set(has)
    return labels


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.expression)
def test_a_query_reads_what_the_server_has(used: RunningServer, query: Query) -> None:
    has = labels_of(Scrape.of(used))
    assert query.metrics
    assert query.metrics <= set(has)
    for metric in query.metrics:
        # Of counters that are divided by one another, all have what they are grouped by.
        assert query.labels <= has[metric], metric


def test_the_dashboard_shows_all_there_is_of_guidance(used: RunningServer) -> None:
    shown = {metric for query in QUERIES for metric in query.metrics}
    families = {name for name, _, _ in Scrape.of(used).series if name.startswith("qtilt_")}
    hidden = {name for name in families - shown if not name.endswith(("_created", "_sum", "_count"))}
    assert hidden == {"qtilt_value_cache_page_tokens"}


def test_the_documentation_lists_all_there_is_of_guidance(used: RunningServer) -> None:
    page = (PATH.parents[3] / "docs" / "operations.md").read_text()
    cells = [cell for line in page.splitlines() if line.startswith("| `qtilt_") for cell in [line.split("|")[1:3]]]
    documented = {
        name: set(re.findall(r"\w+", labels)) for names, labels in cells for name in re.findall(r"`(\w+)`", names)
    }
    has = labels_of(Scrape.of(used))
    served = {re.sub("_(bucket|count|sum)$", "", name): labels - {"le"} for name, labels in has.items()}
    assert documented == {
        name: labels for name, labels in served.items() if name.startswith("qtilt_") and not name.endswith("_created")
    }


def test_value_models_can_be_chosen(used: RunningServer) -> None:
    (variable,) = BOARD["templating"]["list"]
    assert variable["definition"] == "label_values(qtilt_active_version, value_model)"
    assert Scrape.of(used).get("qtilt_active_version", value_model="graded") == 1


@pytest.fixture
def prometheus(used: RunningServer, tmp_path: Path) -> Iterator[str]:
    """Its URL; with our configuration, but for where the server is and how often it is asked."""
    command = shutil.which("prometheus")
    if command is None:
        pytest.skip("no prometheus in PATH")
    config = yaml.safe_load((PATH.parents[1] / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [used.origin.removeprefix("http://")]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([command, *flags, f"--web.listen-address={listen}"], stdout=log, stderr=log)
    yield f"http://{listen}"
    process.terminate()
    process.wait(30)


def test_prometheus_answers_every_query_with_data(used: RunningServer, client: OpenAI, prometheus: str) -> None:
    def ask_prometheus(expression: str) -> list[object]:
        try:
            response = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, timeout=10)
        except httpx.TransportError:
            return []
        found: list[object] = response.json().get("data", {}).get("result", [])
        return found

    used.wait_until(lambda: len(ask_prometheus("count_over_time(up[1m]) > 2")) > 0, limit_s=30)
    ask(used, client)
    time.sleep(3)
    without = [query for query in QUERIES if not ask_prometheus(query.plain)]
    assert not without
    assert ask_prometheus("up == 1")
