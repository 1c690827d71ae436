"""Values of given tokens, for who asks for them and samples nothing: a part of a text between two steps.

Shapes: ``L`` tokens of a text, ``N`` of them scored, ``B`` of these at once, ``Z`` returns that there may be.

A text has a cache of its own for as long as it is scored: what runs meanwhile keeps its slots and pages. Its tokens are
rows of a step, each of which is the next one's history, and each has the token after it as its candidate.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.packing import LastTokens, Span
from qtilt.vllm_plugin.versions import ResidentVersion

TOKENS_AT_ONCE = {"cpu": 64, "cuda": 512}
"""Of the value model, between two steps: about what a step of a few requests runs."""
SLOT = 0


class TextValues(TypedDict):
    """support: the returns z that there may be. values: E[Z] after each scored token ``[N]``, None after one that
    guidance never scores. distributions: P(Z = z) ``[N][Z]`` likewise, of all if they are wanted, or of the last.
    """

    support: list[float]
    values: list[float | None]
    distributions: list[list[float] | None]


class Text:
    """Some tokens, the last of which are scored: from number ``first`` ≥ 1 on. wants_all: their distributions, and not
    only the last one's.

    Raises ValueError for a range that isn't there, for tokens that the reference lacks, and without memory for a cache.
    """

    def __init__(
        self,
        version: ResidentVersion,
        token_ids: Sequence[int],
        first: int,
        vocabulary: int,
        *,
        wants_all: bool = False,
    ) -> None:
        if not 1 <= first < len(token_ids):
            raise ValueError(
                f"tokens from {first} on of {len(token_ids)} are to be scored: at least one, after another"
            )
        if not all(0 <= token < vocabulary for token in token_ids):
            raise ValueError(f"the token ids must be 0 to {vocabulary - 1}, the reference's")
        self._version = version
        try:
            self._engine = version.engine.apart(len(token_ids))
        except ValueError as error:
            raise ValueError(f"there is no memory for the values of {len(token_ids)} tokens") from error
        self._token_ids = np.array(token_ids, dtype=np.int64)
        tokens_L = torch.from_numpy(self._token_ids).to(self._engine.cache.geometry.device)
        self._tokens_L = tokens_L.clamp(max=self._engine.model.vocab_size - 1)
        self._first, self._cached = first, 0
        self._wants_all = wants_all
        self._logits: list[Tensor] = []
        self._at_once = TOKENS_AT_ONCE[tokens_L.device.type]

    @property
    def is_done(self) -> bool:
        """Whether all of it has been scored."""
        return self._cached == len(self._token_ids) - 1

    @torch.inference_mode()
    def advance(self) -> None:
        """Run the next part, if there is one."""
        before = self._first - 1
        if self._cached < before:
            end = min(self._cached + self._at_once, before)
            self._engine.extend([Span(SLOT, self._cached, self._tokens_L[self._cached : end])])
        elif not self.is_done:
            rows = self._at_once if self._engine.model.type == "q" else self._at_once // 2
            end = min(self._cached + rows, len(self._token_ids) - 1)
            self._logits.append(self._score(end))
        self._cached = end

    def values(self) -> TextValues:
        """Once it is done. Waits for the device."""
        distribution, logits_NA = self._version.distribution, torch.cat(self._logits).squeeze(1).double()
        is_scored_N = (self._token_ids[self._first :] < self._version.scorable).tolist()
        mean_N = distribution.mean(logits_NA).tolist()
        told = slice(None) if self._wants_all else slice(-1, None)
        return {
            "support": distribution.support,
            "values": [each if is_scored else None for each, is_scored in zip(mean_N, is_scored_N, strict=True)],
            "distributions": [
                each if is_scored else None
                for each, is_scored in zip(distribution.pmf(logits_NA[told]).tolist(), is_scored_N[told], strict=True)
            ],
        }

    def _score(self, end: int) -> Tensor:
        """Logits ``[B, 1, A]`` of the tokens after those that aren't cached, up to ``end``."""
        positions_B = torch.arange(self._cached, end, device=self._tokens_L.device)
        slots_B = torch.full_like(positions_B, SLOT)
        last = LastTokens(slots_B, positions_B, self._tokens_L[positions_B], longest=end, has_drafts=True)
        return self._engine.score(last, self._tokens_L[positions_B + 1].unsqueeze(1))


class Texts:
    """Those that are being scored, by a name that the server gives them."""

    def __init__(self) -> None:
        self._texts: dict[str, Text] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def begin(self, name: str, text: Text) -> None:
        """Keep it until it :meth:`end` s."""
        self._texts[name] = text

    def advance(self, name: str) -> TextValues | None:
        """Run a part of it: its values if that was the last, else None. Raises ValueError for an unknown name."""
        if name not in self._texts:
            raise ValueError(f"no text {name!r} is being scored")
        text = self._texts[name]
        text.advance()
        return text.values() if text.is_done else None

    def end(self, name: str) -> None:
        """Forget it, if it is known."""
        self._texts.pop(name, None)
