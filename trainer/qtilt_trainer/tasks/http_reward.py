"""Rewards from a server, in the form that OpenRLHF's `--remote_rm_url` made common.

POST {"query": [...], "prompts": [...], "labels": [...], "completions": [...]}  ->  {"rewards": [number, ...]}

One entry a completion. `prompts` has what was sent to the model: a text, or the chat messages. `labels` has the gold (a
list where a problem has several, an empty text where rows have none). `query` is prompt and completion as one text; of
a chat it has the messages' contents, a line each, since their template is the model server's.
"""

import asyncio
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from qtilt_trainer.tasks.problem import Problem, Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI, Omit
    from openai._types import RequestOptions

Pairs = Sequence[tuple[Problem, str]]
"""Problems and completions."""
SHOWN_CHARACTERS = 200
"""Of an answer that is no list of rewards."""


class RewardServerError(RuntimeError):
    """The server gave no reward for a completion; the message says what it did instead."""


class HttpReward(BaseModel):
    """`[task.reward]`: where the server is and how it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str
    batch_size: int = Field(32, ge=1)
    """Completions a request."""
    concurrency: int = Field(4, ge=1)
    """Requests in flight at most."""
    timeout: float = Field(30.0, gt=0)
    """Seconds one request may take."""
    retries: int = Field(5, ge=0)
    """Repetitions after a lost connection, a time-out, a 429 or a 5xx; the waits double up to 8 s, unless the server
    names one (Retry-After)."""
    api_key: SecretStr | None = None
    """Sent as `Authorization: Bearer …`; None: what the environment variable QTILT_REWARD_API_KEY says, if anything."""
    headers: dict[str, SecretStr] = {}
    """More headers; a value that begins with $ is the name of an environment variable."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value

    @field_validator("headers")
    @classmethod
    def _are_set(cls, values: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in values.items():
            variable = value.get_secret_value()
            if variable.startswith("$") and variable[1:] not in os.environ:
                raise ValueError(f"the header {name} is to be {variable}, which the environment doesn't have")
        return values

    def rewards(self, pairs: Pairs) -> list[float | Exception]:
        """One reward a (problem, completion), in order; an Exception for each of a batch that failed for good."""
        # In a thread of its own: who asks may have an event loop running.
        with ThreadPoolExecutor(1, "rewards") as thread:
            return thread.submit(asyncio.run, self._all(pairs)).result()

    async def _all(self, pairs: Pairs) -> list[float | Exception]:
        places = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:

            async def ask(batch: Pairs) -> list[float | Exception]:
                async with places:
                    return await self._batch(client, batch)

            batches = [pairs[at : at + self.batch_size] for at in range(0, len(pairs), self.batch_size)]
            answers = await asyncio.gather(*map(ask, batches))
        return list(itertools.chain.from_iterable(answers))

    async def _batch(self, client: "AsyncOpenAI", batch: Pairs) -> list[float | Exception]:
        rewards = await self._ask(client, batch, self.retries)
        return rewards if isinstance(rewards, list) else await self._in_halves(client, batch, rewards)

    async def _in_halves(self, client: "AsyncOpenAI", batch: Pairs, error: Exception) -> list[float | Exception]:
        """Of a batch that ended in `error`: one completion may be to blame, so each half is asked for, once.

        Where neither half is answered at all, the server is.
        """
        from openai import APIConnectionError, APIStatusError

        nothing: list[float | Exception] = [_failure(error)] * len(batch)
        if len(batch) == 1 or not isinstance(error, APIConnectionError | APIStatusError):
            return nothing
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        answers = [await self._ask(client, half, retries=0) for half in halves]
        if all(isinstance(answer, APIConnectionError) for answer in answers):
            return nothing
        rewards: list[float | Exception] = []
        for half, answer in zip(halves, answers, strict=True):
            rewards += answer if isinstance(answer, list) else await self._in_halves(client, half, answer)
        return rewards

    async def _ask(self, client: "AsyncOpenAI", batch: Pairs, retries: int) -> list[float | Exception] | Exception:
        """The rewards, or why there are none."""
        from openai import OpenAIError

        options = cast("RequestOptions", {"headers": self._headers(), "max_retries": retries})
        try:
            answer = await client.post(self.url, body=request_body(batch), cast_to=object, options=options)
            return rewards_in(answer, len(batch))
        except (OpenAIError, json.JSONDecodeError, RewardServerError) as error:
            return error

    def _client(self) -> "AsyncOpenAI":
        """openai's client, for its connections, time-outs and retries; the server needn't know OpenAI's API."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.url, api_key="none", timeout=self.timeout)

    def _headers(self) -> "dict[str, str | Omit]":
        from openai import Omit

        key = os.environ.get("QTILT_REWARD_API_KEY") if self.api_key is None else self.api_key.get_secret_value()
        values = {name: value.get_secret_value() for name, value in self.headers.items()}
        read = {name: os.environ[value[1:]] if value.startswith("$") else value for name, value in values.items()}
        return {"Authorization": f"Bearer {key}" if key else Omit(), **read}


def gold_of(problem: Problem) -> Any:
    """What a reward compares with: the answer, of reasoning_gym the entry's own."""
    return getattr(problem.answer, "gold", problem.answer)


def request_body(batch: Pairs) -> dict[str, list[Any]]:
    """What is sent for a batch."""
    return {
        "query": [_text(problem.prompt) + completion for problem, completion in batch],
        "prompts": [problem.prompt for problem, _ in batch],
        "labels": [gold_of(problem) for problem, _ in batch],
        "completions": [completion for _, completion in batch],
    }


def rewards_in(answer: object, count: int) -> list[Any]:
    """The rewards of an answer; whether each is a number in range is checked where all rewards are.

    Raises RewardServerError for anything but `count` of them.
    """
    if isinstance(answer, str):  # the client parses only what is labelled application/json
        with suppress(json.JSONDecodeError):
            answer = json.loads(answer)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        shown = f"{answer!r}"[:SHOWN_CHARACTERS]
        raise RewardServerError(f'the answer must be {{"rewards": [numbers]}}, got {shown}')
    if len(rewards) != count:
        raise RewardServerError(f"{len(rewards)} rewards for {count} completions")
    return rewards


def _failure(error: Exception) -> RewardServerError:
    body = str(getattr(error, "body", None) or "")[:SHOWN_CHARACTERS]
    return RewardServerError(f"the reward server: {error} {body}".rstrip())


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "".join(f"{message.get('content')}\n" for message in prompt)
