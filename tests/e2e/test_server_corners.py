"""Where a server's features meet: reasoning, bytes of characters, long prompts in chunks, pauses, other processors.

One server with a tokenizer of its own: three characters of the usual one are bytes, two others begin and end a thought.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from real_server.checking import Oracle, Returned, completion_choices
from real_server.models import ALPHABET, make_reference, make_value_model
from real_server.nudging import ASKS, BY, NUDGED
from real_server.process import RunningServer, running_server
from real_server.state import running, worker_state
from real_server.streams import collect

LENGTH = 128
ADMIN_KEY = "only-for-admins"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
BYTES = {"x": "<0xC3>", "y": "<0xA9>", "z": "<0xB6>"}
FIRST, *LATER = (ALPHABET.index(character) for character in BYTES)
TOKENS = {"return_token_ids": True}
MESSAGES: Any = [{"role": "user", "content": "abc"}]
APPLIED = {
    "value_model": "value@1",
    "eta": 0.1,
    "top_k": 20,
    "method": "qsharp",
    "tail": "mean",
    "candidate_mass": 1.0,
    "kl_budget": None,
}


def odd_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<end>", "<pad>", "<think>", "</think>")
    names = [BYTES.get(character, character) for character in ALPHABET]
    model = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="a"))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=special[0], pad_token=special[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[2:])})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}<think>"
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("odd").resolve()
    odd_tokenizer().save_pretrained(make_reference(directory / "reference"))
    for seed, name in enumerate(("first", "second")):
        make_value_model(directory / "published" / name, seed=seed, tokenizer=odd_tokenizer())
    return directory


@pytest.fixture(scope="module")
def odd(directory: Path) -> Iterator[RunningServer]:
    root = directory / "published"
    flags = (
        f"--value-model=value={root / 'first'}",
        f"--max-model-len={LENGTH}",
        "--max-num-batched-tokens=32",
        "--max-num-seqs=8",
        "--logprobs-mode=processed_logprobs",
        "--reasoning-parser=deepseek_r1",
        "--logits-processors=real_server.nudging:Nudging",
    )
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "QTILT_ADMIN_KEY": ADMIN_KEY,
    }
    with running_server(directory / "reference", root, directory / "log", *flags, environment=environment) as server:
        yield server


@pytest.fixture
def idle(odd: RunningServer) -> Iterator[RunningServer]:
    yield odd
    odd.wait_until(lambda: running(odd) == 0 and worker_state(odd)["guided_rows"] == 0)
    odd.wait_until(lambda: worker_state(odd)["traces"] == 0)


@pytest.fixture
def client(idle: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=idle.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def oracle(directory: Path) -> Oracle:
    versions = {f"value@{number}": directory / "published" / name for number, name in ((1, "first"), (2, "second"))}
    return Oracle(directory / "reference", versions)


def prompt_of(length: int) -> list[int]:
    return [(7 * place + length) % 26 for place in range(length)]


def of_tokens(response: Any, prompt: list[int]) -> list[Returned]:
    """The choices of a completion whose prompt was token ids."""
    return [
        Returned(prompt, choice.token_ids, choice.logprobs.token_logprobs, choice.guidance)
        for choice in response.choices
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_several_bytes_ends_the_text_before_its_character(
    client: OpenAI, idle: RunningServer, stream: bool
) -> None:
    """Bytes alone are no characters yet: what is held back is counted when it is returned, not before."""
    bias = {str(FIRST): 6, **{str(token): 5 for token in LATER}}
    ask = {"model": idle.model, "prompt": "abc", "max_tokens": 60, "n": 3, "seed": 5, "logit_bias": bias, "stop": ["é"]}
    response: Any = client.completions.create(
        **ask, stream=stream, extra_body={"guidance": {}, "ignore_eos": True, **TOKENS}
    )
    choices = list(collect(response).choices.values()) if stream else response.choices
    ended = [choice for choice in choices if choice.finish_reason == "stop"]
    assert ended
    for choice in choices:
        assert "é" not in choice.text
        assert choice.guidance["guided_tokens"] == len(choice.token_ids)
    for choice in ended:
        assert choice.token_ids[-2:] == [FIRST, ALPHABET.index("y")]


@pytest.mark.parametrize("tokens", [3, 9])
def test_echo_and_the_logprobs_of_a_long_prompt_in_chunks_and_from_the_prefix_cache(
    client: OpenAI, idle: RunningServer, oracle: Oracle, tokens: int
) -> None:
    prompt = prompt_of(110 + tokens)
    for _ in range(2):
        ask = {"model": idle.model, "prompt": prompt, "max_tokens": tokens, "logprobs": 0, "seed": 3}
        body = {"guidance": {}, "ignore_eos": True, **TOKENS}
        plain: Any = client.completions.create(**ask, extra_body=body)
        (choice,) = of_tokens(plain, prompt)
        oracle.check(choice, APPLIED)
        with_prompt: Any = client.completions.create(**ask, extra_body={**body, "prompt_logprobs": 0})
        assert len(with_prompt.choices[0].prompt_logprobs) == len(prompt)
        assert of_tokens(with_prompt, prompt)[0].token_ids == choice.token_ids
        oracle.check(of_tokens(with_prompt, prompt)[0], APPLIED)
        echoed: Any = client.completions.create(**ask, echo=True, extra_body=body)
        assert echoed.choices[0].guidance["guided_tokens"] == tokens
        assert echoed.choices[0].guidance["kl"] == pytest.approx(plain.choices[0].guidance["kl"], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_leaves_room_for_one_token_and_one_that_leaves_none(
    client: OpenAI, idle: RunningServer, oracle: Oracle, stream: bool
) -> None:
    body = {"guidance": {}, "ignore_eos": True, **TOKENS}
    prompt = prompt_of(LENGTH - 1)
    response: Any = client.completions.create(
        model=idle.model, prompt=prompt, logprobs=0, stream=stream, max_tokens=None, extra_body=body
    )
    if stream:
        (part,) = collect(response).choices.values()
        choice = Returned(prompt, part.token_ids, part.logprobs, part.guidance)
    else:
        (choice,) = of_tokens(response, prompt)
    assert len(choice.token_ids) == 1
    oracle.check(choice, APPLIED)
    for limit in ({}, {"max_tokens": 1}):
        full = idle.post("/v1/completions", {"prompt": prompt_of(LENGTH), "stream": stream, **limit, **body})
        assert full.status_code == 400, full.text
        assert "tokens" in full.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [True, False])
def test_a_request_that_ends_inside_its_thought_is_counted_by_its_tokens(
    client: OpenAI, idle: RunningServer, include: bool, stream: bool
) -> None:
    body = {"guidance": {}, "ignore_eos": True, "include_reasoning": include, "bad_words": ["</think>"], **TOKENS}
    ask: Any = {"model": idle.model, "messages": MESSAGES, "max_completion_tokens": 9, "extra_body": body}
    if stream:
        parts = collect(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        guidance, usage = parts.choices[0].guidance, parts.usage
        assert parts.choices[0].text == ""
    else:
        response: Any = client.chat.completions.create(**ask)
        guidance, usage = response.choices[0].guidance, response.usage
        assert not response.choices[0].message.content
    assert guidance is not None
    assert guidance["guided_tokens"] == usage.completion_tokens == 9


def test_another_processor_before_guidance_changes_the_reference(
    client: OpenAI, idle: RunningServer, oracle: Oracle
) -> None:
    """As a logit bias does, which comes before it too."""
    ask: Any = {"model": idle.model, "prompt": "abc", "max_tokens": 12, "seed": 8, "logprobs": 0}
    body = {"guidance": {"eta": 0.3}, "ignore_eos": True, **TOKENS}
    nudged: Any = client.completions.create(**ask, extra_body={**body, "vllm_xargs": {ASKS: 1}})
    biased: Any = client.completions.create(**ask, logit_bias={str(NUDGED): BY}, extra_body=body)
    neither: Any = client.completions.create(**ask, extra_body=body)
    assert nudged.choices[0].token_ids == biased.choices[0].token_ids
    assert nudged.choices[0].logprobs.token_logprobs == pytest.approx(
        biased.choices[0].logprobs.token_logprobs, abs=1e-4
    )
    assert nudged.choices[0].guidance == pytest.approx(biased.choices[0].guidance, abs=1e-4)
    (choice,) = completion_choices(neither, ["abc"])
    oracle.check(choice, {**APPLIED, "eta": 0.3})
    assert neither.choices[0].guidance != nudged.choices[0].guidance


def test_a_publication_while_the_engine_is_paused(client: OpenAI, idle: RunningServer, oracle: Oracle) -> None:
    """A request that waits meanwhile goes on with its version; the next one gets the new one."""
    ask: Any = {"model": idle.model, "prompt": "abc", "max_tokens": 100, "logprobs": 0, "seed": 2}
    body = {"guidance": {}, "ignore_eos": True, **TOKENS}

    def post(path: str, body: Any = None, **query: Any) -> httpx.Response:
        return httpx.post(f"{idle.origin}{path}", json=body, params=query, headers=ADMIN, timeout=60)

    with ThreadPoolExecutor(1) as pool:
        assert post("/pause", mode="keep").status_code == 200
        try:
            waiting = pool.submit(lambda: client.completions.create(**ask, extra_body=body))
            idle.wait_until(lambda: running(idle) == 1)
            published = post("/v1/guidance/value_models", {"name": "value", "path": "second"})
            assert published.json()["version"] == 2, published.text
            assert not waiting.done()
        finally:
            assert post("/resume").status_code == 200
        before: Any = waiting.result()
    after: Any = client.completions.create(**ask, extra_body=body)
    for response, version in ((before, "value@1"), (after, "value@2")):
        assert response.guidance["value_model"] == version
        (choice,) = completion_choices(response, ["abc"])
        oracle.check(choice, {**APPLIED, "value_model": version})


def test_a_pause_that_aborts_ends_requests_and_lets_go_of_them(client: OpenAI, idle: RunningServer) -> None:
    ask: Any = {"model": idle.model, "prompt": "abc", "max_tokens": 120}
    with ThreadPoolExecutor(1) as pool:
        assert httpx.post(f"{idle.origin}/pause", params={"mode": "keep"}, timeout=60).status_code == 200
        ended = pool.submit(
            lambda: client.completions.create(**ask, extra_body={"guidance": {}, "ignore_eos": True, **TOKENS})
        )
        idle.wait_until(lambda: running(idle) == 1)
        assert httpx.post(f"{idle.origin}/pause", params={"mode": "abort"}, timeout=60).status_code == 200
        assert httpx.post(f"{idle.origin}/resume", timeout=60).status_code == 200
        (choice,) = ended.result().choices
    assert len(choice.token_ids) < 120
    assert choice.guidance["guided_tokens"] == len(choice.token_ids)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer guessed"}, {"Authorization": ADMIN_KEY}])
def test_with_an_admin_key_nobody_else_publishes(idle: RunningServer, headers: dict[str, str]) -> None:
    """Not from the server's own machine either."""
    before = idle.get("/v1/guidance").json()
    body = {"name": "another", "path": "first"}
    refused = httpx.post(f"{idle.origin}/v1/guidance/value_models", json=body, headers=headers, timeout=60)
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "Forbidden"
    assert "needs the admin key" in refused.json()["error"]["message"]
    assert idle.get("/v1/guidance").json() == before
    assert ADMIN_KEY not in idle.log.read_text()


def test_random_requests_by_the_openapi_document_get_no_server_error(idle: RunningServer) -> None:
    """The last one here: it may unload what it finds."""
    command = [
        Path(sys.executable).parent / "schemathesis",
        "run",
        f"{idle.origin}/openapi.json",
        "--include-path-regex=^/v1/(guidance.*|models|completions|chat/completions)$",
        "--checks=not_a_server_error",
        "--phases=fuzzing,stateful",
        "--max-examples=25",
        "--seed=1",
        "--request-timeout=60",
        f"--header=Authorization: {ADMIN['Authorization']}",
        "--no-color",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=idle.log.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"Tested: +9\b", done.stdout), done.stdout[-3000:]
    assert idle.get("/health").status_code == 200
