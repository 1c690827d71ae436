"""``best_of``: the same samples as without it, the ones with the largest final value, the best first."""

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from real_server.checking import Oracle, completion_choices, encode
from real_server.process import RunningServer

TOKENS = {"return_token_ids": True}
ETA = {"eta": 0.5}


def final_values(server: RunningServer, prompt: list[int], answers: list[list[int]]) -> list[float]:
    answer = server.post("/v1/guidance/score", {"prompt": prompt, "completions": answers}).json()
    return [choice["value"] for choice in answer["choices"]]


@pytest.mark.parametrize("kept", [1, 3])
def test_the_best_of_the_same_samples_are_answered(
    client: OpenAI, idle: RunningServer, oracle: Oracle, kept: int
) -> None:
    prompts = ["abc", "two and"]

    def ask(**block: Any) -> Any:
        asked = {"model": idle.model, "prompt": prompts, "max_tokens": 15, "seed": 4, "logprobs": 0}
        n = kept if "best_of" in block else 5
        return client.completions.create(**asked, n=n, extra_body={"guidance": {**ETA, **block}, **TOKENS})

    sampled, best = ask(), ask(best_of=5)
    assert [choice.index for choice in best.choices] == list(range(2 * kept))
    assert best.usage.completion_tokens == sampled.usage.completion_tokens
    for number, prompt in enumerate(prompts):
        all_of_it = [choice.token_ids for choice in sampled.choices[5 * number : 5 * number + 5]]
        values = dict(zip(map(tuple, all_of_it), final_values(idle, encode(prompt), all_of_it), strict=True))
        chosen = best.choices[kept * number : kept * (number + 1)]
        told = [choice.guidance["value"] for choice in chosen]
        assert told == pytest.approx(sorted(values.values(), reverse=True)[:kept], abs=1e-6)
        assert [values[tuple(choice.token_ids)] for choice in chosen] == pytest.approx(told, abs=1e-6)
    for choice in completion_choices(best, prompts, n=kept):
        assert choice.guidance is not None
        oracle.check(choice, best.guidance)


def test_chat_and_details(client: OpenAI, idle: RunningServer) -> None:
    response: Any = client.chat.completions.create(
        model=idle.model,
        messages=[{"role": "user", "content": "abc"}],
        n=2,
        max_tokens=10,
        extra_body={"guidance": {"best_of": 4, "details": True}, **TOKENS},
    )
    assert [choice.index for choice in response.choices] == [0, 1]
    first, second = (choice.guidance["value"] for choice in response.choices)
    assert first >= second
    for choice in response.choices:
        assert [each["token_id"] for each in choice.guidance["details"]] == choice.token_ids


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"best_of": 0}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"best_of": "2"}, "best_of"),
        ({"best_of": 1, "n": 2}, "guidance.best_of is 1, allowed: n, which is 2, or more"),
        ({"best_of": 2, "stream": True}, "guidance.best_of is known at the end only"),
        ({"best_of": 2, "max_tokens": 0, "echo": True}, "guidance.best_of needs answers"),
        ({"best_of": 2, "temperature": 0}, "greedy"),
    ],
)
def test_what_has_no_best_is_refused(client: OpenAI, idle: RunningServer, more: dict[str, Any], says: str) -> None:
    block = {"best_of": more.pop("best_of")}
    with pytest.raises(BadRequestError) as refusal:
        client.completions.create(model=idle.model, prompt="abc", **more, extra_body={"guidance": block})
    assert says in refusal.value.message
