"""The values of given tokens, against plain forwards; nothing of it touches the requests that run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from guided_vllm.oracle import value_oracle
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli, Categorical
from qtilt.vllm_plugin import scoring
from qtilt.vllm_plugin.scoring import Text, Texts
from qtilt.vllm_plugin.versions import ResidentVersion
from running_batch import RunningBatch, logits_at, make_residents

DISTRIBUTIONS = {"q": Categorical(-1.0, 0.5, 4), "v": Bernoulli()}

pytestmark = pytest.mark.usefixtures("implementation")


def load(directory: Path, type_: str, family: str = "llama") -> ResidentVersion:
    path = make_value_model(directory / f"{type_}-{family}", type_, DISTRIBUTIONS[type_], family, seed=1)
    return make_residents(4).load_at_start("value", str(path))


def score(version: ResidentVersion, token_ids: list[int], first: int) -> list[list[float] | None]:
    told = {}
    for wants_all in (False, True):
        text = Text(version, token_ids, first, REFERENCE_VOCAB, wants_all=wants_all)
        while not text.is_done:
            text.advance()
        told[wants_all] = text.values()
    assert told[False] == told[True] | {"distributions": told[True]["distributions"][-1:]}
    support, means, pmf = told[True]["support"], told[True]["values"], told[True]["distributions"]
    assert support == version.distribution.support
    for each, mean in zip(pmf, means, strict=True):
        assert mean == (None if each is None else pytest.approx(sum(np.array(each) * support)))
    return pmf


@pytest.mark.parametrize("at_once", [2, 7, 1000])
@pytest.mark.parametrize("first", [1, 9, 39])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("type_", ["q", "v"])
def test_each_token_has_the_distribution_of_the_return_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: str, family: str, first: int, at_once: int
) -> None:
    monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cpu", at_once)
    version, tokens = load(tmp_path, type_, family), prompt(40, seed=3)
    values = score(version, tokens, first)
    assert len(values) == len(tokens) - first
    oracle = value_oracle(version.path)
    for number, pmf in enumerate(values, start=first):
        assert pmf is not None
        returns, pmf_1Z = oracle.pmf(oracle.logits(tokens[:number], [tokens[number]]))
        assert returns.tolist() == pytest.approx(version.distribution.support)
        assert pmf == pytest.approx(pmf_1Z[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("type_", ["q", "v"])
def test_a_token_that_guidance_never_scores_has_none_and_is_read_as_there(tmp_path: Path, type_: str) -> None:
    """Behind the value model's tokens: history reads them as its last row."""
    version, tokens = load(tmp_path, type_), prompt(12, seed=3)
    unknown = REFERENCE_VOCAB - 1
    assert unknown >= version.scorable
    tokens[5] = tokens[11] = unknown
    values = score(version, tokens, 4)
    assert [bool(pmf) for pmf in values] == [True, False, True, True, True, True, True, False]
    oracle = value_oracle(version.path)
    _, pmf_1Z = oracle.pmf(oracle.logits(tokens[:8], [tokens[8]]))
    assert values[4] == pytest.approx(pmf_1Z[0].tolist(), abs=1e-5)


def test_running_requests_stay_as_they_are_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cpu", 4)
    version, guided = load(tmp_path, "v"), {}
    for is_scoring in (False, True):
        runner = RunningBatch(4)
        for slot in range(4):
            runner.add(slot, version, prompt(5 + slot, seed=slot), trace_id=str(slot))
        text = Text(version, prompt(40, seed=9), 1, REFERENCE_VOCAB) if is_scoring else None
        steps = []
        for step in range(8):
            steps.append(runner.guide(range(4), logits_at(step).repeat(4, 1)))
            for slot in range(4):
                runner.requests.commit(slot, [step])
            if text is not None:
                text.advance()
        guided[is_scoring] = torch.stack(steps)
        for slot in range(4):
            runner.batch.remove(slot)
    assert torch.equal(guided[False], guided[True])
    assert version.engine.cache.free_slots == 4


@pytest.mark.parametrize(
    ("tokens", "first", "says"),
    [
        ([1, 2], 0, "from 0 on of 2"),
        ([1, 2], 2, "from 2 on of 2"),
        ([], 1, "from 1 on of 0"),
        ([1, -1, 2], 1, f"must be 0 to {REFERENCE_VOCAB - 1}"),
        ([1, REFERENCE_VOCAB], 1, f"must be 0 to {REFERENCE_VOCAB - 1}"),
    ],
)
def test_what_cant_be_scored_is_refused(tmp_path: Path, tokens: list[int], first: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Text(load(tmp_path, "v"), tokens, first, REFERENCE_VOCAB)


def test_texts_are_told_apart_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cpu", 8)
    version, texts = load(tmp_path, "v"), Texts()
    wanted = {"a": prompt(6, seed=1), "b": prompt(30, seed=2)}
    for name, tokens in wanted.items():
        texts.begin(name, Text(version, tokens, 2, REFERENCE_VOCAB))
    done = {}
    for _ in range(20):
        for name in wanted.keys() - done.keys():
            values = texts.advance(name)
            if values is not None:
                done[name] = values["values"]
                texts.end(name)
    for name, tokens in wanted.items():
        pmf = np.array(score(version, tokens, 2))
        assert done[name] == pytest.approx((pmf @ version.distribution.support).tolist())
    assert len(texts) == 0
    texts.end("a")
    with pytest.raises(ValueError, match="no text 'a'"):
        texts.advance("a")
