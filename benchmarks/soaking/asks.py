"""What clients ask at random: guided and unguided, well formed and not, and when they go away."""

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

from qtilt.params import DEFAULT_TAIL, TAILS
from real_server.models import ALPHABET, VOCAB
from soaking.versions import Published

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_TOP_K = 64
DEFAULTS = {
    "value_model": "value",
    "eta": 0.2,
    "top_k": 8,
    "method": "qsharp",
    "tail": DEFAULT_TAIL,
    "candidate_mass": 1.0,
}
CHARACTERS = ALPHABET[:37]
"""Letters, digits and the space: no text of them spells a special token."""
USER, ASSISTANT = len(ALPHABET) + 2, len(ALPHABET) + 3
COMMON_PREFIXES = 8
COMMON_PREFIX_TOKENS = 64
"""Two blocks of the server's prefix cache."""
CANDIDATE_MASSES = [1, 0.9, 0.3]
LONGEST_PROMPT = 120
LONGEST_ANSWER = 64
MAX_MODEL_LEN = 192


@dataclass(frozen=True)
class Ask:
    """One request. prompts: their tokens. leaves: how its client goes away before the answer is complete, if it does.

    compared: what the oracle can compare, ``logprobs`` (of all tokens, or of those sampled) or, where a truncation
    comes after guidance, ``kl`` alone.
    """

    path: str
    body: dict[str, Any]
    prompts: list[list[int]]
    compared: str = "logprobs"
    leaves: "Leaving | None" = None

    @property
    def guidance(self) -> dict[str, Any] | None:
        block: dict[str, Any] | None = self.body.get("guidance")
        return block

    @property
    def wanted(self) -> str:
        """NAME or NAME@VERSION of a guided request."""
        assert self.guidance is not None
        return str(self.guidance.get("value_model", DEFAULTS["value_model"]))

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


