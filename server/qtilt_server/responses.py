"""vLLM's answers with what is said of guidance in them: for the OpenAPI document."""

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse, ChatCompletionResponseChoice
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice

from qtilt_server.schema import AppliedGuidance, ChoiceGuidance, DetailedGuidance, RankedGuidance


class GuidedCompletionChoice(CompletionResponseChoice):
    """guidance: if it was asked for."""

    guidance: DetailedGuidance | RankedGuidance | ChoiceGuidance | None = None


class GuidedCompletionResponse(CompletionResponse):
    """guidance: if it was asked for."""

    choices: list[GuidedCompletionChoice]  # type: ignore[assignment]
    guidance: AppliedGuidance | None = None


class GuidedChatChoice(ChatCompletionResponseChoice):
    """guidance: if it was asked for."""

    guidance: DetailedGuidance | RankedGuidance | ChoiceGuidance | None = None


class GuidedChatResponse(ChatCompletionResponse):
    """guidance: if it was asked for."""

    choices: list[GuidedChatChoice]  # type: ignore[assignment]
    guidance: AppliedGuidance | None = None
