"""Which test covers what of vLLM under which engine: docs/exactness.md is generated from it. Imports no vLLM."""

from collections.abc import Sequence
from typing import Any

import pytest

# By the parameter of the ``served`` fixture.
ENGINES = {
    "sync": "V1",
    "async": "V1, async scheduling",
    "plain": "V2",
    "ngram": "V2, n-gram speculation",
    "tensor-parallel-2": "V1, tensor parallel 2",
}
FEATURES = [
    "Q-type",
    "V-type",
    "Bernoulli",
    "Categorical",
    "staggered arrivals",
    "chunked prefill",
    "preemption and resumption",
    "prefix caching",
    "n > 1",
    "`guided_tokens`",
    "guided beside unguided",
    "two value models at once",
    "two versions at once, during a swap",
    "aborted requests",
    "structured output (JSON schema)",
    "min-p",
    "top-p",
    "top-k",
    "logit bias",
    "allowed tokens",
    "bad words",
    "presence and frequency penalties",
    "repetition penalty",
    "stop strings",
    "stop ids",
    "temperature 0",
    "temperature above 1",
    "seeds, whatever else is in the batch",
    "a constant value is plain vLLM, bit for bit",
    "unguided requests are plain vLLM, bit for bit",
]
WITHOUT_SPECULATION = [engine for engine in ENGINES if engine != "ngram"]


def covers(*features: str, engines: Sequence[str] = tuple(ENGINES), refused: str | None = None) -> pytest.MarkDecorator:
    """What a test shows to be exact, or, with the reason, to be refused.

    engines: the only ones the test is collected for, by the parameter of the ``served`` fixture.
    """
    unknown = set(features) - set(FEATURES) | set(engines) - set(ENGINES)
    if unknown or not features:
        raise ValueError(f"features {features} of engines {engines}: unknown are {sorted(unknown)}")
    return pytest.mark.covers(*features, engines=tuple(engines), refused=refused)


def engine_of(item: pytest.Item) -> str | None:
    """The engine a test runs on, None for a test without one."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("served")


def is_meant_to_run(item: pytest.Item) -> bool:
    engine = engine_of(item)
    return all(engine in mark.kwargs["engines"] for mark in item.iter_markers("covers"))


def cells(items: Sequence[pytest.Item]) -> list[dict[str, Any]]:
    """One entry for each test, engine and feature, JSON-able; of tests that are skipped there is none."""
    return [
        {
            "feature": feature,
            "engine": engine_of(item),
            "test": getattr(item, "originalname", item.name),
            "file": item.reportinfo()[0].name if hasattr(item.reportinfo()[0], "name") else str(item.reportinfo()[0]),
            "refused": mark.kwargs["refused"],
        }
        for item in items
        if not any(item.iter_markers("skip"))
        for mark in item.iter_markers("covers")
        for feature in mark.args
    ]
