"""Value models as models: what a request gets that can choose nothing but a model."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from real_server.checking import Oracle, completion_choices
from real_server.models import make_value_model
from real_server.process import RunningServer
from real_server.streams import collect

TOKENS = {"return_token_ids": True, "ignore_eos": True}
MESSAGES: Any = [{"role": "user", "content": "abc"}]


def test_they_are_listed_beside_the_reference(client: OpenAI, idle: RunningServer) -> None:
    cards: dict[str, Any] = {card.id: card for card in client.models.list()}
    reference = cards.pop(idle.model)
    assert next(iter(client.models.list())).id == idle.model, "the reference comes first"
    assert {f"{idle.model}:{name}" for name in ("value", "value@1", "graded", "graded@1")} <= cards.keys()
    for card in cards.values():
        assert (card.parent, card.owned_by, card.max_model_len) == (idle.model, "qtilt", reference.max_model_len)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["graded", "graded@1"])
def test_one_guides_with_the_servers_defaults(
    client: OpenAI, idle: RunningServer, oracle: Oracle, name: str, stream: bool
) -> None:
    ask: Any = {"prompt": "abc", "max_tokens": 12, "logprobs": 0, "seed": 4}
    named: Any = client.completions.create(model=f"{idle.model}:{name}", **ask, extra_body=TOKENS)
    (choice,) = completion_choices(named, ["abc"])
    oracle.check(choice, named.guidance)
    assert named.model == f"{idle.model}:graded@1"
    block: Any = client.completions.create(
        model=idle.model, **ask, stream=stream, extra_body={"guidance": {"value_model": name}, **TOKENS}
    )
    if stream:
        (part,) = collect(block).choices.values()
        assert (part.token_ids, part.guidance, part.applied) == (choice.token_ids, choice.guidance, named.guidance)
    else:
        assert block.model == idle.model
        assert block.choices[0].token_ids == choice.token_ids
        assert block.guidance == named.guidance


def test_a_streamed_chat_names_it_in_every_chunk(client: OpenAI, idle: RunningServer) -> None:
    chunks: list[Any] = list(
        client.chat.completions.create(model=f"{idle.model}:value@1", messages=MESSAGES, max_tokens=5, stream=True)
    )
    assert {chunk.model for chunk in chunks} == {f"{idle.model}:value@1"}
    assert chunks[0].guidance["value_model"] == "value@1"


def test_a_block_beside_it_says_the_rest(client: OpenAI, idle: RunningServer) -> None:
    ask: Any = {"model": f"{idle.model}:graded", "prompt": "abc", "max_tokens": 3}
    answer: Any = client.completions.create(**ask, extra_body={"guidance": {"eta": 0.7, "value_model": "graded"}})
    assert (answer.guidance["value_model"], answer.guidance["eta"]) == ("graded@1", 0.7)
    with pytest.raises(openai.BadRequestError, match="names another: drop one") as refused:
        client.completions.create(**ask, extra_body={"guidance": {"value_model": "value"}})
    assert refused.value.param == "guidance.value_model"
    with pytest.raises(openai.BadRequestError, match="beam search"):
        client.completions.create(**ask, extra_body={"use_beam_search": True})


@pytest.mark.parametrize("name", ["nobody", "value@77", "value@", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_one_that_is_not_there_is_not_found(client: OpenAI, idle: RunningServer, name: str, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match=r"does not exist.*loaded: value@") as missing:
        client.completions.create(model=f"{idle.model}:{name}", prompt="abc", stream=stream)
    assert missing.value.param == "model"


def test_a_published_one_is_there_at_once(client: OpenAI, idle: RunningServer) -> None:
    make_value_model(idle.value_model_root / "named", seed=31)
    assert idle.post("/v1/guidance/value_models", {"name": "named", "path": "named"}).status_code == 200
    assert f"{idle.model}:named@1" in {card.id for card in client.models.list()}
    answer: Any = client.completions.create(model=f"{idle.model}:named", prompt="abc", max_tokens=2)
    assert answer.model == f"{idle.model}:named@1"
