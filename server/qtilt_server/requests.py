"""vLLM's completion requests with a strict ``guidance`` field."""

from typing import Self

from pydantic import model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from qtilt_server.schema import GuidanceRequest


class GuidedCompletionRequest(CompletionRequest):
    """Body of ``POST /v1/completions``."""

    guidance: GuidanceRequest | None = None

    @property
    def returns_tokens(self) -> bool:
        """vLLM generates one token for ``echo`` with ``max_tokens`` 0, and doesn't return it."""
        return not (self.echo and self.max_tokens == 0)

    @model_validator(mode="after")
    def check_guidance_is_possible(self) -> Self:
        if self.guidance is not None:
            _refuse_beam_search(self.use_beam_search)
            if self.prompt_embeds is not None:
                raise VLLMValidationError(
                    "guidance needs token ids and can't be used with prompt_embeds", parameter="guidance"
                )
        return self


class GuidedChatCompletionRequest(ChatCompletionRequest):
    """Body of ``POST /v1/chat/completions``."""

    guidance: GuidanceRequest | None = None

    @property
    def returns_tokens(self) -> bool:
        return True

    @model_validator(mode="after")
    def check_guidance_is_possible(self) -> Self:
        if self.guidance is not None:
            _refuse_beam_search(self.use_beam_search)
        return self


GuidedRequest = GuidedCompletionRequest | GuidedChatCompletionRequest


def _refuse_beam_search(use_beam_search: bool) -> None:
    if use_beam_search:
        raise VLLMValidationError("guidance can't be used with beam search", parameter="guidance")
