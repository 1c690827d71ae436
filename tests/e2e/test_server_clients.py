"""Clients that nobody here wrote, as they are installed: what each keeps of the guidance that an answer tells of."""

import asyncio
import json
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from real_server.process import RunningServer

MESSAGES: Any = [{"role": "user", "content": "abc"}]
BLOCK = {"eta": 0.3, "top_k": 6}
APPLIED = {
    "value_model": "value@1",
    "eta": 0.3,
    "top_k": 6,
    "method": "qsharp",
    "tail": "mean",
    "candidate_mass": 1.0,
    "kl_budget": None,
}
TOKENS = 4
BODY = {"guidance": BLOCK, "ignore_eos": True}


def assert_told(details: Any, tokens: int = TOKENS) -> None:
    """details: ``usage.completion_tokens_details``, of which clients add up what there is."""
    numbers = details if isinstance(details, dict) else details.model_dump(exclude_none=True)
    assert all(isinstance(number, int | float) for number in numbers.values() if number is not None)
    assert numbers["guided_tokens"] == tokens
    assert numbers["guidance_kl_candidates"] > numbers["guidance_kl"] > 0


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """Imported offline: it would fetch a list of prices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        yield litellm


def test_the_official_client(client: OpenAI, idle: RunningServer) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=idle.model, messages=MESSAGES, max_tokens=TOKENS, n=2, extra_body=BODY
    )
    assert json.loads(response.headers["x-qtilt-guidance"]) == APPLIED
    answer: Any = response.parse()
    assert answer.guidance == APPLIED
    total = answer.usage.completion_tokens_details
    assert_told(total, 2 * TOKENS)
    assert total.guidance_kl == pytest.approx(sum(choice.guidance["kl"] for choice in answer.choices))


def test_its_stream_helper(client: OpenAI, idle: RunningServer) -> None:
    body = {"guidance": BLOCK, "structured_outputs": {"choice": ["abc"]}}  # ends by itself: the helper wants that
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(
        model=idle.model, messages=MESSAGES, max_tokens=20, stream_options=options, extra_body=body
    ) as stream:
        completion: Any = stream.get_final_completion()
    assert completion.choices[0].message.content == "abc"
    assert completion.guidance == APPLIED
    assert completion.usage.completion_tokens_details.guided_tokens == 4


@pytest.mark.parametrize("n", [1, 2])
def test_the_asynchronous_one(idle: RunningServer, n: int) -> None:
    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=idle.base_url, api_key="none", max_retries=0) as client:
            stream: Any = await client.completions.create(
                model=idle.model,
                prompt="abc",
                max_tokens=TOKENS,
                n=n,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=BODY,
            )
            return [chunk async for chunk in stream]

    first, *_, last = asyncio.run(ask())
    assert first.guidance == APPLIED
    assert_told(last.usage.completion_tokens_details, n * TOKENS)


@pytest.mark.filterwarnings("default")  # its own
@pytest.mark.parametrize("asked", [{"extra_body": BODY}, BODY])
def test_litellm(idle: RunningServer, litellm: Any, asked: dict[str, Any]) -> None:
    call = {"model": f"hosted_vllm/{idle.model}", "api_base": idle.base_url, "api_key": "none", "max_tokens": TOKENS}
    whole = litellm.completion(**call, messages=MESSAGES, **asked)
    assert_told(whole.usage.completion_tokens_details)
    chunks = litellm.completion(**call, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **asked)
    assert_told(litellm.stream_chunk_builder(list(chunks)).usage.completion_tokens_details)
    text = litellm.text_completion(**call, prompt="abc", **asked)
    assert_told(text.usage.completion_tokens_details)


def test_langchain(idle: RunningServer) -> None:
    model = ChatOpenAI(
        model=idle.model,
        base_url=idle.base_url,
        api_key="none",  # type: ignore[arg-type]
        max_completion_tokens=TOKENS,
        extra_body=BODY,
        include_response_headers=True,
    )
    message = model.invoke("abc")
    assert isinstance(message, AIMessage)
    assert_told(message.response_metadata["token_usage"]["completion_tokens_details"])
    by_name = model.model_copy(update={"model_name": f"{idle.model}:graded", "extra_body": {"ignore_eos": True}})
    assert by_name.invoke("abc").response_metadata["model_name"] == f"{idle.model}:graded@1"
    streamed: AIMessageChunk = reduce(add, model.stream("abc", stream_usage=True))
    assert streamed.usage_metadata is not None
    assert streamed.usage_metadata["output_tokens"] == TOKENS
    assert json.loads(streamed.response_metadata["headers"]["x-qtilt-guidance"]) == APPLIED
