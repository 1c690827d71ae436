"""The JSON that goes over HTTP: the guidance block of a request, what responses say, the value-model routes.

Requests are strict: no unknown key, no conversion of types (a bool is not a number), every range checked.
A test freezes these models' JSON schema: they are the public surface.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qtilt.params import MIN_ETA

MAX_SCORED = 128
MAX_BEST_OF = 64
MAX_GUIDED_TOKENS = 2**31 - 1
VALUE_MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class StrictModel(BaseModel):
    """Neither unknown keys nor converted types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GuidanceRequest(StrictModel):
    """The ``guidance`` of a completion request; null or absent fields take the server's defaults."""

    value_model: str | None = Field(
        default=None,
        description="NAME (its active version), NAME@VERSION or NAME@sha256:…; default: the first value model named",
    )
    eta: Annotated[float, Field(ge=MIN_ETA, allow_inf_nan=False)] | None = Field(
        default=None, description="KL weight η of the paper; a larger η is a weaker tilt"
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="how many of the reference's likeliest tokens are scored each step, at most"
    )
    method: Literal["qsharp", "cd"] | None = Field(
        default=None, description="qsharp adds ln E[exp(Z/η)], cd adds E[Z]/η"
    )
    tail: Literal["floor", "mean"] | None = Field(
        default=None,
        description="what tokens that aren't candidates get: floor the lowest possible return's offset, mean the "
        "reference-weighted mean of the candidates, so that they keep the reference's probability",
    )
    guided_tokens: Annotated[int, Field(ge=0, le=MAX_GUIDED_TOKENS)] | None = Field(
        default=None, description="guide only the first so many generated tokens; null guides all, 0 none"
    )
    candidate_mass: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="how much of the reference's mass is enough: once the likeliest tokens hold it, no others are "
        "scored; 1, the default, scores top_k",
    )
    kl_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="nats that a choice's KL(guided ‖ reference) adds up to at most: where a step would exceed it, its "
        "offsets are scaled down; null bounds nothing",
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = Field(
        default=None,
        description="sample so many choices of each prompt, and answer with the n of them whose final value is "
        "largest, the best first; not in a stream",
    )
    details: bool | None = Field(
        default=None, description="say of each token what the reference, the values and the tilt were; default: false"
    )


class AppliedGuidance(StrictModel):
    """``guidance`` of a response: what was done, with every default filled in."""

    value_model: str = Field(description="NAME@VERSION")
    eta: float
    top_k: int
    method: Literal["qsharp", "cd"]
    tail: Literal["floor", "mean"]
    candidate_mass: float
    kl_budget: float | None


class ChoiceGuidance(StrictModel):
    """``choices[i].guidance``: over the returned tokens of this choice."""

    guided_tokens: int = Field(description="how many of the returned tokens were drawn from the guided distribution")
    kl: float = Field(description="their summed full-vocabulary KL(guided ‖ reference) in nats")
    kl_candidates: float = Field(
        description="their summed KL(guided ‖ reference), in nats, given that the token is one of the candidates"
    )
    mass: float | None = Field(
        description="the reference's mass in these candidates, in the mean; null without any token"
    )
    candidates: float = Field(description="how many candidates were scored for one of them in the mean; 0 without any")


class CandidateDetails(StrictModel):
    """The candidates of a step, likeliest by the reference first: lists of one length."""

    token_ids: list[int]
    tokens: list[str] = Field(description="their texts")
    reference_logprobs: list[float]
    guided_logprobs: list[float]
    values: list[float | None] = Field(description="E[Z], of the return after each; null where it wasn't scored")


class TokenDetails(StrictModel):
    """Of one returned token, at the request's temperature and before truncation; before penalties on model runner V1,
    after them on V2. All but the token is null where it wasn't drawn from the guided distribution.
    """

    token_id: int
    token: str = Field(description="its text")
    reference_logprob: float | None = Field(description="ln of its probability by the reference; -9999 for 0")
    guided_logprob: float | None = Field(description="ln of its probability by the guided distribution; -9999 for 0")
    value: float | None = Field(description="E[Z], of the return after it; null where it wasn't scored")
    offset: float | None = Field(
        description="Q/η in nats less that of the most valuable candidate; of a token without a score the tail's"
    )
    kl: float | None = Field(description="full-vocabulary KL(guided ‖ reference) of the step in nats")
    entropy: float | None = Field(
        description="of the guided distribution, in nats, given that the token is one of the candidates"
    )
    candidates: CandidateDetails | None


class DetailedGuidance(ChoiceGuidance):
    """``choices[i].guidance`` where ``details`` were asked for. In a stream any chunk may have the details, and nothing
    else, of the tokens since the last one that had.
    """

    details: list[TokenDetails] = Field(description="one for each returned token")


