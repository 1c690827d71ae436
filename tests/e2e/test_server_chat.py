"""Guided chat completions through the official client, against the oracle."""

from typing import Any

import pytest
from openai import OpenAI

from qtilt.params import DEFAULT_TAIL
from real_server.checking import Oracle, Returned, encode
from real_server.process import RunningServer
from real_server.streams import collect

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
PROMPT = "<user>hello<assistant>"
APPLIED = {
    "value_model": "value@1",
    "eta": 0.1,
    "top_k": 8,
    "method": "qsharp",
    "tail": DEFAULT_TAIL,
    "candidate_mass": 1.0,
    "kl_budget": None,
}


@pytest.mark.parametrize("n", [1, 3])
def test_a_guided_chat(client: OpenAI, idle: RunningServer, oracle: Oracle, n: int) -> None:
    response: Any = client.chat.completions.create(
        model=idle.model,
        messages=MESSAGES,
        max_completion_tokens=15,
        n=n,
        seed=1,
        logprobs=True,
        extra_body={"guidance": {"eta": 0.1}, "return_token_ids": True},
    )
    assert response.guidance == APPLIED
    assert len(response.choices) == n
    for choice in response.choices:
        logprobs = [entry.logprob for entry in choice.logprobs.content]
        oracle.check(Returned(encode(PROMPT), choice.token_ids, logprobs, choice.guidance), APPLIED)


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat(client: OpenAI, idle: RunningServer, oracle: Oracle, n: int) -> None:
    chunks = client.chat.completions.create(
        model=idle.model,
        messages=MESSAGES,
        max_completion_tokens=15,
        n=n,
        seed=2,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"guidance": {"eta": 0.1, "guided_tokens": 7}, "return_token_ids": True},
    )
    parts = collect(chunks)
    assert len(parts.choices) == n
    for choice in parts.choices.values():
        assert choice.applied == APPLIED
        returned = Returned(encode(PROMPT), choice.token_ids, choice.logprobs, choice.guidance)
        oracle.check(returned, APPLIED, guided_tokens=7)
    assert parts.usage.completion_tokens == sum(len(choice.token_ids) for choice in parts.choices.values())


def test_an_unguided_chat_says_nothing_of_guidance(client: OpenAI, idle: RunningServer) -> None:
    response = client.chat.completions.create(
        model=idle.model, messages=MESSAGES, max_completion_tokens=3, extra_body={"guidance": None}
    )
    assert not hasattr(response, "guidance")
    assert not hasattr(response.choices[0], "guidance")


def test_a_forced_tool_call_is_counted_by_its_tokens(client: OpenAI, idle: RunningServer) -> None:
    """The parser turns the text into a tool call; the guidance is of the tokens that made it."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    tool: Any = {"type": "function", "function": {"name": "pick", "parameters": schema, "strict": True}}
    response: Any = client.chat.completions.create(
        model=idle.model,
        messages=MESSAGES,
        max_completion_tokens=200,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "pick"}},
        extra_body={"guidance": {}},
    )
    (choice,) = response.choices
    assert choice.message.tool_calls[0].function.name == "pick"
    assert choice.guidance["guided_tokens"] == response.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_required_tools_are_counted_choice_by_choice(client: OpenAI, idle: RunningServer, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    ask: Any = {
        "model": idle.model,
        "messages": MESSAGES,
        "max_completion_tokens": 300,
        "n": 2,
        "tools": [{"type": "function", "function": {"name": "pick", "parameters": schema}}],
        "tool_choice": "required",
        "extra_body": {"guidance": {"eta": 0.5}},
    }
    if stream:
        parts = collect(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        choices, usage = list(parts.choices.values()), parts.usage
    else:
        response: Any = client.chat.completions.create(**ask)
        choices, usage = response.choices, response.usage
    records: list[Any] = [choice.guidance for choice in choices]
    assert len(records) == 2
    assert all(record["kl"] > 0 for record in records)
    assert sum(record["guided_tokens"] for record in records) == usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_is_guided_among_the_allowed_tokens(
    client: OpenAI, idle: RunningServer, stream: bool
) -> None:
    response: Any = client.chat.completions.create(
        model=idle.model,
        messages=MESSAGES,
        stream=stream,
        extra_body={"guidance": {}, "structured_outputs": {"choice": ["xyz", "zyx", "yy"]}},
    )
    if stream:
        (part,) = collect(response).choices.values()
        text, guidance = part.text, part.guidance
    else:
        text, guidance = response.choices[0].message.content, response.choices[0].guidance
    assert text in ("xyz", "zyx", "yy")
    assert guidance is not None
    assert guidance["guided_tokens"] == len(text) + 1
