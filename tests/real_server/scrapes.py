"""What /metrics says, as numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from real_server.process import RunningServer


@dataclass(frozen=True)
class Scrape:
    """text: of the whole page."""

    text: str

    @classmethod
    def of(cls, server: RunningServer) -> "Scrape":
        response = server.get("/metrics")
        assert response.status_code == 200
        return cls(response.text)

    @property
    def series(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name, labels and value of each."""
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over the series that have these labels. Fails when there is none of them."""
        found = self.get(name, **labels)
        assert found is not None, f"no {name} with {labels}"
        return found

    def get(self, name: str, **labels: str) -> float | None:
        """As a call, None when there is none."""
        values = [value for each, has, value in self.series if each == name and labels.items() <= has.items()]
        return sum(values) if values else None

    def labels(self, label: str) -> set[str]:
        """All values that a label of ours has."""
        return {has[label] for name, has, _ in self.series if name.startswith("qtilt_") and label in has}
