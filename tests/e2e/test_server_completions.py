"""Guided and unguided completions through the official client, streaming and not, against the oracle."""

from typing import Any

import pytest
from openai import OpenAI

from qtilt.params import DEFAULT_TAIL
from real_server.checking import Oracle, Returned, completion_choices, encode
from real_server.models import TOKENS as VOCABULARY
from real_server.process import RunningServer
from real_server.streams import Streamed, collect

TOKENS = {"return_token_ids": True}
DEFAULTS = {
    "value_model": "value@1",
    "eta": 0.2,
    "top_k": 8,
    "method": "qsharp",
    "tail": DEFAULT_TAIL,
    "candidate_mass": 1.0,
    "kl_budget": None,
}
UNGUIDED = {"guided_tokens": 0, "kl": 0.0, "kl_candidates": 0.0, "mass": None, "candidates": 0.0}
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, DEFAULTS),
    "nulls": (
        dict.fromkeys(("value_model", "eta", "top_k", "method", "tail", "guided_tokens", "candidate_mass")),
        DEFAULTS,
    ),
    "all-given": (
        {"value_model": "graded", "eta": 1, "top_k": 3, "method": "cd", "tail": "mean", "candidate_mass": 1.0},
        {
            "value_model": "graded@1",
            "eta": 1.0,
            "top_k": 3,
            "method": "cd",
            "tail": "mean",
            "candidate_mass": 1.0,
            "kl_budget": None,
        },
    ),
    "tail-floor": ({"tail": "floor"}, DEFAULTS | {"tail": "floor"}),
    "the-smallest-eta": ({"eta": 1e-9}, DEFAULTS | {"eta": 1e-9}),
    "tail-mean": ({"tail": "mean", "eta": 0.5}, DEFAULTS | {"tail": "mean", "eta": 0.5}),
    "clamped": (
        {"value_model": "graded@1", "top_k": 64},
        DEFAULTS | {"value_model": "graded@1", "top_k": VOCABULARY},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_guided_completion_says_what_was_done(client: OpenAI, idle: RunningServer, oracle: Oracle, name: str) -> None:
    block, applied = BLOCKS[name]
    response: Any = client.completions.create(
        model=idle.model, prompt="abc", max_tokens=12, logprobs=0, seed=1, extra_body={"guidance": block, **TOKENS}
    )
    assert response.guidance == applied
    (choice,) = completion_choices(response, ["abc"])
    oracle.check(choice, applied)
    assert choice.guidance is not None
    assert choice.guidance["kl"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_less_mass_is_enough_for_fewer_candidates_and_the_answer_says_how_many(
    client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool
) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=40,
        logprobs=0,
        seed=8,
        stream=stream,
        temperature=0.5,
        extra_body={"guidance": {"eta": 1, "top_k": 20, "candidate_mass": 0.5}, "ignore_eos": True, **TOKENS},
    )
    applied = DEFAULTS | {"eta": 1.0, "top_k": 20, "candidate_mass": 0.5}
    if stream:
        (choice,) = streamed(response, ["abc"])
    else:
        assert response.guidance == applied
        (choice,) = completion_choices(response, ["abc"])
    oracle.check(choice, applied, temperature=0.5)
    assert choice.guidance is not None
    assert 0 < choice.guidance["candidates"] < 20


@pytest.mark.parametrize("stream", [False, True])
def test_with_the_tail_mean_the_divergence_is_among_the_candidates_only(
    client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool
) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=12,
        logprobs=0,
        seed=9,
        stream=stream,
        temperature=0.8,
        extra_body={"guidance": {"tail": "mean", "top_k": 4}, "ignore_eos": True, **TOKENS},
    )
    (choice,) = streamed(response, ["abc"]) if stream else completion_choices(response, ["abc"])
    oracle.check(choice, DEFAULTS | {"tail": "mean", "top_k": 4}, temperature=0.8)
    guidance = choice.guidance
    assert guidance is not None
    assert 0 < guidance["mass"] < 1
    assert 0 < guidance["kl"] < guidance["kl_candidates"], "each step's kl is its mass times its kl_candidates"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [1e-6, 0.5, 1000])
