"""The details of tokens as the worker tells them, with their texts: what goes over HTTP."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from qtilt_server.schema import CandidateDetails, TokenDetails

if TYPE_CHECKING:
    from vllm.tokenizers import TokenizerLike

    from qtilt.vllm_plugin.details import TokenDetails as MeasuredToken

LEAST_LOGPROB = -9999.0
"""JSON has no −∞; vLLM's own log-probabilities are as low as this at least."""
TEXTS_KEPT = 2**16


class TokenTexts:
    """What each token of the reference is in text, alone."""

    def __init__(self, tokenizer: "TokenizerLike") -> None:
        self._text = lru_cache(TEXTS_KEPT)(lambda token_id: str(tokenizer.decode([token_id])))

    def explain(self, token_ids: Sequence[int], measured: Sequence["MeasuredToken | None"]) -> list[TokenDetails]:
        """Of each token what was measured; None if it wasn't guided."""
        return [self._explain(*each) for each in zip(token_ids, measured, strict=True)]

    def _explain(self, token_id: int, measured: "MeasuredToken | None") -> TokenDetails:
        if measured is None:
            nothing = dict.fromkeys(TokenDetails.model_fields)
            return TokenDetails.model_validate({**nothing, "token_id": token_id, "token": self._text(token_id)})
        candidates = measured["candidates"]
        return TokenDetails(
            token_id=token_id,
            token=self._text(token_id),
            reference_logprob=max(measured["reference_logprob"], LEAST_LOGPROB),
            guided_logprob=max(measured["guided_logprob"], LEAST_LOGPROB),
            value=measured["value"],
            offset=measured["offset"],
            kl=measured["kl"],
            entropy=measured["entropy"],
            candidates=CandidateDetails(
                token_ids=candidates["token_ids"],
                tokens=[self._text(each) for each in candidates["token_ids"]],
                reference_logprobs=[max(each, LEAST_LOGPROB) for each in candidates["reference_logprobs"]],
                guided_logprobs=[max(each, LEAST_LOGPROB) for each in candidates["guided_logprobs"]],
                values=candidates["values"],
            ),
        )
