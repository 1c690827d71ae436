"""Rollouts -> labelled sequences -> batches: which tokens teach the value model what.

The label rule (QSHARP.md, Algorithm 1). Z(x, y) is the return when *the reference* completes after y, whoever chose y.
With g guided tokens that holds for the generated tokens t >= max(g - 1, 0) (0-based, the end token included): the last
guided token is followed by the reference alone, earlier ones by guided tokens and would bias the value upwards. A
response that ends inside its roll-in labels only its last token, and only if that is the end token: then nothing
follows, and the return is certain. The paper's text starts at the first token of the reference; like the official code
we label the last roll-in pair too.

Shapes: `N` sequences of a batch, `T` positions.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

BUCKET_BATCHES = 16
"""Sequences are sorted by length within groups of this many batches: little padding, still a random order."""


class LabelledRollout(Protocol):
    """The fields of a stored rollout that labels are made of."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def token_ids(self) -> Sequence[int]:
        """The generated tokens, end token included when it was generated."""

    @property
    def switch_point(self) -> int:
        """g: how many of them were asked to be guided."""

    @property
    def ended(self) -> bool:
        """The last token is the end token."""

    @property
    def reward(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; the value model is fitted to `reward` at positions first_label … len(token_ids) - 1."""

    prompt_id: str
    token_ids: NDArray[np.int32]
    """Prompt and completion."""
    first_label: int
    reward: float

    @property
    def label_count(self) -> int:
        return len(self.token_ids) - self.first_label


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """What became of the rollouts; logged and written next to every fit."""

    rollouts: int
    prompts: int
    labelled_sequences: int
    labelled_tokens: int
    roll_in_tokens_masked: int
    """Generated tokens left out because guided tokens follow them."""
    ended_in_roll_in_without_label: int
    """Rollouts that teach nothing: cut off inside their roll-in."""
    unanimous_prompts_dropped: int
    unanimous_rollouts_dropped: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences. `labelled_NT` marks the positions that are fitted to `reward_N`."""

    token_ids_NT: Tensor
    labelled_NT: Tensor
    reward_N: Tensor


def first_labelled_token(completion_length: int, switch_point: int, ended: bool) -> int:
    """The first generated token that is labelled; `completion_length` when none is."""
    if completion_length <= switch_point:
        return completion_length - 1 if ended else completion_length
    return max(switch_point - 1, 0)


def label_rollouts(rollouts: Iterable[LabelledRollout], drop_unanimous: bool) -> tuple[list[Example], LabelCounts]:
    """Examples of all rollouts that have a label, and the counts.

    drop_unanimous: leave out prompts whose rollouts (over all iterations) all have the same reward, as the paper does.
    Raises ValueError when nothing is left to learn from.
    """
    by_prompt: dict[str, list[LabelledRollout]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout.prompt_id].append(rollout)
    total = sum(map(len, by_prompt.values()))
    prompts = len(by_prompt)
    unanimous = {key for key, group in by_prompt.items() if len({rollout.reward for rollout in group}) == 1}
    dropped = {key: by_prompt.pop(key) for key in unanimous} if drop_unanimous else {}
    kept = [rollout for group in by_prompt.values() for rollout in group]
    examples = [example for rollout in kept if (example := _label(rollout)) is not None]
    labelled_tokens = sum(example.label_count for example in examples)
    unlabelled = [rollout for rollout in kept if _first_label(rollout) == len(rollout.token_ids)]
    counts = LabelCounts(
        rollouts=total,
        prompts=prompts,
        labelled_sequences=len(examples),
        labelled_tokens=labelled_tokens,
        roll_in_tokens_masked=sum(len(rollout.token_ids) for rollout in kept) - labelled_tokens,
        ended_in_roll_in_without_label=len(unlabelled),
        unanimous_prompts_dropped=len(dropped),
        unanimous_rollouts_dropped=sum(map(len, dropped.values())),
    )
    logger.info("labels: %s", counts.to_dict())
    if not examples:
        raise ValueError(
            f"no labels in {total} rollouts of {prompts} prompts ({counts.unanimous_prompts_dropped} prompts dropped "
            "because their rewards agree): collect more samples per prompt, or set fit.drop_unanimous = false"
        )
    return examples, counts


def split_prompts(examples: Sequence[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, split by prompt; the same prompt falls on the same side in every iteration.

    held_out: fraction of the prompts, 0 <= held_out < 1. With held_out > 0 and at least two prompts neither side is
    empty. Raises ValueError for a fraction out of range.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")
    position = {example.prompt_id: _position(example.prompt_id, seed) for example in examples}
    held = {prompt_id for prompt_id, at in position.items() if at < held_out}
    if held_out > 0 and len(position) > 1:
        ranked = sorted(position, key=lambda prompt_id: position[prompt_id])
        held = (held | {ranked[0]}) - {ranked[-1]}
    training = [example for example in examples if example.prompt_id not in held]
    return training, [example for example in examples if example.prompt_id in held]


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """One epoch of length-bucketed batches in an order that depends on `seed` only. The last one may be smaller."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(examples))
    groups: list[list[int]] = []
    for start in range(0, len(order), BUCKET_BATCHES * batch_size):
        bucket = sorted(order[start : start + BUCKET_BATCHES * batch_size], key=lambda i: len(examples[i].token_ids))
        groups += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    for group in rng.permutation(len(groups)):
        yield [examples[index] for index in groups[group]]


def collate(examples: Sequence[Example]) -> Batch:
    """Pads on the right with token 0: causal attention never lets a real token see it, and no label lies there."""
    longest = max(len(example.token_ids) for example in examples)
    token_ids_NT = torch.zeros(len(examples), longest, dtype=torch.long)
    labelled_NT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        token_ids_NT[row, : len(example.token_ids)] = torch.from_numpy(example.token_ids)
        labelled_NT[row, example.first_label : len(example.token_ids)] = True
    return Batch(token_ids_NT, labelled_NT, torch.tensor([example.reward for example in examples]))


def _first_label(rollout: LabelledRollout) -> int:
    return first_labelled_token(len(rollout.token_ids), rollout.switch_point, rollout.ended)


def _label(rollout: LabelledRollout) -> Example | None:
    first = _first_label(rollout)
    if first == len(rollout.token_ids):
        return None
    token_ids = np.array([*rollout.prompt_token_ids, *rollout.token_ids], dtype=np.int32)
    return Example(rollout.prompt_id, token_ids, len(rollout.prompt_token_ids) + first, rollout.reward)


def _position(prompt_id: str, seed: int) -> float:
    """A uniform number in [0, 1) that belongs to this prompt."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