@dataclass(frozen=True)
class Leaving:
    """after_s: from the request on. after_chunks: of a stream. abort: reset the connection instead of closing it."""

    after_s: float | None = None
    after_chunks: int | None = None
    abort: bool = False


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused with a status of 400 to 499."""

    path: str
    content: bytes


@dataclass
class Asker:
    """Draws requests. published: which versions can be named."""

    random: random.Random
    model: str
    published: Published
    prefixes: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        same_for_all = random.Random(0)
        self.prefixes = [_letters(same_for_all, COMMON_PREFIX_TOKENS) for _ in range(COMMON_PREFIXES)]

    def ask(self) -> Ask:
        """One that is answered unless its client goes away."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": self.random.random() < 0.5,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **self._sampling(),
        }
        if self.random.random() < 0.75:
            body["guidance"] = self._guidance()
        fill = self._chat if self.random.random() < 0.4 else self._completion
        path, prompts = fill(body, self.random.choices(["all", "sampled", "none"], [2, 5, 3])[0])
        return Ask(path, body, prompts, "kl" if "top_p" in body else "logprobs", self._leaving(bool(body["stream"])))

    def exactly_checked(self, value_model: str | None) -> Ask:
        """A plain request with all log-probabilities. None: unguided."""
        body = {
            "model": self.model,
            "max_tokens": LONGEST_ANSWER,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if value_model is not None:
            body["guidance"] = {"value_model": value_model}
        path, prompts = self._completion(body, "all")
        return Ask(path, body, prompts)

    def malformed(self) -> Malformed:
        path = self.random.choice([COMPLETIONS, CHAT])
        base = {"model": self.model, "max_tokens": 5, "stream": self.random.random() < 0.5}
        base |= {"prompt": "abc"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "abc"}]}
        if self.random.random() < 0.5:
            return _malformed(path, base | {"guidance": self.random.choice(BAD_BLOCKS)})
        if self.random.random() < 0.5:
            return _malformed(path, base | self.random.choice(BAD_FIELDS))
        return self.random.choice(
            [
                Malformed(path, b'{"model": '),
                _malformed("/v1/responses", {"model": self.model, "input": "abc", "guidance": {}}),
                _malformed("/v1/guidance/value_models", {"name": "value", "path": "../reference"}),
                _malformed("/v1/guidance/value_models", {"name": "value", "path": "no-such-directory"}),
                _malformed("/v1/guidance/value_models", {"name": "value"}),
            ]
        )

    def _sampling(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"temperature": self.random.choice([0.0, 0.7, 1.0, 1.0, 1.0, 1.3])}
        if self.random.random() < 0.1:
            fields["top_p"] = 0.9
        if self.random.random() < 0.3:
            fields["seed"] = self.random.randrange(2**31)
        if self.random.random() < 0.3:
            fields["stop"] = self.random.sample(CHARACTERS, self.random.randint(1, 3))
        if self.random.random() < 0.3:
            fields["ignore_eos"] = True
        if self.random.random() < 0.2 and fields["temperature"] > 0:
            fields["n"] = self.random.randint(2, 4)
        return fields

    def _guidance(self) -> dict[str, Any]:
        block: dict[str, Any] = {}
        if self.random.random() < 0.8:
            name = self.random.choice(list(self.published.names))
            block["value_model"] = name
            if self.random.random() < 0.25:
                active = self.published[name].active
                block["value_model"] = f"{name}@{self.random.randint(max(active - 1, 1), active)}"
        if self.random.random() < 0.8:
            block["eta"] = round(math.exp(self.random.uniform(math.log(0.1), math.log(2.0))), 4)
        if self.random.random() < 0.5:
            block["top_k"] = self.random.choice([1, 2, 5, 8, 20, MAX_TOP_K])
        if self.random.random() < 0.3:
            block["method"] = self.random.choice(["qsharp", "cd"])
        if self.random.random() < 0.5:
            block["tail"] = self.random.choice(TAILS)
        if self.random.random() < 0.3:
            block["guided_tokens"] = self.random.choice([0, 1, 5, 20, 1000])
        if self.random.random() < 0.5:
            block["candidate_mass"] = self.random.choice(CANDIDATE_MASSES)
        return block

    def _completion(self, body: dict[str, Any], logprobs: str) -> tuple[str, list[list[int]]]:
        prompts = [self._prompt() for _ in range(self.random.choice([1, 1, 1, 1, 2]))]
        as_text = self.random.random() < 0.5
        given = ["".join(ALPHABET[token] for token in prompt) for prompt in prompts] if as_text else prompts
        body["prompt"] = given if len(prompts) > 1 else given[0]
        body.setdefault("max_tokens", self._answer_length())
        if logprobs != "none":
            body["logprobs"] = VOCAB if logprobs == "all" else 0
        return COMPLETIONS, prompts

    def _chat(self, body: dict[str, Any], logprobs: str) -> tuple[str, list[list[int]]]:
        parts = [self._prompt()] if self.random.random() < 0.7 else [self._prompt(25) for _ in range(3)]
        prompt, messages = [], []
        for index, part in enumerate(parts):
            role, token = ("user", USER) if index % 2 == 0 else ("assistant", ASSISTANT)
            messages.append({"role": role, "content": "".join(ALPHABET[token] for token in part)})
            prompt += [token, *part]
        body["messages"] = messages
        body["max_completion_tokens"] = self._answer_length()
        if logprobs != "none":
            body |= {"logprobs": True, "top_logprobs": VOCAB if logprobs == "all" else 0}
        return CHAT, [[*prompt, ASSISTANT]]

    def _prompt(self, longest: int = LONGEST_PROMPT) -> list[int]:
        if longest < COMMON_PREFIX_TOKENS or self.random.random() < 0.4:
            return _letters(self.random, self.random.randint(1, longest))
        suffix = _letters(self.random, self.random.randint(1, longest - COMMON_PREFIX_TOKENS))
        return [*self.random.choice(self.prefixes), *suffix]

    def _answer_length(self) -> int:
        return min(1 + int(self.random.expovariate(1 / 20)), LONGEST_ANSWER)

    def _leaving(self, streams: bool) -> Leaving | None:
        way = self.random.random()
        if way < 0.08:
            return Leaving(after_s=self.random.expovariate(2))
        if way < 0.14:
            return Leaving(after_s=self.random.expovariate(2), abort=True)
        if way < 0.26 and streams:
            return Leaving(after_chunks=self.random.randint(0, 10))
        return None


BAD_BLOCKS: list[Any] = [
    {"etta": 0.1},
    {"eta": 0},
    {"eta": True},
    {"eta": "0.1"},
    {"top_k": 0},
    {"top_k": MAX_TOP_K + 1},
    {"method": "vas"},
    {"tail": "average"},
    {"guided_tokens": -1},
    {"candidate_mass": 0},
    {"value_model": "nobody"},
    {"value_model": "value@99999"},
    {"value_model": "value@one"},
    [],
    "qsharp",
]
BAD_FIELDS: list[dict[str, Any]] = [
    {"max_tokens": -1},
    {"temperature": -1},
    {"n": 0},
    {"model": "nobody"},
    {"vllm_xargs": {"qtilt": "{}"}},
    {"guidance": {}, "use_beam_search": True},
    {"prompt": [1] * (MAX_MODEL_LEN + 1), "messages": [{"role": "user", "content": "a" * (MAX_MODEL_LEN + 1)}]},
]


def _malformed(path: str, body: dict[str, Any]) -> Malformed:
    return Malformed(path, json.dumps(body).encode())


def _letters(of: random.Random, count: int) -> list[int]:
    return [of.randrange(len(CHARACTERS)) for _ in range(count)]
