"""Puts the chunks of a stream together again."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StreamedChoice:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    guidance: dict[str, Any] | None = None
    applied: dict[str, Any] | None = None
    """``guidance`` of the chunk that carried finish_reason."""


@dataclass
class Streamed:
    choices: dict[int, StreamedChoice] = field(default_factory=dict)
    usage: Any = None
    chunks: int = 0

    def add(self, chunk: Any) -> None:
        self.usage = chunk.usage or self.usage
        if self.chunks > 0 and not any(choice.finish_reason for choice in chunk.choices):
            assert not hasattr(chunk, "guidance"), "the first chunk says it, and those with finish_reason"
        self.chunks += 1
        for part in chunk.choices:
            choice = self.choices.setdefault(part.index, StreamedChoice())
            assert choice.finish_reason is None, "nothing follows finish_reason"
            assert part.finish_reason or not hasattr(part, "guidance")
            choice.token_ids += getattr(part, "token_ids", None) or []
            choice.text += (part.text if hasattr(part, "text") else part.delta.content) or ""
            choice.logprobs += _logprobs(part)
            choice.finish_reason = part.finish_reason
            choice.guidance = getattr(part, "guidance", None)
            choice.applied = getattr(chunk, "guidance", None)


def collect(chunks: Iterable[Any]) -> Streamed:
    streamed = Streamed()
    for chunk in chunks:
        streamed.add(chunk)
    return streamed


def _logprobs(part: Any) -> list[float]:
    if part.logprobs is None:
        return []
    if hasattr(part.logprobs, "token_logprobs"):
        return list(part.logprobs.token_logprobs)
    return [entry.logprob for entry in part.logprobs.content]
