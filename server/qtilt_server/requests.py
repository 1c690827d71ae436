"""vLLM's completion requests with a strict ``guidance`` field."""

from typing import Any

from pydantic import BaseModel, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from qtilt_server.errors import GuidanceRequestError
from qtilt_server.misplaced import explain, misplaced_in
from qtilt_server.schema import GuidanceRequest


class RefusesMisplacedGuidance(BaseModel):
    """A request that asks for guidance in a field which nobody reads is an error: it would be answered unguided."""

    @model_validator(mode="before")
    @classmethod
    def check_guidance_is_in_its_place(cls, request: Any) -> Any:
        place = misplaced_in(request, cls.model_fields) if isinstance(request, dict) else None
        if place is not None:
            raise VLLMValidationError(explain(place), parameter=place)
        return request


class GuidedCompletionRequest(RefusesMisplacedGuidance, CompletionRequest):
    """Body of ``POST /v1/completions``."""

    guidance: GuidanceRequest | None = None

    @property
    def returns_tokens(self) -> bool:
        """vLLM generates one token for ``echo`` with ``max_tokens`` 0, and doesn't return it."""
        return not (self.echo and self.max_tokens == 0)

    def refuse_impossible(self) -> None:
        """Raises GuidanceRequestError when it can't be guided."""
        _refuse_beam_search(self.use_beam_search)
        _check_best_of(self)
        if self.prompt_embeds is not None:
            raise GuidanceRequestError("guidance needs token ids and can't be used with prompt_embeds", "guidance")


class GuidedChatCompletionRequest(RefusesMisplacedGuidance, ChatCompletionRequest):
    """Body of ``POST /v1/chat/completions``."""

    guidance: GuidanceRequest | None = None

    @property
    def returns_tokens(self) -> bool:
        return True

    def refuse_impossible(self) -> None:
        """Raises GuidanceRequestError when it can't be guided."""
        _refuse_beam_search(self.use_beam_search)
        _check_best_of(self)


GuidedRequest = GuidedCompletionRequest | GuidedChatCompletionRequest


def _refuse_beam_search(use_beam_search: bool) -> None:
    if use_beam_search:
        raise GuidanceRequestError("guidance can't be used with beam search", "guidance")


def _check_best_of(request: GuidedRequest) -> None:
    best_of = request.guidance.best_of if request.guidance is not None else None
    if best_of is None:
        return
    if request.stream:
        raise GuidanceRequestError("guidance.best_of is known at the end only: drop it, or stream", "guidance.best_of")
    if not request.returns_tokens:
        raise GuidanceRequestError("guidance.best_of needs answers, and max_tokens is 0", "guidance.best_of")
    if best_of < (request.n or 1):
        raise GuidanceRequestError(
            f"guidance.best_of is {best_of}, allowed: n, which is {request.n or 1}, or more", "guidance.best_of"
        )