class RankedGuidance(ChoiceGuidance):
    """``choices[i].guidance`` where ``best_of`` was asked for."""

    value: float | None = Field(description="E[Z] after the last of its tokens that is scored; null without one")


class TotalGuidance(StrictModel):
    """Of ``usage.completion_tokens_details``: what was done to all choices together. Numbers: clients add them up."""

    guided_tokens: int = Field(description="the sum of the choices'")
    guidance_kl: float = Field(description="the sum of the choices' kl, in nats")
    guidance_kl_candidates: float = Field(description="the sum of the choices' kl_candidates, in nats")


class ScoreRequest(StrictModel):
    """Body of ``POST /v1/guidance/score``: completions of one prompt, which is ``prompt`` or ``messages``."""

    value_model: str | None = Field(default=None, description="as in a guidance block")
    prompt: str | list[int] | None = Field(default=None, description="text, or token ids")
    messages: list[dict[str, Any]] | None = Field(default=None, description="a chat whose next answer is completed")
    completions: Annotated[list[str | list[int]], Field(min_length=1, max_length=MAX_SCORED)] = Field(
        description="texts, or token ids; each after the prompt"
    )
    distributions: bool = Field(default=False, description="whether each token's distribution is answered, too")

    @model_validator(mode="after")
    def _check_there_is_one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt and messages: exactly one of them must be given")
        return self


class ScoredCompletion(StrictModel):
    """What the value model says of the return after each token of a completion; null of one that it never scores."""

    index: int
    token_ids: list[int]
    values: list[float | None] = Field(description="E[Z] after each token")
    distributions: list[list[float] | None] | None = Field(description="P(Z = z) after each, if they are asked for")
    value: float | None = Field(description="E[Z] after the last")
    distribution: list[float] | None = Field(description="P(Z = z) after the last")


class ScoreUsage(StrictModel):
    """Tokens that were read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completions: int) -> Self:
        """completions: of all together."""
        return cls(prompt_tokens=prompt, completion_tokens=completions, total_tokens=prompt + completions)


class ScoreResponse(StrictModel):
    """Answer of ``POST /v1/guidance/score``."""

    value_model: str = Field(description="NAME@VERSION")
    support: list[float] = Field(description="the returns z that there may be, ascending")
    choices: list[ScoredCompletion]
    usage: ScoreUsage


class PublishRequest(StrictModel):
    """Body of ``POST /v1/guidance/value_models``."""

    name: Annotated[str, Field(pattern=VALUE_MODEL_NAME)]
    path: Annotated[str, Field(min_length=1)] = Field(description="a directory, relative to --value-model-root")


class Readiness(StrictModel):
    """Answer of ``GET /v1/guidance/ready``, HTTP 200 if ready and 503 if not."""

    ready: bool = Field(description="the engine runs, and a guided request that names no value model has one")
    active: list[str] = Field(description="NAME@VERSION of what each name means")


class ActivateRequest(StrictModel):
    """Body of ``POST /v1/guidance/value_models/NAME/activate``."""

    version: Annotated[int, Field(ge=1)] = Field(description="a version of this name that is loaded")


class VersionStatus(StrictModel):
    """One resident version. state: ``draining`` takes no new requests because a load waits for its place."""

    version: int
    path: str
    digest: str = Field(description="sha256:… of the directory's content, the same on every server that has it")
    type: Literal["q", "v"]
    distribution: dict[str, Any]
    state: Literal["active", "resident", "draining"]
    running: int = Field(description="requests that use it now")
    failed: int = Field(description="requests answered with an error because guidance by it failed")
    rollouts: dict[str, Any] = Field(description="sampling parameters of the roll-outs it was fitted on, if recorded")
    adapter: str | None = Field(description="the LoRA adapter whose requests it guides; null: those of the reference")


class ValueModelStatus(StrictModel):
    """One name and its resident versions, oldest first."""

    name: str
    active: int
    versions: list[VersionStatus]


class PublishedVersion(StrictModel):
    """Answer of ``POST /v1/guidance/value_models``."""

    name: str
    version: int
    path: str
    digest: str = Field(description="sha256:… of the directory's content")
    type: Literal["q", "v"]
    distribution: dict[str, Any]


class GuidanceDefaults(StrictModel):
    """What an empty ``guidance`` means."""

    value_model: str | None
    eta: float
    top_k: int
    method: Literal["qsharp", "cd"]
    tail: Literal["floor", "mean"]


class GuidanceStatus(StrictModel):
    """Answer of ``GET /v1/guidance``."""

    value_models: list[ValueModelStatus]
    defaults: GuidanceDefaults
    max_top_k: int
    value_model_root: str | None