def test_no_choice_exceeds_its_kl_budget(
    client: OpenAI, idle: RunningServer, oracle: Oracle, budget: float, stream: bool
) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        n=2,
        max_tokens=20,
        logprobs=0,
        seed=10,
        stream=stream,
        extra_body={"guidance": {"kl_budget": budget, "eta": 0.05}, "ignore_eos": True, **TOKENS},
    )
    choices = streamed(response, ["abc"], n=2) if stream else completion_choices(response, ["abc"], n=2)
    for choice in choices:
        oracle.check(choice, DEFAULTS | {"eta": 0.05, "kl_budget": budget})
        assert choice.guidance is not None
        assert choice.guidance["kl"] <= budget
        assert (choice.guidance["kl"] > 0.99 * budget) == (budget < 1000)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_temperature(client: OpenAI, idle: RunningServer, oracle: Oracle, temperature: float) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=10,
        logprobs=0,
        seed=2,
        temperature=temperature,
        extra_body={"guidance": {}, **TOKENS},
    )
    oracle.check(completion_choices(response, ["abc"])[0], response.guidance, temperature=temperature)


@pytest.mark.parametrize("block", [None, "absent", {"guided_tokens": 0}], ids=str)
def test_no_guidance_is_the_plain_reference(client: OpenAI, idle: RunningServer, oracle: Oracle, block: Any) -> None:
    body = TOKENS if block == "absent" else {"guidance": block, **TOKENS}
    response: Any = client.completions.create(
        model=idle.model, prompt="abc", max_tokens=10, logprobs=0, seed=3, extra_body=body
    )
    (choice,) = completion_choices(response, ["abc"])
    differences, _ = oracle.compare(choice, None)
    assert max(differences) < 1e-4
    if isinstance(block, dict):
        assert choice.guidance == UNGUIDED
    else:
        assert not hasattr(response, "guidance")
        assert choice.guidance is None


@pytest.mark.parametrize("stream", [False, True])
def test_roll_in_and_roll_out_in_one_request(client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="hello",
        max_tokens=12,
        logprobs=0,
        seed=4,
        stream=stream,
        extra_body={"guidance": {"guided_tokens": 5}, "ignore_eos": True, **TOKENS},
    )
    if stream:
        choice = streamed(response, ["hello"])[0]
        applied = choice.guidance and DEFAULTS
    else:
        (choice,), applied = completion_choices(response, ["hello"]), response.guidance
    oracle.check(choice, applied, guided_tokens=5)
    assert choice.guidance is not None
    assert choice.guidance["guided_tokens"] == 5


