"""Series that the server counts itself: how many there can be."""

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from qtilt_server.metrics import KEPT_UNLOADED, GuidanceMetrics
from qtilt_server.schema import ChoiceGuidance

CHOICE = ChoiceGuidance(guided_tokens=2, kl=0.5, kl_candidates=0.5, mass=1.0, candidates=4.0)


@pytest.fixture
def metrics() -> Iterator[GuidanceMetrics]:
    made = GuidanceMetrics()
    yield made
    for metric in vars(made).values():
        if isinstance(metric, MetricWrapperBase):
            REGISTRY.unregister(metric)


def series(metrics: GuidanceMetrics) -> set[tuple[str, ...]]:
    """Name and labels of each."""
    own = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    samples = [sample for metric in own for family in metric.collect() for sample in family.samples]
    return {(sample.name, *(f"{name}={value}" for name, value in sample.labels.items())) for sample in samples}


def serve(metrics: GuidanceMetrics, name: str, version: int) -> None:
    metrics.active(name, version, cause="publication")
    metrics.request(name, version, "qsharp")
    metrics.choice(name, version, CHOICE)
    metrics.failure(name, version, "nan")


def test_of_many_versions_the_last_ones_have_series(metrics: GuidanceMetrics) -> None:
    counts = []
    for version in range(1, 40):
        serve(metrics, "value", version)
        if version > 2:
            metrics.unloaded("value", version - 2)
        counts.append(len(series(metrics)))
    assert counts[KEPT_UNLOADED + 2 :] == [max(counts)] * (39 - KEPT_UNLOADED - 2)
    versions = {label for labels in series(metrics) for label in labels if label.startswith("version=")}
    assert versions == {f"version={number}" for number in range(39 - KEPT_UNLOADED - 1, 40)}


def test_a_name_that_is_gone_means_no_version(metrics: GuidanceMetrics) -> None:
    for number in range(1, 40):
        serve(metrics, f"value-{number}", 1)
        metrics.unloaded(f"value-{number}", 1)
        metrics.gone(f"value-{number}")
    left = series(metrics)
    assert not any(name.startswith(("qtilt_active_version", "qtilt_activations")) for name, *_ in left)
    names = {label for labels in left for label in labels if label.startswith("value_model=")}
    assert names == {f"value_model=value-{number}" for number in range(40 - KEPT_UNLOADED, 40)}


def test_a_loaded_version_has_its_series_before_the_first_request(metrics: GuidanceMetrics) -> None:
    metrics.active("value", 1)
    loaded = series(metrics)
    serve(metrics, "value", 1)
    assert {name for name, *_ in loaded} > {"qtilt_guided_tokens_total", "qtilt_guidance_failures_total"}
    assert series(metrics) == loaded


def test_outcomes_are_there_before_the_first_publication(metrics: GuidanceMetrics) -> None:
    outcomes = {labels[1] for labels in series(metrics) if labels[0] == "qtilt_value_model_loads_total"}
    assert outcomes == {f"outcome={outcome}" for outcome in ("loaded", "refused", "timeout", "failed")}
