"""The trainer's client against the real server: exact token ids, seeds, chat, guidance, refusals."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from transformers import AutoTokenizer

from qtilt_trainer.client import Completion, Guidance, GuidedClient, Sampling
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.prompts import Framing
from qtilt_trainer.server_errors import PromptRefusedError, ServerError, VersionGoneError
from real_server.models import POSITIONS
from real_server.process import RunningServer

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=12)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=12)
CHAT = [{"role": "user", "content": "one and two"}]

Answer = TypeVar("Answer")


def ask(server: RunningServer, question: Callable[[GuidedClient], Awaitable[Answer]]) -> Answer:
    async def run() -> Answer:
        async with GuidedClient(ServerConfig(url=server.origin, retries=0)) as client:
            return await question(client)

    return asyncio.run(run())


def complete(
    server: RunningServer,
    prompt: str | list[dict[str, str]],
    samples: int = 1,
    seed: int = 5,
    sampling: Sampling = SAMPLING,
    guidance: Guidance | None = None,
) -> list[Completion]:
    return ask(server, lambda client: client.complete(prompt, samples, seed, sampling, guidance))


@pytest.mark.parametrize("prompt", ["one and two", CHAT])
def test_token_ids_are_the_ones_generated(
    server: RunningServer, models: Path, prompt: str | list[dict[str, str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "reference")
    (completion,) = complete(server, prompt)
    if isinstance(prompt, str):
        expected = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert completion.prompt_token_ids == expected
    assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == completion.text
    assert completion.ended == (completion.token_ids[-1] == tokenizer.eos_token_id)
    assert completion.ended == (completion.finish_reason == "stop")
    assert (completion.value_model, completion.guided_tokens, completion.kl) == (None, 0, 0.0)


@pytest.mark.parametrize("prompt", ["one and two", CHAT])
def test_each_of_n_completions_is_what_its_own_seed_gives(
    server: RunningServer, prompt: str | list[dict[str, str]]
) -> None:
    together = complete(server, prompt, samples=4, seed=70)
    alone = [complete(server, prompt, seed=70 + index)[0] for index in range(4)]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
    assert len({tuple(completion.token_ids) for completion in together}) > 1


@pytest.mark.parametrize("prompt", ["one and two", CHAT])
def test_guidance_is_applied_and_reported(server: RunningServer, prompt: str | list[dict[str, str]]) -> None:
    guidance = Guidance("value@1", 0.1, 8, "qsharp", guided_tokens=3)
    (completion,) = complete(server, prompt, guidance=guidance)
    assert completion.value_model == "value@1"
    assert completion.top_k == 8
    assert completion.guided_tokens == min(3, len(completion.token_ids))
    assert completion.kl > 0
    (whole,) = complete(server, prompt, guidance=Guidance("value@1", 0.1, 8, "cd"))
    assert whole.guided_tokens == len(whole.token_ids)
    (greedy,) = complete(server, prompt, sampling=GREEDY, guidance=guidance)
    assert greedy.kl > 0


def test_a_framed_prompt_is_tokenised_as_the_template_says(server: RunningServer, models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "reference")
    few_shot = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    framing = Framing(system="be kind", few_shot=few_shot, prefill="so it", template_kwargs={"marked": True})
    (completion,) = complete(server, CHAT, sampling=replace(SAMPLING, framing=framing))
    messages = [
        {"role": "system", "content": "be kind"},
        *few_shot,
        *CHAT,
        {"role": "assistant", "content": "so it"},
    ]
    # The template adds its mark behind the answer that is continued, and so it is cut off with the rest.
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert completion.prompt_token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert completion.text == "so it" + tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    marked = Framing(template_kwargs={"marked": True})
    (completion,) = complete(server, CHAT, sampling=replace(SAMPLING, framing=marked))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, marked=True)
    assert text.endswith("=")
    assert completion.prompt_token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    for framed in (framing, marked):
        length = ask(server, lambda client, framed=framed: client.prompt_length(CHAT, framed))
        (completion,) = complete(server, CHAT, sampling=replace(SAMPLING, framing=framed))
        assert length == len(completion.prompt_token_ids)


def test_stop_strings_stop_tokens_and_min_tokens_do_what_they_say(server: RunningServer, models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "reference")
    long = replace(SAMPLING, max_tokens=40)
    plain = complete(server, "one and two", samples=8, sampling=long)
    letter = next(completion.text[4] for completion in plain if len(completion.text) > 5)
    stopped = complete(server, "one and two", samples=8, sampling=replace(long, stop=(letter,)))
    for before, after in zip(plain, stopped, strict=True):
        assert after.text == before.text.partition(letter)[0]
    (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
    ended = complete(server, "one and two", samples=8, sampling=replace(long, stop_token_ids=(token,)))
    assert any(completion.token_ids[-1] == token for completion in ended)
    assert all(token not in completion.token_ids[:-1] for completion in ended)
    least = complete(server, "one and two", samples=8, sampling=replace(long, min_tokens=30))
    assert min(len(completion.token_ids) for completion in plain) < 30
    assert min(len(completion.token_ids) for completion in least) >= 30


def test_the_tail_is_passed_on_and_what_was_applied_comes_back(server: RunningServer) -> None:
    for tail in ("floor", "mean"):
        guidance = Guidance("value@1", 0.1, 8, "qsharp", guided_tokens=3, tail=tail)
        (completion,) = complete(server, "one and two", guidance=guidance)
        assert completion.tail == tail
        assert completion.kl_candidates > 0
        assert completion.mass is not None
        assert 0 < completion.mass <= 1


def test_lengths_of_prompts_and_of_the_context(server: RunningServer) -> None:
    assert ask(server, lambda client: client.context_length()) == POSITIONS
    assert ask(server, lambda client: client.prompt_length("one and two", Framing())) == len("one and two")
    assert ask(server, lambda client: client.is_healthy())


def test_a_prompt_that_is_too_long_is_a_matter_of_the_prompt(server: RunningServer) -> None:
    with pytest.raises(PromptRefusedError, match=r"answered 400: "):
        complete(server, "a" * (POSITIONS + 5))
    with pytest.raises(VersionGoneError, match=r"answered 400: .*no version .77."):
        complete(server, "one", guidance=Guidance("value@77", 0.1, 8, "qsharp"))


def test_refusals_are_one_clear_error(server: RunningServer) -> None:
    with pytest.raises(ServerError, match=r"answered 400: .*value@77|answered 400: .*77"):
        complete(server, "one", guidance=Guidance("value@77", 0.1, 8, "qsharp"))
    with pytest.raises(ServerError, match=r"answered 400"):
        complete(server, "one", guidance=Guidance("value@1", 0.1, 10_000, "qsharp"))
    with pytest.raises(ServerError, match=r"answered 4\d\d: .*nothing-there"):
        ask(server, lambda client: client.publish("value", "nothing-there"))


def test_the_only_model_is_found_and_the_versions_are_listed(server: RunningServer) -> None:
    assert ask(server, lambda client: client.model()) == server.model
    status = ask(server, lambda client: client.status())
    assert status.value_model_root == str(server.value_model_root)
    assert {"value", "graded"} <= {version.name for version in status.versions}
    assert sum(version.active for version in status.versions if version.name == "graded") == 1
