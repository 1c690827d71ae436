"""Which test covers what of vLLM under which engine: docs/exactness.md is generated from it. Imports no vLLM."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

# By the parameter of the ``served`` fixture.
ENGINES = {
    "sync": "V1",
    "async": "V1, async scheduling",
    "plain": "V2",
    "ngram": "V2, n-gram speculation",
    "paged": "V2, n-gram speculation, attention of GPUs",
    "captured": "V2, captured steps",
    "v2-tensor-parallel-2": "V2, tensor parallel 2",
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
    "`candidate_mass`",
    "`tail`: mean",
    "`kl_budget`",
    "`details`",
    "guided beside unguided",
    "two value models at once",
    "two versions at once, during a swap",
    "aborted requests",
    "a version that isn't resident",
    "structured output (JSON schema)",
    "min-p",
    "top-p",
    "top-k",
    "logit bias",
    "allowed tokens",
    "bad words",
    "presence and frequency penalties",
    "repetition penalty",
    "a thinking budget",
    "stop strings",
    "stop ids",
    "temperature 0",
    "temperature above 1",
    "seeds, whatever else is in the batch",
    "a constant value is plain vLLM, bit for bit",
    "unguided requests are plain vLLM, bit for bit",
    "speculative decoding",
    "pipeline parallelism",
    "beam search",
    "prompt embeddings",
]
DRAFTING = [engine for engine, name in ENGINES.items() if "speculation" in name]
WITHOUT_SPECULATION = [engine for engine in ENGINES if engine != "ngram"]


def covers(*features: str, engines: Sequence[str] = tuple(ENGINES), refused: str | None = None) -> pytest.MarkDecorator:
    """What a test shows to be exact, or, with the reason, to be refused.

    engines: the only ones the test is collected for. A test that doesn't take the ``served`` fixture names its engine.
    """
    unknown = (set(features) - set(FEATURES)) | (set(engines) - set(ENGINES))
    if unknown or not features:
        raise ValueError(f"covers{features} with engines {engines}: unknown are {sorted(unknown)}")
    return pytest.mark.covers(*features, engines=tuple(engines), refused=refused)


def is_meant_to_run(item: pytest.Item) -> bool:
    """Whether the test is about the engine it would run on."""
    engine = _engine(item)
    return engine is None or all(engine in mark.kwargs["engines"] for mark in item.iter_markers("covers"))


def report(items: Sequence[pytest.Item]) -> dict[str, Any]:
    """Engines, features and one cell for each test, engine and feature, JSON-able. Tests that are skipped have none.

    Raises ValueError for tests that cover something and may be skipped or fail nevertheless.
    """
    for item in items:
        doubtful = {mark.name for mark in item.iter_markers() if mark.name in ("skipif", "xfail")}
        if doubtful and any(item.iter_markers("covers")):
            raise ValueError(f"{item.nodeid} covers something, and is marked {', '.join(sorted(doubtful))}")
    cells = [
        {
            "feature": feature,
            "engine": engine,
            "test": item.originalname,
            "file": Path(inspect.getsourcefile(item.obj)).relative_to(TESTS.parent).as_posix(),
            "refused": mark.kwargs["refused"],
        }
        for item in items
        if isinstance(item, pytest.Function) and not any(item.iter_markers("skip"))
        for mark in item.iter_markers("covers")
        for engine in ([_engine(item)] if _engine(item) else mark.kwargs["engines"])
        for feature in mark.args
    ]
    return {"engines": ENGINES, "features": FEATURES, "cells": cells}


def _engine(item: pytest.Item) -> str | None:
    """The parameter of the ``served`` fixture; None for a test without it."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("served")
