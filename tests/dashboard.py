"""What Grafana's dashboard asks of Prometheus."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "docker" / "monitoring" / "grafana" / "qtilt.json"
BOARD: dict[str, Any] = json.loads(PATH.read_text())
FUNCTIONS = {"sum", "rate", "increase", "histogram_quantile", "by"}
NAME = r"[A-Za-z_:][A-Za-z0-9_:]*"


@dataclass(frozen=True)
class Query:
    """panel: its title. expression: PromQL, Grafana's variables in it. legend: of each series."""

    panel: str
    expression: str
    legend: str

    @property
    def plain(self) -> str:
        """As Grafana sends it, for all value models."""
        return self.expression.replace("$__rate_interval", "1m").replace("$value_model", ".*")

    @property
    def metrics(self) -> set[str]:
        """Names of the series that it reads."""
        without_labels = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", "", self.expression)
        return set(re.findall(rf"(?<![\w.]){NAME}", without_labels)) - FUNCTIONS

    @property
    def labels(self) -> set[str]:
        """That it filters by, groups by, or shows."""
        matchers = "".join(re.findall(r"\{([^}]*)\}", self.expression))
        groups = ", ".join(re.findall(r"by \(([^)]*)\)", self.expression))
        return {
            *re.findall(rf"({NAME})\s*=", matchers),
            *re.findall(NAME, groups),
            *re.findall(rf"\{{\{{({NAME})\}}\}}", self.legend),
        }


def queries() -> Iterator[Query]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            yield Query(panel["title"], target["expr"], target["legendFormat"])
