"""A running request's tokens as the value engine reads them."""

from collections.abc import Sequence
from typing import overload


class TokenHistory(Sequence[int]):
    """Prompt and output tokens as one sequence, without joining the two lists at every step.

    Both lists stay those of the model runner, so the history grows as they do. The reference may have tokens that the
    value model's table lacks (added tokens, padding rows): ids of ``vocab_size`` and above are read as the table's last
    row, because there is nothing better to read them as and a request mustn't fail on them.
    """

    def __init__(self, prompt_token_ids: list[int], output_token_ids: list[int], vocab_size: int) -> None:
        self._prompt = prompt_token_ids
        self._output = output_token_ids
        self._last_row = vocab_size - 1

    def __len__(self) -> int:
        return len(self._prompt) + len(self._output)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            last_row = self._last_row
            return [token if token < last_row else last_row for token in self._join(*index.indices(len(self)))]
        index = range(len(self))[index]
        prompt_length = len(self._prompt)
        token = self._prompt[index] if index < prompt_length else self._output[index - prompt_length]
        return min(token, self._last_row)

    def _join(self, start: int, stop: int, step: int) -> list[int]:
        if step != 1:
            raise ValueError(f"a token history is sliced with step 1, not {step}")
        prompt_length = len(self._prompt)
        if start >= prompt_length:
            return self._output[start - prompt_length : max(stop - prompt_length, 0)]
        return self._prompt[start:stop] + self._output[max(start - prompt_length, 0) : max(stop - prompt_length, 0)]
