"""What a request that asks for details is told of each token: of the reference, the values, and the tilt.

Shapes: ``K`` candidates of a step, ``V`` vocabulary of the reference, ``C`` columns of what is kept of a candidate.

Which token a step draws is known when that is fed to the next one. Until then a row of the reference's logits is kept,
because any token may be drawn; of all earlier steps only the candidates are, and the logit of what was drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from qtilt.vllm_plugin.step import Guided
from qtilt.vllm_plugin.versions import ResidentVersion

COLUMNS = 5
"""Of a candidate: token id, ln of the reference's probability, drop, value, whether it was scored."""


class CandidateDetails(TypedDict):
    """The candidates of a step, likeliest by the reference first. values: None where none was asked for."""

    token_ids: list[int]
    reference_logprobs: list[float]
    guided_logprobs: list[float]
    values: list[float | None]


class TokenDetails(TypedDict):
    """One token that was drawn, and the step that drew it: at the request's temperature, before penalties (on model
    runner V2 after them) and before truncation.

    reference_logprob, guided_logprob: ln of the token's probability. value: E[Z] of the return after it, None for a
    token without a score. offset: Q/η in nats, scaled as a budget has it, less that of the most valuable candidate, so
    0 at most; a token without a score has that of the tail. kl: KL(guided ‖ reference) of the step in nats. entropy: of
    the guided distribution, in nats, given that the token is a candidate.
    """

    token_id: int
    reference_logprob: float
    guided_logprob: float
    value: float | None
    offset: float
    kl: float
    entropy: float
    candidates: CandidateDetails


@dataclass(slots=True)
class _Step:
    """On the device. numbers: ``[C·K + 5]``, see :meth:`Details.add`. logits_V: until the token is known.

    drawn_2: then the token and its logit.
    """

    numbers: Tensor
    logits_V: Tensor | None
    drawn_2: Tensor | None = None

    def draw(self, token: Tensor) -> None:
        """This token was drawn. token: int64, without dimensions."""
        if self.logits_V is not None:
            logit = self.logits_V.gather(0, token.view(1)).double()
            self.drawn_2, self.logits_V = torch.cat([token.view(1).double(), logit]), None


class Details:
    """Of one stay. Steps are numbered by how many tokens had been generated before. top_k: the request's."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._steps: dict[int, _Step] = {}
        self._is_forgotten = False

    def forget(self) -> None:
        """Nobody will ask any more: nothing is kept, and nothing that comes is."""
        self._steps, self._is_forgotten = {}, True

    def add(
        self, step: int, logits_V: Tensor, guided: Guided, row: int, version: ResidentVersion, scale_G: Tensor
    ) -> None:
        """What a step has measured of its ``row``. logits_V: the row before it was tilted, from now on ours.

        scale_G: what logits are divided by.
        """
        if self._is_forgotten:
            return
        width = slice(0, self._top_k)
        token_ids_K = guided.token_ids_GK[row, width]
        columns = [
            token_ids_K.double(),
            guided.log_reference_GK[row, width],
            guided.drops_GK[row, width],
            version.distribution.mean(guided.values_GKA[row, width].double()),
            guided.is_scored_GK[row, width].double(),
        ]
        others = [
            guided.log_rest_G1[row],
            guided.others_G1[row],
            guided.divergence_G3[row, :1],
            _log_total(logits_V / scale_G[row].to(logits_V.dtype)),
            scale_G[row].double().view(1),
        ]
        self._steps[step] = _Step(torch.cat([*columns, *others]), logits_V)

    def draw(self, step: int, token: Tensor) -> None:
        """The token that ``step`` has drawn, if that is known of it."""
        if step in self._steps:
            self._steps[step].draw(token)

    def read(self, first: int, tokens: Sequence[int]) -> dict[int, TokenDetails]:
        """Of the steps from ``first`` on that have drawn the tokens after these: ``tokens`` are all generated ones.

        A step that has drawn another token isn't there. Waits for the device.
        """
        steps = {step: self._steps[step] for step in range(first, len(tokens)) if step in self._steps}
        if not steps:
            return {}
        numbers = torch.stack([step.numbers for step in steps.values()]).cpu()
        drawn = _drawn(steps, tokens)
        return {
            step: _explain(tokens[step], logit, numbers_1)
            for (step, (token, logit)), numbers_1 in zip(drawn.items(), numbers, strict=True)
            if token == tokens[step]
        }


def _drawn(steps: Mapping[int, _Step], tokens: Sequence[int]) -> dict[int, tuple[int, float]]:
    """By step the token that it drew and its logit; of one whose token isn't known yet the given one."""
    drawn: list[Tensor] = []
    for number, step in steps.items():
        if step.drawn_2 is not None:
            drawn.append(step.drawn_2)
        else:
            assert step.logits_V is not None
            token = torch.tensor([tokens[number]], device=step.logits_V.device)
            drawn.append(torch.cat([token.double(), step.logits_V.gather(0, token).double()]))
    return {step: (int(token), logit) for step, (token, logit) in zip(steps, torch.stack(drawn).tolist(), strict=True)}


def _log_total(scaled_V: Tensor) -> Tensor:
    """ln of the sum of e^logit, as :func:`qtilt.tilt.reference_mass` takes it: float64 ``[1]``."""
    return scaled_V.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).logsumexp(0).double().view(1)


def _explain(token: int, logit: float, numbers: Tensor) -> TokenDetails:
    """numbers: of one step, on the host."""
    columns_CK, (log_rest, others, kl, log_total, scale) = numbers[:-5].view(COLUMNS, -1), numbers[-5:].tolist()
    token_ids_K, log_reference_K, drops_K, values_K, is_scored_K = columns_CK
    log_weight_K = log_reference_K - drops_K
    log_z = float(torch.cat([log_weight_K, torch.tensor([log_rest - others], dtype=torch.float64)]).logsumexp(0))
    guided_K = log_weight_K - log_z
    conditional_K = log_weight_K.log_softmax(0)
    values = [
        value if is_scored else None for value, is_scored in zip(values_K.tolist(), is_scored_K.bool(), strict=True)
    ]
    place = {int(each): index for index, each in enumerate(token_ids_K.tolist())}.get(token)
    reference = logit / scale - log_total if math.isfinite(logit) else -math.inf
    drop = others if place is None else float(drops_K[place])
    counts = [index for index, mass in enumerate(log_reference_K.tolist()) if mass > -math.inf]
    return {
        "token_id": token,
        "reference_logprob": reference,
        "guided_logprob": reference - drop - log_z,
        "value": None if place is None else values[place],
        "offset": 0.0 - drop,
        "kl": kl,
        "entropy": float((conditional_K.exp() * -conditional_K)[counts].sum()),
        "candidates": {
            "token_ids": [int(token_ids_K[index]) for index in counts],
            "reference_logprobs": [float(log_reference_K[index]) for index in counts],
            "guided_logprobs": [float(guided_K[index]) for index in counts],
            "values": [values[index] for index in counts],
        },
    }
