"""An answer as a client got it, whole or in chunks, and what can be said against it without computing anything."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from real_server.models import ALPHABET, TOKENS
from soaking.asks import DEFAULTS, Ask
from soaking.versions import Published

HTTP_OK, HTTP_BAD_REQUEST = 200, 400
END = len(ALPHABET)


@dataclass
class Choice:
    """all_logprobs: per generated token those of all tokens by id, where they were asked for."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    all_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    guidance: dict[str, Any] | None = None

    def add(self, part: dict[str, Any]) -> None:
        """A choice of a whole answer, or of a chunk."""
        self.token_ids += part.get("token_ids") or []
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        self.guidance = part.get("guidance", self.guidance)
        logprobs = part.get("logprobs") or {}
        if "token_logprobs" in logprobs:
            self.logprobs += logprobs["token_logprobs"]
            self.all_logprobs += [_by_id(top.items()) for top in logprobs["top_logprobs"] if len(top) > 1]
        for entry in logprobs.get("content") or []:
            self.logprobs.append(entry["logprob"])
            if entry["top_logprobs"]:
                self.all_logprobs.append(_by_id((top["token"], top["logprob"]) for top in entry["top_logprobs"]))


@dataclass
class Answer:
    """sent, ended: when the request went out and the answer was complete. is_complete: a stream ended with [DONE]."""

    ask: Ask
    sent: float
    ended: float = math.inf
    status: int = 0
    error: str | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    applied: dict[str, Any] | None = None
    is_complete: bool = False

    def read(self, content: str | bytes) -> None:
        """A whole answer, or a chunk of one, as it came; one that is not as the HTTP API says is the answer's error."""
        try:
            self.add(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.error = f"unreadable, {error!r}: {content[:300]!r}"

    def add(self, body: dict[str, Any]) -> None:
        """A whole answer, or a chunk of one."""
        if "error" in body:
            self.error = str(body["error"].get("message"))
            return
        self.applied = body.get("guidance", self.applied)
        for part in body["choices"]:
            self.choices.setdefault(part["index"], Choice()).add(part)

    def prompt_of(self, index: int) -> list[int]:
        """Choices are numbered prompt by prompt."""
        return self.ask.prompts[index // self.ask.n]


def json_object(content: str | bytes) -> dict[str, Any]:
    """The body of a response; empty where it is no JSON object."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def names_a_version_that_left(answer: Answer, published: Published) -> bool:
    """Whether a 400 is in order because the version asked for by number may have been unloaded by then."""
    if answer.status != HTTP_BAD_REQUEST or answer.ask.guidance is None:
        return False
    name, at, number = answer.ask.wanted.partition("@")
    is_said = answer.error is not None and "guidance.value_model" in answer.error
    return bool(at) and is_said and published[name].may_be_gone(int(number), answer.ended)


def complaints(answer: Answer, published: Published) -> list[str]:
    """What is wrong with an answer whose client waited for it."""
    ask = answer.ask
    if answer.status != HTTP_OK or answer.error is not None:
        return [f"status {answer.status}: {answer.error}"]
    found = []
    if not answer.is_complete:
        found.append("the stream ended without [DONE]")
    if sorted(answer.choices) != list(range(ask.n * len(ask.prompts))):
        found.append(f"choices {sorted(answer.choices)} for {len(ask.prompts)} prompt(s) with n = {ask.n}")
    for index, choice in sorted(answer.choices.items()):
        found += [f"choice {index}: {complaint}" for complaint in _about_choice(ask, choice)]
    return found + (_about_guidance(answer, published) if ask.guidance is not None else _about_none(answer))


def _about_choice(ask: Ask, choice: Choice) -> list[str]:
    count, found = len(choice.token_ids), []
    if choice.finish_reason not in ("stop", "length"):
        found.append(f"finish_reason {choice.finish_reason}")
    if (choice.finish_reason == "length" and count != ask.max_tokens) or not 0 < count <= ask.max_tokens:
        found.append(f"{count} tokens of {ask.max_tokens}, finish_reason {choice.finish_reason}")
    if "logprobs" in ask.body and len(choice.logprobs) != count:
        found.append(f"{len(choice.logprobs)} log-probabilities for {count} tokens")
    if len(choice.all_logprobs) not in (0, count):
        found.append(f"{len(choice.all_logprobs)} times the log-probabilities of all tokens for {count} tokens")
    if END in choice.token_ids[:-1] and not ask.body.get("ignore_eos"):
        found.append("tokens after the end token")
    return found


def _about_guidance(answer: Answer, published: Published) -> list[str]:
    ask, applied = answer.ask, answer.applied
    assert ask.guidance is not None
    if applied is None:
        return ["a guided request was answered without guidance"]
    found = []
    asked = DEFAULTS | ask.guidance
    asked["top_k"] = min(asked["top_k"], TOKENS)
    found += [
        f"{key} is {applied.get(key)}, asked for {asked[key]}"
        for key in ("eta", "top_k", "method", "tail", "candidate_mass")
        if applied.get(key) != asked[key]
    ]
    found += _about_version(ask.wanted, str(applied.get("value_model")), answer, published)
    limit = ask.guidance.get("guided_tokens", math.inf)
    for index, choice in sorted(answer.choices.items()):
        guidance = choice.guidance or {}
        guided_tokens = min(len(choice.token_ids), limit)
        if guidance.get("guided_tokens") != guided_tokens:
            found.append(f"choice {index}: {guidance} for {len(choice.token_ids)} tokens")
        if not -1e-4 < _figure(guidance, "kl") < math.inf:
            found.append(f"choice {index}: its KL is {guidance.get('kl')}")
        fewest, most = _candidates(asked) if guided_tokens else (0, 0)
        if not fewest <= _figure(guidance, "candidates") <= most:
            found.append(f"choice {index}: {guidance.get('candidates')} candidates, expected {fewest} to {most}")
    return found


def _figure(guidance: dict[str, Any], key: str) -> float:
    """NaN where there is no number."""
    figure = guidance.get(key)
    return figure if isinstance(figure, (int, float)) else math.nan


def _candidates(asked: dict[str, Any]) -> tuple[int, int]:
    """How many a guided step scores at least and at most: of a single one, with the tail mean, none."""
    fewest, most = asked["top_k"] if asked["candidate_mass"] == 1 else 1, asked["top_k"]
    if asked["tail"] == "mean":
        fewest, most = (0 if count == 1 else count for count in (fewest, most))
    return fewest, most


def _about_version(wanted: str, said: str, answer: Answer, published: Published) -> list[str]:
    name, _, number = said.partition("@")
    if "@" in wanted:
        return [] if said == wanted else [f"{said} answered a request for {wanted}"]
    if name != wanted:
        return [f"{said} answered a request for {wanted}"]
    if not number.isdecimal() or not published[name].was_active(int(number), answer.sent, answer.ended):
        return [f"{said} wasn't active at any time of the request"]
    return []


def _about_none(answer: Answer) -> list[str]:
    if answer.applied is not None or any(choice.guidance is not None for choice in answer.choices.values()):
        return ["an unguided request was answered with guidance"]
    return []


def _by_id(tokens: Any) -> dict[int, float]:
    return {int(token.removeprefix("token_id:")): logprob for token, logprob in tokens}
