"""``POST /v1/guidance/score`` against plain forwards; what is asked for while requests run and versions go."""

import concurrent.futures
from typing import Any

import pytest
from openai import OpenAI

from guided_vllm.oracle import value_oracle
from real_server.checking import Oracle, encode
from real_server.process import RunningServer
from real_server.state import worker_state

ROUTE = "/v1/guidance/score"
LONGEST = 4096


def post(server: RunningServer, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = server.post(ROUTE, body)
    return answer.status_code, answer.json()


def scored(server: RunningServer, **body: Any) -> dict[str, Any]:
    status, answer = post(server, **body)
    assert status == 200, answer
    return answer


def check(answer: dict[str, Any], prompt: list[int], oracle: Oracle) -> None:
    """Every number of the answer; unknown tokens have none."""
    values = value_oracle(oracle.directories[answer["value_model"]])
    for choice in answer["choices"]:
        token_ids = choice["token_ids"]
        for number, token in enumerate(token_ids):
            returns, pmf_1Z = values.pmf(values.logits([*prompt, *token_ids[:number]], [token]))
            expected = pmf_1Z[0].tolist()
            assert answer["support"] == pytest.approx(returns.tolist())
            assert choice["values"][number] == pytest.approx(float((pmf_1Z[0] * returns).sum()), abs=1e-5)
            if choice["distributions"] is not None:
                assert choice["distributions"][number] == pytest.approx(expected, abs=1e-5)
        assert choice["value"] == choice["values"][-1]
        assert choice["distribution"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("value_model", ["value", "graded@1"])
def test_texts_and_token_ids_are_scored_alike(idle: RunningServer, oracle: Oracle, value_model: str) -> None:
    prompt, completions = "abc", ["hello there", "x"]
    by_text = scored(idle, prompt=prompt, completions=completions, value_model=value_model, distributions=True)
    token_ids = [encode(each) for each in completions]
    by_id = scored(idle, prompt=encode(prompt), completions=token_ids, value_model=value_model, distributions=True)
    assert by_text == by_id
    assert [choice["token_ids"] for choice in by_text["choices"]] == token_ids
    assert [choice["index"] for choice in by_text["choices"]] == [0, 1]
    tokens = sum(map(len, token_ids))
    assert by_text["usage"] == {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    check(by_text, encode(prompt), oracle)


def test_a_chat_is_read_as_a_completion_of_it_would(client: OpenAI, idle: RunningServer, oracle: Oracle) -> None:
    messages: list[Any] = [{"role": "user", "content": "abc"}]
    answer: Any = client.chat.completions.create(
        model=idle.model, messages=messages, max_tokens=5, extra_body={"return_token_ids": True}
    )
    by_chat = scored(idle, messages=messages, completions=["hello"])
    assert by_chat["usage"]["prompt_tokens"] == len(answer.prompt_token_ids)
    assert by_chat["choices"][0]["distributions"] is None
    check(by_chat, answer.prompt_token_ids, oracle)


def test_what_a_request_was_guided_by_is_what_is_scored(client: OpenAI, idle: RunningServer) -> None:
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=40,
        temperature=0,
        extra_body={"guidance": {"details": True}, "ignore_eos": True, "return_token_ids": True},
    )
    (choice,) = response.choices
    (again,) = scored(idle, prompt="abc", completions=[choice.token_ids])["choices"]
    told = [details["value"] for details in choice.guidance["details"]]
    compared = [pair for pair in zip(told, again["values"], strict=True) if pair[0] is not None]
    assert len(compared) > 20
    for value, by_score in compared:
        assert value == pytest.approx(by_score, abs=1e-5)


def test_many_at_once_beside_running_requests(client: OpenAI, idle: RunningServer, oracle: Oracle) -> None:
    def complete(seed: int) -> Any:
        return client.completions.create(
            model=idle.model, prompt="abc", max_tokens=60, seed=seed, extra_body={"guidance": {}, "ignore_eos": True}
        )

    def ask(number: int) -> dict[str, Any]:
        return scored(idle, prompt="p" * (1 + number), completions=["hello world"] * 3)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        running = [pool.submit(complete, seed) for seed in range(8)]
        answers = list(pool.map(ask, range(12)))
        assert all(future.result().choices[0].guidance["guided_tokens"] == 60 for future in running)
    for number, answer in enumerate(answers):
        check(answer, encode("p" * (1 + number)), oracle)
    idle.wait_until(lambda: worker_state(idle)["texts"] == 0)


def test_texts_as_long_as_the_model_allows(idle: RunningServer) -> None:
    (choice,) = scored(idle, prompt=[1], completions=[[2] * (LONGEST - 1)])["choices"]
    assert len(choice["values"]) == LONGEST - 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"completions": ["a"]}, "exactly one of them"),
        ({"prompt": "a", "messages": [], "completions": ["a"]}, "exactly one of them"),
        ({"prompt": "a"}, "completions"),
        ({"prompt": "a", "completions": []}, "completions"),
        ({"prompt": "a", "completions": ["a"] * 129}, "completions"),
        ({"prompt": "a", "completions": "a"}, "completions"),
        ({"prompt": "a", "completions": ["a", ""]}, "completions[1] has no token"),
        ({"prompt": [], "completions": ["a"]}, "prompt has no token"),
        ({"prompt": [-1], "completions": ["a"]}, "prompt has the token id -1"),
        ({"prompt": "a", "completions": [[10**9]]}, "completions[0] has the token id 1000000000"),
        ({"prompt": "a", "completions": [[1.5]]}, "completions"),
        ({"prompt": "a", "completions": [[True]]}, "completions"),
        ({"prompt": [1] * 4000, "completions": [[1] * 97]}, "completions[0] ends at token 4097"),
        ({"prompt": "a", "completions": [[1] * 4000] * 17}, "completions have 68000 tokens together"),
        ({"prompt": "a", "completions": ["a"], "value_model": "nobody"}, "value_model: unknown value model 'nobody'"),
        ({"prompt": "a", "completions": ["a"], "value_model": "value@9"}, "value_model: value model 'value' has no"),
        ({"prompt": "a", "completions": ["a"], "eta": 1}, "eta"),
        ({"messages": [{"content": "a"}], "completions": ["a"]}, ""),
        ({"messages": "a", "completions": ["a"]}, "messages"),
    ],
)
def test_what_cant_be_scored_is_a_400_that_names_the_field(
    idle: RunningServer, body: dict[str, Any], field: str
) -> None:
    status, answer = post(idle, **body)
    assert status == 400
    assert field in answer["error"]["message"]
