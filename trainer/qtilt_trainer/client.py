"""The guided server as the trainer sees it: completions with exact token ids, value-model versions. HTTP only.

Built on the official `openai` client, whose own mechanism repeats requests after lost connections, time-outs,
429 and 5xx.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import openai
from openai import AsyncOpenAI

from qtilt_trainer.config import Method, ServerConfig, Tail
from qtilt_trainer.prompts import Framing
from qtilt_trainer.redaction import without_url_secrets
from qtilt_trainer.server_errors import (
    GOES_ON,
    PromptRefusedError,
    ServerAwayError,
    ServerBusyError,
    ServerError,
    server_error,
)
from qtilt_trainer.tasks.problem import Prompt

NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL_EXTRA = {"min_p": 0.0, "repetition_penalty": 1.0}
"""Sent with every request, beside temperature, top_p, top_k and max_tokens: all that vLLM otherwise takes from the
model's generation_config.json, so that roll-outs come from the policy that the store records. EXTRA: not OpenAI's."""

HEALTH_SECONDS = 5.0
BUSY_SECONDS = 2.0

FINISHED = ("stop", "length")
"""Why a completion ended. Any other reason (abort, error) leaves a torso whose reward says nothing."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """The `guidance` of a request, all of it explicit."""

    value_model: str
    """NAME@VERSION: a version published meanwhile must not change what is being collected."""
    eta: float
    top_k: int
    method: Method
    guided_tokens: int | None = None
    """None: to the end."""
    tail: Tail | None = None
    """What tokens that are no candidates get; None: not sent, the server's default."""

    def to_request(self) -> dict[str, Any]:
        """The block of a request."""
        block = asdict(self)
        return block if self.tail is not None else {name: value for name, value in block.items() if name != "tail"}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; `top_k` 0 is no truncation, `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    framing: Framing = field(default_factory=Framing)
    """What stands around the prompt."""

    def to_request(self) -> dict[str, Any]:
        """Fields of a request, all of them explicit; those that OpenAI doesn't know as `extra_body`."""
        extra: dict[str, Any] = {"top_k": self.top_k, "min_tokens": self.min_tokens, **NEUTRAL_EXTRA}
        if self.stop_token_ids:
            extra["stop_token_ids"] = list(self.stop_token_ids)
        stop = {"stop": list(self.stop)} if self.stop else {}
        return {"temperature": self.temperature, "top_p": self.top_p, **NEUTRAL, **stop, "extra_body": extra}


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of a response."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """End token included if it was generated."""
    text: str
    """The whole answer: prefill and what was generated."""
    finish_reason: str
    ended: bool
    """Whether nothing can follow: the last token is an end token, or the one that completed a stop string."""
    value_model: str | None
    """NAME@VERSION that guided; None without guidance."""
    top_k: int | None
    """Candidates scored a step, as the server clamped them."""
    tail: str | None
    guided_tokens: int
    kl: float
    kl_candidates: float
    mass: float | None
    """Of the reference in the candidates, mean over guided steps."""


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A value-model version the server holds."""

    name: str
    version: int
    path: str
    active: bool


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What `GET /v1/guidance` told."""

    versions: list[LoadedVersion]
    value_model_root: str | None


class GuidedClient:
    """An asynchronous context manager; all methods raise ServerError."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._model = config.model
        self._openai = AsyncOpenAI(
            base_url=f"{config.url}/v1",
            api_key=_api_key(config),
            max_retries=config.retries,
            timeout=config.timeout,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def model(self) -> str:
        """The id of the model that is asked: the configured one, or the only one the server has."""
        if self._model is None:
            # One that a value model guides isn't the policy that roll-outs are of.
            served = [model["id"] for model in await self._served() if model.get("owned_by") != "qtilt"]
            if len(served) != 1:
                raise ServerError(f"the server has the models {served}: choose one as server.model")
            self._model = served[0]
        return self._model

    async def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        name = await self.model()
        served = {model["id"]: model for model in await self._served()}
        card = served.get(name, {})
        # A LoRA adapter's card has none, and names the model it is of.
        length = card.get("max_model_len") or served.get(card.get("parent"), {}).get("max_model_len")
        if not isinstance(length, int):
            raise ServerError(f"the server has no model {name!r} with a max_model_len, only {sorted(served)}")
        return length

    async def prompt_length(self, prompt: Prompt, framing: Framing) -> int:
        """Tokens of a prompt as it is sent. Raises PromptRefusedError when it can't be tokenised."""
        framed = framing.framed(prompt)
        body: dict[str, Any] = {"model": await self.model()}
        body |= {"prompt": framed} if isinstance(framed, str) else {"messages": framed, **framing.chat_options()}
        answer: Any = await self._call(self._openai.post(f"{self._config.url}/tokenize", cast_to=object, body=body))
        with self._expected_shape():
            return int(answer["count"])

    async def is_healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        options: Any = {"max_retries": 0, "timeout": HEALTH_SECONDS}
        try:
            await self._openai.get(f"{self._config.url}/health", cast_to=object, options=options)
        except openai.APIError:
            return False
        return True

    async def complete(
        self, prompt: Prompt, samples: int, seed: int, sampling: Sampling, guidance: Guidance | None
    ) -> list[Completion]:
        """`samples` completions of one prompt in one request; completion i is drawn with seed + i."""
        options: dict[str, Any] = {"model": await self.model(), "n": samples, "seed": seed, **sampling.to_request()}
        options["extra_body"]["return_token_ids"] = True
        if guidance is not None:
            options["extra_body"]["guidance"] = guidance.to_request()
        framed: Any = sampling.framing.framed(prompt)
        if isinstance(framed, str):
            request = self._openai.completions.create(prompt=framed, max_tokens=sampling.max_tokens, **options)
        else:
            options["extra_body"] |= sampling.framing.chat_options()
            request = self._openai.chat.completions.create(
                messages=framed, max_completion_tokens=sampling.max_tokens, **options
            )
        response = (await self._call(request)).to_dict()
        return _read_completions(response, samples, guidance, sampling.framing.prefill)

    async def status(self) -> ServerStatus:
        """What is loaded."""
        answer: Any = await self._call(self._openai.get("/guidance", cast_to=object))
        with self._expected_shape():
            versions = [
                LoadedVersion(model["name"], version["version"], version["path"], version["version"] == model["active"])
                for model in answer["value_models"]
                for version in model["versions"]
            ]
            return ServerStatus(versions, answer["value_model_root"])

    async def publish(self, name: str, path: str) -> LoadedVersion:
        """Loads the directory `path` (relative to the server's root) as the next version of `name`.

        While the server is busy with an older version (HTTP 409) it is asked again, for `server.wait` seconds.
        """
        give_up = time.monotonic() + self._config.wait
        while True:
            try:
                # Not repeated otherwise: a request whose answer was lost may have loaded a version already.
                request = self._openai.post(
                    "/guidance/value_models",
                    cast_to=object,
                    body={"name": name, "path": path},
                    options={"max_retries": 0},
                )
                answer: Any = await self._call(request)
                return LoadedVersion(answer["name"], answer["version"], answer["path"], active=True)
            except ServerBusyError:
                if time.monotonic() >= give_up:
                    raise
                await asyncio.sleep(BUSY_SECONDS)

    async def _served(self) -> list[dict[str, Any]]:
        answer: Any = await self._call(self._openai.get("/models", cast_to=object))
        with self._expected_shape():
            return [{"id": model["id"], **model} for model in answer["data"]]

    @contextmanager
    def _expected_shape(self) -> Iterator[None]:
        """Around code that takes an answer apart."""
        try:
            yield
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"what answers at {without_url_secrets(self._config.url)} is no qtilt-server: start one there"
            ) from error

    async def _call(self, request: Any) -> Any:
        try:
            return await request
        except openai.APIError as error:
            raise server_error(error, self._config) from error
        except UnicodeEncodeError as error:
            raise PromptRefusedError(f"the prompt has half a character, which can't be sent ({error})") from error


def _api_key(config: ServerConfig) -> str:
    if config.api_key is not None:
        return config.api_key.get_secret_value()
    return os.environ.get("QTILT_API_KEY") or "none"


def _read_completions(
    response: dict[str, Any], samples: int, guidance: Guidance | None, prefill: str
) -> list[Completion]:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    if len(choices) != samples:
        raise ServerError(f"the server answered {len(choices)} completions instead of {samples}")
    return [_read_choice(response, choice, guidance, prefill) for choice in choices]


def _read_choice(
    response: dict[str, Any], choice: dict[str, Any], guidance: Guidance | None, prefill: str
) -> Completion:
    applied, done = response.get("guidance") or {}, choice.get("guidance") or {}
    if guidance is not None and not (applied and done):
        raise ServerError("the server ignored `guidance`: it is no qtilt-server")
    if guidance is not None and not {"kl", "kl_candidates", "mass"} <= done.keys():
        raise ServerError("the server reports no kl_candidates and mass: it is an older qtilt-server")
    token_ids = choice.get("token_ids")
    prompt_token_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
    if token_ids is None or not prompt_token_ids:
        raise ServerError("the server sent no token ids: it is no qtilt-server, or too old a vLLM")
    if choice["finish_reason"] not in FINISHED:
        raise ServerAwayError(f"the server broke a completion off ({choice['finish_reason']!r}); {GOES_ON}")
    message = choice.get("message")
    return Completion(
        prompt_token_ids=prompt_token_ids,
        token_ids=token_ids,
        text=prefill + ((message.get("content") or "") if message is not None else choice["text"]),
        finish_reason=choice["finish_reason"],
        ended=choice["finish_reason"] == "stop",
        value_model=applied.get("value_model"),
        top_k=applied.get("top_k"),
        tail=applied.get("tail"),
        guided_tokens=done.get("guided_tokens", 0),
        kl=done.get("kl", 0.0),
        kl_candidates=done.get("kl_candidates", 0.0),
        mass=done.get("mass"),
    )
