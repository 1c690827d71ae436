"""What stands around a task's prompts: a system prompt, examples, the beginning of the answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtilt_trainer.tasks.problem import Prompt

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Framing:
    """Only chat prompts can have one; an empty framing leaves any prompt as it is."""

    system: str | None = None
    few_shot: tuple[Message, ...] = ()
    """Messages before the prompt's own."""
    prefill: str = ""
    """How every answer begins; what is generated continues it."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template."""

    @property
    def is_empty(self) -> bool:
        return not (self.system or self.few_shot or self.prefill or self.template_kwargs)

    def framed(self, prompt: Prompt) -> Prompt:
        """The prompt as it is sent. Raises ValueError for a text, and where there are two system prompts."""
        if self.is_empty:
            return prompt
        if isinstance(prompt, str):
            raise ValueError(
                "sampling.system, few_shot, prefill and chat_template_kwargs are for chat prompts, and the task gives "
                "texts: have it give messages (chat = true)"
            )
        own = 1 if prompt and prompt[0].get("role") == "system" else 0
        if own and self.system:
            raise ValueError("sampling.system is given, and the prompt has a system message of its own: leave one out")
        system = [{"role": "system", "content": self.system}] if self.system else prompt[:own]
        prefill = [{"role": "assistant", "content": self.prefill}] if self.prefill else []
        return [*system, *map(dict, self.few_shot), *prompt[own:], *prefill]

    def chat_options(self) -> dict[str, Any]:
        """Fields of a chat request."""
        options: dict[str, Any] = {}
        if self.template_kwargs:
            options["chat_template_kwargs"] = dict(self.template_kwargs)
        if self.prefill:
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        return options
