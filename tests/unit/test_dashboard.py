"""Grafana's dashboard as a file: what it points to is provisioned, and its queries are taken apart rightly.

Whether a server has what they ask for: tests/e2e/test_dashboard.py.
"""

from pathlib import Path
from typing import Any

import yaml

from dashboard import BOARD, PATH, Query, queries

MONITORING = PATH.parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((MONITORING.parent / "compose.monitoring.yaml").read_text())
MOUNTED = {
    target: MONITORING.parent / source
    for service in COMPOSE["services"].values()
    for source, target, *_ in (volume.split(":") for volume in service["volumes"])
    if source.startswith("./")
}


def test_a_query_is_taken_apart() -> None:
    query = Query(
        "panel",
        'histogram_quantile(0.9, sum by (le, kind) (rate(a_bucket{b=~"$value_model", c="d"}[$__rate_interval]))) / d:e',
        "{{f}} p95",
    )
    assert query.metrics == {"a_bucket", "d:e"}
    assert query.labels == {"le", "kind", "b", "c", "f"}


def test_panels_are_apart_and_each_has_a_query_and_says_what_it_is() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        position = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or (panel["targets"] and panel["description"])
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_query_is_of_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasource.yaml").read_text())["datasources"]
    asked = [target["datasource"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
    asked += [variable["datasource"] for variable in BOARD["templating"]["list"]]
    assert {(each["type"], each["uid"]) for each in asked} == {(source["type"], source["uid"])}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in COMPOSE["services"]


def test_the_dashboard_is_mounted_where_it_is_looked_for() -> None:
    (provider,) = yaml.safe_load((MONITORING / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert {target for target in MOUNTED if target.startswith(provider["options"]["path"])} == {
        "/etc/grafana/qtilt/qtilt.json"
    }
    assert all(path.is_file() for path in MOUNTED.values())


def test_prometheus_scrapes_the_service_that_is_called_server_in_both_compose_files() -> None:
    config = yaml.safe_load(MOUNTED["/etc/prometheus/prometheus.yml"].read_text())
    (job,) = config["scrape_configs"]
    assert [target for each in job["static_configs"] for target in each["targets"]] == ["server:8000"]
    for name in ("compose.yaml", "compose.cpu.yaml"):
        assert "server" in yaml.safe_load((MONITORING.parent / name).read_text())["services"]


def test_no_panel_reads_the_same_thing_twice() -> None:
    asked = [query.expression for query in queries()]
    assert len(asked) == len(set(asked)) > 20
    assert Path(PATH).read_text().endswith("\n")