PROMPTS = ["one", "two and", "x"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_choices_each(
    client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool
) -> None:
    """Choices end at different times: at the end token, at a stop string, at their length."""
    response: Any = client.completions.create(
        model=idle.model,
        prompt=PROMPTS,
        n=3,
        max_tokens=25,
        logprobs=0,
        seed=5,
        stop=["k"],
        stream=stream,
        extra_body={"guidance": {"eta": 0.5}, **TOKENS},
    )
    choices = streamed(response, PROMPTS, n=3) if stream else completion_choices(response, PROMPTS, n=3)
    assert len(choices) == 9
    assert len({len(choice.token_ids) for choice in choices}) > 2, "the choices were to end at different times"
    for choice in choices:
        oracle.check(choice, DEFAULTS | {"eta": 0.5})


def test_guided_and_unguided_requests_share_batches(client: OpenAI, idle: RunningServer, oracle: Oracle) -> None:
    ask = {"model": idle.model, "prompt": "share", "max_tokens": 30, "logprobs": 0, "stream": True}
    blocks = [{}, None, {"value_model": "graded"}, {"method": "cd"}, None, {"guided_tokens": 3}]
    streams = [client.completions.create(**ask, extra_body={"guidance": block, **TOKENS}) for block in blocks]
    for stream, block in zip(streams, blocks, strict=True):
        parts = collect(stream)
        (choice,) = parts.choices.values()
        limit = None if block is None else block.get("guided_tokens")
        returned = Returned(encode("share"), choice.token_ids, choice.logprobs, choice.guidance)
        oracle.check(returned, choice.applied, guided_tokens=limit)


@pytest.mark.parametrize("stream", [False, True])
def test_only_returned_tokens_count_at_a_stop_string(
    client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool
) -> None:
    """The token that completes the stop string is returned, its text isn't; what vLLM samples beyond doesn't count."""
    for seed in range(6):
        response: Any = client.completions.create(
            model=idle.model,
            prompt="abc",
            max_tokens=60,
            logprobs=0,
            seed=seed,
            stop=["a", "e", "x", "3"],
            stream=stream,
            extra_body={"guidance": {"tail": "floor"}, "ignore_eos": True, **TOKENS},
        )
        (choice,) = streamed(response, ["abc"]) if stream else completion_choices(response, ["abc"])
        assert len(choice.token_ids) < 60
        oracle.check(choice, {**DEFAULTS, "tail": "floor"})


@pytest.mark.parametrize("stream", [False, True])
def test_echo_adds_the_prompt_and_counts_the_generated_tokens(
    client: OpenAI, idle: RunningServer, stream: bool
) -> None:
    ask = {"model": idle.model, "prompt": "abc", "echo": True, "seed": 7, "stream": stream}
    response: Any = client.completions.create(**ask, max_tokens=4, extra_body={"guidance": {}, "ignore_eos": True})
    text, guidance = text_and_guidance(response, stream)
    assert text.startswith("abc"), "token ids were not asked for: echo returns the prompt as text"
    assert guidance["guided_tokens"] == 4
    response = client.completions.create(**ask, max_tokens=0, extra_body={"guidance": {}})
    assert text_and_guidance(response, stream) == ("abc", UNGUIDED)


def test_token_ids_are_returned_only_if_asked_for(client: OpenAI, idle: RunningServer) -> None:
    response: Any = client.completions.create(model=idle.model, prompt="abc", max_tokens=3, extra_body={"guidance": {}})
    assert response.choices[0].token_ids is None
    assert response.choices[0].prompt_token_ids is None


def test_the_usage_chunk_of_a_stream_follows_the_guidance(client: OpenAI, idle: RunningServer) -> None:
    stream = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"guidance": {}, "ignore_eos": True},
    )
    parts = collect(stream)
    assert parts.usage.completion_tokens == 5
    record = parts.choices[0].guidance
    assert record is not None
    details = parts.usage.completion_tokens_details
    assert (details.guided_tokens, details.guidance_kl) == (5, record["kl"])
    assert details.guidance_kl_candidates == record["kl_candidates"]


def test_the_same_seed_gives_the_same_tokens(client: OpenAI, idle: RunningServer) -> None:
    texts = {
        client.completions.create(model=idle.model, prompt="abc", max_tokens=20, seed=11, extra_body={"guidance": {}})
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(texts) == 1


def streamed(chunks: Any, prompts: list[str], n: int = 1) -> list[Returned]:
    parts: Streamed = collect(chunks)
    choices = []
    for index, part in sorted(parts.choices.items()):
        assert part.finish_reason is not None
        assert part.applied is not None
        choices.append(Returned(encode(prompts[index // n]), part.token_ids, part.logprobs, part.guidance))
    return choices


def text_and_guidance(response: Any, stream: bool) -> tuple[str, Any]:
    if not stream:
        return response.choices[0].text, response.choices[0].guidance
    (choice,) = collect(response).choices.values()
    return choice.text, choice.guidance
