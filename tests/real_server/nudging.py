"""A logits processor of a user, which comes before guidance: it adds to one token's logits where a request asks so."""

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

NUDGED, BY = 7, 2.5
ASKS = "nudged"


class Nudging(AdapterLogitsProcessor):
    """See the module."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        return _nudge if (params.extra_args or {}).get(ASKS) else None


def _nudge(_output_ids: list[int], logits_V: Tensor) -> Tensor:
    logits_V[NUDGED] += BY
    return logits_V
