"""``"details": true``: what is said of each token equals plain forwards, in whole answers and in streams."""

from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI

from guided_vllm.oracle import expected_steps, value_oracle
from real_server.checking import Oracle, encode
from real_server.models import TOKENS as VOCABULARY
from real_server.process import RunningServer

TEMPERATURE, TOP_K = 0.8, 4
CLOSE = {"rel": 1e-4, "abs": 1e-4}
ASKED = {"details": True, "top_k": TOP_K, "eta": 0.5}


class Told:
    """The choices of an answer, whole or put together from chunks, as a client sees them."""

    def __init__(self, response: Any, *, stream: bool) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.tokens: dict[int, list[str]] = {}
        """Their texts, as vLLM's log-probabilities name them."""
        self.details: dict[int, list[dict[str, Any]]] = {}
        self.guidance: dict[int, dict[str, Any]] = {}
        for part in response if stream else [response]:
            for choice in part.choices:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        self.token_ids.setdefault(choice.index, []).extend(getattr(choice, "token_ids", None) or [])
        logprobs = choice.logprobs
        if logprobs is not None:
            texts = logprobs.tokens if hasattr(logprobs, "tokens") else [each.token for each in logprobs.content]
            self.tokens.setdefault(choice.index, []).extend(texts)
        guidance = getattr(choice, "guidance", None) or {}
        self.details.setdefault(choice.index, []).extend(guidance.get("details", []))
        if "kl" in guidance:
            self.guidance[choice.index] = guidance


def check(told: Told, prompt: list[int], oracle: Oracle, value_model: str) -> None:
    """Of every token of every choice."""
    for index, token_ids in told.token_ids.items():
        details = told.details[index]
        assert [each["token_id"] for each in details] == token_ids
        assert sum(each["kl"] for each in details) == pytest.approx(told.guidance[index]["kl"])
        plain = expected_steps(oracle.reference, prompt, token_ids, None, TEMPERATURE, VOCABULARY)
        applied = {"value_model": value_model, "eta": 0.5, "top_k": TOP_K, "method": "qsharp"}
        guided = oracle._guided({**applied, "candidate_mass": 1.0, "tail": "mean", "kl_budget": None}, None)
        steps = expected_steps(oracle.reference, prompt, token_ids, guided, TEMPERATURE, VOCABULARY)
        for count, (each, before, after) in enumerate(zip(details, plain, steps, strict=True)):
            assert each["token"] == told.tokens[index][count]
            assert each["reference_logprob"] == pytest.approx(float(before.log_probs_V[each["token_id"]]), **CLOSE)
            assert each["guided_logprob"] == pytest.approx(float(after.log_probs_V[each["token_id"]]), **CLOSE)
            candidates, values = each["candidates"], value_oracle(guided.directory)
            ids = candidates["token_ids"]
            returns, pmf_KZ = values.pmf(values.logits([*prompt, *token_ids[:count]], ids))
            assert candidates["values"] == pytest.approx((pmf_KZ * returns).sum(-1).tolist(), **CLOSE)
            assert candidates["guided_logprobs"] == pytest.approx(after.log_probs_V[ids].tolist(), **CLOSE)
            assert candidates["reference_logprobs"] == pytest.approx(before.log_probs_V[ids].tolist(), **CLOSE)
            assert (
                dict(zip(ids, candidates["tokens"], strict=True)).get(each["token_id"], each["token"]) == each["token"]
            )
            assert torch.tensor(candidates["reference_logprobs"]).argsort(descending=True, stable=True).tolist() == [
                *range(TOP_K)
            ]
            is_candidate = each["token_id"] in ids
            assert each["value"] == (candidates["values"][ids.index(each["token_id"])] if is_candidate else None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value_model", ["value", "graded"])
def test_completions(client: OpenAI, idle: RunningServer, oracle: Oracle, value_model: str, stream: bool) -> None:
    response = client.completions.create(
        model=idle.model,
        prompt="abc",
        n=2,
        max_tokens=12,
        seed=1,
        logprobs=0,
        temperature=TEMPERATURE,
        stream=stream,
        extra_body={"guidance": {**ASKED, "value_model": value_model}, "return_token_ids": True},
    )
    told = Told(response, stream=stream)
    assert len(told.token_ids) == 2
    check(told, encode("abc"), oracle, f"{value_model}@1")


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool) -> None:
    response: Any = client.chat.completions.create(
        model=idle.model,
        messages=[{"role": "user", "content": "abc"}],
        max_tokens=12,
        seed=2,
        logprobs=True,
        temperature=TEMPERATURE,
        stream=stream,
        extra_body={"guidance": ASKED, "return_token_ids": True},
    )
    parts = list(response) if stream else [response]
    prompt = next(ids for part in parts if (ids := getattr(part, "prompt_token_ids", None)))
    check(Told(parts, stream=True), prompt, oracle, "value@1")


def test_a_stream_tells_of_tokens_as_they_come(client: OpenAI, idle: RunningServer) -> None:
    stream: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=30,
        seed=3,
        stream=True,
        extra_body={"guidance": {"details": True}, "ignore_eos": True, "return_token_ids": True},
    )
    told = [
        len((getattr(chunk.choices[0], "guidance", None) or {}).get("details", []))
        - len(getattr(chunk.choices[0], "token_ids", None) or [])
        for chunk in stream
    ]
    assert len(told) > 10
    assert not any(told), "each chunk's own"


def test_tokens_that_were_not_guided_have_nothing_but_their_names(client: OpenAI, idle: RunningServer) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=5,
        extra_body={"guidance": {"details": True, "guided_tokens": 2}, "ignore_eos": True},
    )
    details = response.choices[0].guidance["details"]
    assert [each["kl"] is not None for each in details] == [True, True, False, False, False]
    assert set(details[-1]) == set(details[0])
    assert [name for name, value in details[-1].items() if value is not None] == ["token_id", "token"]


def test_without_them_nothing_is_said_of_single_tokens(client: OpenAI, idle: RunningServer) -> None:
    for block in ({}, {"details": False}, {"details": None}):
        response: Any = client.completions.create(
            model=idle.model, prompt="abc", max_tokens=3, extra_body={"guidance": block}
        )
        assert "details" not in response.choices[0].guidance


def test_a_prompt_that_is_only_echoed_has_none(client: OpenAI, idle: RunningServer) -> None:
    response: Any = client.completions.create(
        model=idle.model, prompt="abc", max_tokens=0, echo=True, extra_body={"guidance": {"details": True}}
    )
    assert response.choices[0].guidance["details"] == []


@pytest.mark.parametrize("details", [1, "yes", [True]])
def test_they_are_asked_for_or_not(client: OpenAI, idle: RunningServer, details: object) -> None:
    with pytest.raises(BadRequestError, match=r"guidance\.details"):
        client.completions.create(model=idle.model, prompt="abc", extra_body={"guidance": {"details": details}})
