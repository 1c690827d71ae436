"""The guided server as the trainer sees it: completions with exact token ids, value-model versions. HTTP only.

Built on the official `openai` client, whose own mechanism repeats requests after lost connections, time-outs,
429 and 5xx.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import openai
from openai import AsyncOpenAI

from qtilt_trainer.config import Method, ServerConfig, Tail
from qtilt_trainer.tasks.problem import Prompt

NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0}
"""Sent with every request: vLLM otherwise takes these from the model's generation_config.json, and roll-outs would come
from a policy that no store records."""

FINISHED = ("stop", "length")
"""Why a completion ended. Any other reason (abort, error) leaves a torso whose reward says nothing."""


class ServerError(RuntimeError):
    """The server can't be reached, refuses, or isn't a guided server. The message says what to do."""


class PromptRefusedError(ServerError):
    """HTTP 400: this prompt is too long, or can't be asked for another reason of its own."""


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


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of a response."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """End token included if it was generated."""
    text: str
    finish_reason: str
    ended: bool
    """Whether the last token is the end token."""
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
            answer: Any = await self._call(self._openai.get("/models", cast_to=object))
            with self._expected_shape():
                served = [model["id"] for model in answer["data"]]
            if len(served) != 1:
                raise ServerError(f"the server has the models {served}: choose one as server.model")
            self._model = served[0]
        return self._model

    async def complete(
        self, prompt: Prompt, samples: int, seed: int, sampling: Sampling, guidance: Guidance | None
    ) -> list[Completion]:
        """`samples` completions of one prompt in one request; completion i is drawn with seed + i."""
        options: dict[str, Any] = {
            "model": await self.model(),
            "n": samples,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": {"return_token_ids": True, "top_k": sampling.top_k, **NEUTRAL},
        }
        if guidance is not None:
            options["extra_body"]["guidance"] = guidance.to_request()
        if isinstance(prompt, str):
            request = self._openai.completions.create(prompt=prompt, max_tokens=sampling.max_tokens, **options)
        else:
            messages: Any = prompt
            request = self._openai.chat.completions.create(
                messages=messages, max_completion_tokens=sampling.max_tokens, **options
            )
        return _read_completions((await self._call(request)).to_dict(), samples, guidance)

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
        """Loads the directory `path` (relative to the server's root) as the next version of `name`."""
        # Not repeated: a request whose answer was lost may have loaded a version already.
        request = self._openai.post(
            "/guidance/value_models", cast_to=object, body={"name": name, "path": path}, options={"max_retries": 0}
        )
        answer: Any = await self._call(request)
        return LoadedVersion(answer["name"], answer["version"], answer["path"], active=True)

    @contextmanager
    def _expected_shape(self) -> Iterator[None]:
        """Around code that takes an answer apart."""
        try:
            yield
        except (KeyError, TypeError) as error:
            raise ServerError(f"what answers at {self._config.url} is no qtilt-server: start one there") from error

    async def _call(self, request: Any) -> Any:
        url, tries = self._config.url, self._config.retries + 1
        try:
            return await request
        except openai.APITimeoutError as error:
            raise ServerError(
                f"{url} did not answer within {self._config.timeout:g} s, {tries} times: raise server.timeout or lower "
                "server.concurrency; what is stored is kept, the same command goes on from there"
            ) from error
        except openai.APIConnectionError as error:
            raise ServerError(
                f"no server answers at {url} ({tries} tries, {error.__cause__ or error}): start qtilt-server there; "
                "what is stored is kept, the same command goes on from there"
            ) from error
        except openai.NotFoundError as error:
            raise ServerError(
                f"{url} answered 404: is it a qtilt-server, and is server.model right? {error}"
            ) from error
        except openai.BadRequestError as error:
            # Our own fields are the same in every request: nothing a prompt can help.
            kind = ServerError if str(error.param or "").startswith("guidance") else PromptRefusedError
            raise kind(f"{url} answered 400: {_said(error)}") from error
        except openai.APIStatusError as error:
            raise ServerError(f"{url} answered {error.status_code}: {_said(error)}") from error
        except openai.APIError as error:
            raise ServerError(f"what answers at {url} is no qtilt-server ({error}): start one there") from error


def _api_key(config: ServerConfig) -> str:
    if config.api_key is not None:
        return config.api_key.get_secret_value()
    return os.environ.get("QTILT_API_KEY") or "none"


def _said(error: openai.APIStatusError) -> str:
    """What the server says is wrong, without the client's own words around it."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return str(said or error.message)


def _read_completions(response: dict[str, Any], samples: int, guidance: Guidance | None) -> list[Completion]:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    if len(choices) != samples:
        raise ServerError(f"the server answered {len(choices)} completions instead of {samples}")
    return [_read_choice(response, choice, guidance) for choice in choices]


def _read_choice(response: dict[str, Any], choice: dict[str, Any], guidance: Guidance | None) -> Completion:
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
        raise ServerError(
            f"the server broke a completion off ({choice['finish_reason']!r}); what is stored is kept, the same "
            "command goes on from there"
        )
    message = choice.get("message")
    return Completion(
        prompt_token_ids=prompt_token_ids,
        token_ids=token_ids,
        text=(message.get("content") or "") if message is not None else choice["text"],
        finish_reason=choice["finish_reason"],
        # vLLM: stopped, and not by a stop string, means by an end token (a number when it is not the first of several).
        ended=choice["finish_reason"] == "stop" and not isinstance(choice.get("stop_reason"), str),
        value_model=applied.get("value_model"),
        top_k=applied.get("top_k"),
        tail=applied.get("tail"),
        guided_tokens=done.get("guided_tokens", 0),
        kl=done.get("kl", 0.0),
        kl_candidates=done.get("kl_candidates", 0.0),
        mass=done.get("mass"),
    )
