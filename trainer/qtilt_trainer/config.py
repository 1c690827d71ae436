"""The one TOML file a loop runs from: a frozen, self-checking model for each of its tables.

Knows nothing of tasks' own settings: `[task]` is handed to `make_task` as it is.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from qtilt.params import MIN_ETA
from qtilt_trainer.describe import describe_errors

Method = Literal["qsharp", "cd"]
Decoding = Literal["sample", "greedy"]
Precision = Literal["auto", "float32", "bfloat16"]
Tail = Literal["floor", "mean"]


class Table(BaseModel):
    """What all tables share: they don't change, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T", bound=Table)


class TaskConfig(BaseModel):
    """`[task]`: `name` and whatever that task takes; `tasks.make_task` checks the rest."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str


class ServerConfig(Table):
    """`[server]`: where the guided server is and how it is asked."""

    url: str = "http://127.0.0.1:8000"
    """Without /v1."""
    model: str | None = None
    """Server model id; None: the only one it serves."""
    api_key: SecretStr | None = None
    """None: what the environment variable QTILT_API_KEY says, if anything."""
    concurrency: int = Field(default=64, ge=1, le=1000)
    """Requests in flight at most; the openai client has 1000 connections."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds one request may take."""
    retries: int = Field(default=6, ge=0)
    """Repetitions after a lost connection, a timeout, a 429 or a 5xx; the waits double up to 8 s."""
    wait: float = Field(default=600.0, ge=0.0)
    """Seconds a loop waits for a server that is restarted or busy."""
    value_model_root: Path | None = None
    """The server's --value-model-root as this machine sees it; None: as the server does."""

    @field_validator("url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        parts = urlsplit(value)
        if not parts.hostname:
            raise ValueError("must name a host")
        _ = parts.port  # Raises ValueError when it is none.
        return value.rstrip("/").removesuffix("/v1")


class ValueModelConfig(Table):
    """`[value_model]`: what is fitted, and the name it is served under."""

    backbone: str
    """Directory or hub id of the pre-trained model the value model starts from, the reference itself for one."""
    layers: int | None = Field(default=None, ge=1)
    """How many of its first decoder layers are taken; None: all."""
    low_rank: int | None = Field(default=None, ge=1)
    """Rank of the update of these layers' projections that is fitted; None: all weights are."""
    adapter: str | None = Field(default=None, min_length=1)
    """The LoRA adapter that `[server] model` names, where it names one; None: the reference itself is steered."""
    name: str = Field(default="value", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    type: Literal["q", "v"] = "v"
    distribution: Literal["bernoulli", "categorical"] = "bernoulli"
    atoms: int = Field(default=11, ge=2)
    """Categorical only: evenly spaced from low to high."""
    low: float = 0.0
    high: float = 1.0
    head_std: float = Field(default=0.0, ge=0.0)
    """Standard deviation of the head's initial weights; 0: every value starts equal."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "ValueModelConfig":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.distribution == "bernoulli" and (self.low, self.high) != (0.0, 1.0):
            raise ValueError("a bernoulli value is for rewards 0 and 1: use categorical for other low and high")
        return self


class SamplingConfig(Table):
    """`[sampling]`: the reference policy, for roll-outs and for sampled evaluation alike.

    system, few_shot, prefill and chat_template_kwargs are for tasks whose prompts are chat messages.
    """

    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """0: no truncation."""
    max_tokens: int = Field(ge=1)
    min_tokens: int = Field(default=0, ge=0)
    """No end before so many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    system: str | None = None
    """System prompt before the prompt's own messages."""
    few_shot: tuple[dict[str, str], ...] = ()
    """Examples before the prompt: {user, assistant} pairs, or {role, content} messages."""
    prefill: str = ""
    """How every answer begins. What is graded is this and what was generated."""
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("few_shot")
    @classmethod
    def _are_examples(cls, examples: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        if not all(example.keys() in ({"user", "assistant"}, {"role", "content"}) for example in examples):
            raise ValueError("every entry must be {user, assistant} or {role, content}")
        return examples

    @field_validator("stop")
    @classmethod
    def _are_texts(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(texts):
            raise ValueError("an empty text stops everything")
        return texts

    @model_validator(mode="after")
    def _is_possible(self) -> "SamplingConfig":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}")
        return self


class CollectConfig(Table):
    """`[collect]`: how many roll-outs an iteration adds and how its guided part is guided."""

    prompts: int = Field(ge=1)
    samples_per_prompt: int = Field(ge=1)
    eta: float = Field(default=0.1, ge=MIN_ETA)
    """KL weight of the guided roll-in: smaller is a stronger tilt."""
    guidance_top_k: int = Field(default=20, ge=1)
    method: Method = "qsharp"
    tail: Tail | None = None
    """What tokens that are no candidates get in a roll-in; None: the server's default."""
    seed: int = 0
    max_refused_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """The loop stops when the server refuses more of the prompts."""


class RewardConfig(Table):
    """`[reward]`: what becomes of completions that were cut, or that the task can't grade."""

    truncated: Literal["zero", "grade", "drop"] = "zero"
    """A completion cut by max_tokens has the task's lowest reward, is graded like any other, or leaves no label. In
    evaluation `drop` is `zero`."""
    max_failed_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """The loop stops when more of the completions can't be graded."""
    timeout: float = Field(default=300.0, gt=0.0)
    """Seconds one call of a reward in Python may take; then its completion can't be graded."""


class FitConfig(Table):
    """`[fit]`: supervised training of the return distribution on all roll-outs so far."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; give either steps or epochs."""
    epochs: float | None = Field(default=None, gt=0.0)
    batch_size: int = Field(default=64, ge=1)
    """Sequences a step."""
    learning_rate: float = Field(default=2e-5, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Fraction of the prompts that is measured, not trained on."""
    drop_unanimous: bool = True
    """Leave prompts out whose rewards all agree, as the paper does."""
    seed: int = 0
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None: its own choice."""
    precision: Precision = "auto"
    """Of the backbone's products; auto: bfloat16 where that is faster (precision.py). Head and loss are in float32."""

    @model_validator(mode="after")
    def _has_one_length(self) -> "FitConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class SamplingOverride(Table):
    """An entry of `evaluate.sampling`: what differs from `[sampling]`."""

    temperature: float | None = Field(default=None, gt=0.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | Literal["guidance"] | None = None
    """0: no truncation; "guidance": guidance_top_k, which is how far guidance itself may truncate."""

    @field_validator("top_k", mode="before")
    @classmethod
    def _is_count_or_guidance(cls, value: Any) -> Any:
        # Checked here for one plain message; pydantic has one for each member of the union.
        if value is None or value == "guidance" or (type(value) is int and value >= 0):
            return value
        raise ValueError('must be a whole number >= 0 or "guidance"')


class EvaluateConfig(Table):
    """`[evaluate]`: the grid of guided policies that is measured on test prompts, next to the reference."""

    prompts: int = Field(ge=1)
    samples: int = Field(default=1, ge=1)
    """Completions a prompt in sampled cells; greedy cells have one."""
    k: int | None = Field(default=None, ge=1)
    """k of pass@k and maj1@k; None: samples."""
    inv_eta: tuple[float, ...] = (1.0, 5.0, 10.0, 40.0)
    """1/eta, larger is a stronger tilt."""
    methods: tuple[Method, ...] = ("qsharp", "cd")
    tails: tuple[Tail | None, ...] = Field((None,), min_length=1)
    """What tokens get that aren't candidates; None: the server's default."""
    decoding: tuple[Decoding, ...] = Field(("sample", "greedy"), min_length=1)
    sampling: tuple[SamplingOverride, ...] = Field(
        (SamplingOverride(), SamplingOverride(top_k="guidance")), min_length=1
    )
    """How sampled cells draw: one regime an entry. Every policy is measured in each of them."""
    guidance_top_k: int = Field(default=20, ge=1)
    constant_candidates: int = Field(default=50, ge=0)
    """Texts that are tried as the answer to every prompt; 0: no best constant answer is looked for."""
    seed: int = 0

    @field_validator("inv_eta")
    @classmethod
    def _is_positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(value > 0 and 1 / value >= MIN_ETA for value in values):
            raise ValueError(f"every 1/eta must be above 0 and at most {1 / MIN_ETA:g}")
        return values

    @field_validator("inv_eta", "methods", "tails", "decoding", "sampling")
    @classmethod
    def _is_distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("an entry is repeated")
        return values

    @model_validator(mode="after")
    def _has_enough_samples(self) -> "EvaluateConfig":
        if self.k is not None and self.k > self.samples:
            raise ValueError(f"k must be at most samples = {self.samples}, got {self.k}")
        return self


class IterationConfig(Table):
    """One `[[iterations]]` entry: fields of `[collect]` and `[fit]` that differ in this iteration."""

    collect: dict[str, Any] = {}
    fit: dict[str, Any] = {}


class LoopConfig(Table):
    """The whole file."""

    run_dir: Path
    """Everything the loop writes is below it."""
    task: TaskConfig
    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    value_model: ValueModelConfig
    sampling: SamplingConfig
    collect: CollectConfig
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    fit: FitConfig
    evaluate: EvaluateConfig | None = None
    """None: the loop ends with the last publication."""
    iterations: tuple[IterationConfig, ...] = Field((IterationConfig(), IterationConfig()), min_length=1)
    """How many iterations, and what differs in each; a number n means n equal ones."""

    @field_validator("iterations", mode="before")
    @classmethod
    def _count_to_list(cls, value: Any) -> Any:
        return [{}] * value if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _iterations_are_valid(self) -> "LoopConfig":
        for number in range(1, len(self.iterations) + 1):
            self.collect_of(number)
            self.fit_of(number)
        return self

    def collect_of(self, iteration: int) -> CollectConfig:
        """`[collect]` with what iteration `iteration` (from 1) says differently."""
        fields = {**self.collect.model_dump(), **self._iteration(iteration).collect}
        return checked(CollectConfig, fields, f"iterations.{iteration}.collect")

    def fit_of(self, iteration: int) -> FitConfig:
        """`[fit]` with what iteration `iteration` (from 1) says differently."""
        overrides = dict(self._iteration(iteration).fit)
        # steps and epochs exclude each other: naming one takes the place of the other.
        if ("steps" in overrides) != ("epochs" in overrides):
            overrides = {"steps": None, "epochs": None, **overrides}
        return checked(FitConfig, {**self.fit.model_dump(), **overrides}, f"iterations.{iteration}.fit")

    def _iteration(self, iteration: int) -> IterationConfig:
        if not 1 <= iteration <= len(self.iterations):
            raise ValueError(f"iteration must be 1 to {len(self.iterations)}, got {iteration}")
        return self.iterations[iteration - 1]


def checked(table: type[T], fields: dict[str, Any], where: str) -> T:
    """One table from its fields. Raises ValueError that names `where` and the field."""
    try:
        return table(**fields)
    except ValidationError as error:
        raise ValueError(describe_errors(error, where)) from error


def read_config(file: Path, overrides: dict[str, Any] | None = None) -> LoopConfig:
    """The checked configuration in a TOML file.

    `overrides` replaces single fields, by `table.field` or top-level name, where its value isn't None.
    Raises ValueError that names the file and the field.
    """
    tables = _read_tables(file)
    for name, value in (overrides or {}).items():
        if value is not None:
            _replace(tables, name, value)
    try:
        return LoopConfig.model_validate(tables)
    except ValidationError as error:
        raise ValueError(f"{file}: {describe_errors(error)}") from error


def _read_tables(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ValueError(f"can't read the configuration {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML: {error}") from error


def _replace(tables: dict[str, Any], name: str, value: Any) -> None:
    *parents, field = name.split(".")
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            return  # Not a table: the check of the whole file says so.
    table[field] = value
