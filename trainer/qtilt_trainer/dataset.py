"""Rollouts -> labelled sequences -> batches: which tokens teach the value model what.

The label rule (QSHARP.md, Algorithm 1). Z(x, y) is the return when *the reference* completes after y, whoever chose y.
With g guided tokens that holds for the generated tokens t >= max(g - 1, 0) (0-based, the end token included): the last
guided token is followed by the reference alone, earlier ones by guided tokens and would bias the value upwards. A
response that is over inside its roll-in labels only its last token, and only if it ended there (by an end token or a
stop string): then nothing follows, and the return is certain. The paper's text starts at the first token of the
reference; like the official code we label the last roll-in pair too.

All rollouts stay in the columns they are stored in; a sequence is put together when a batch needs it.

Shapes: `N` sequences of a batch (or rollouts of a store), `T` positions.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtilt_trainer.rewards import cut_count

logger = logging.getLogger(__name__)

BUCKET_BATCHES = 16
"""Sequences are sorted by length within groups of this many batches: little padding, still a random order."""


COLUMNS = (
    "rollout_id",
    "prompt_id",
    "prompt_token_ids",
    "token_ids",
    "finish_reason",
    "ended",
    "switch_point",
    "reward",
)
"""Of the roll-out store: what labels are made of."""


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


class TokenLists:
    """A column of token lists as Arrow has it, without a copy; row i as a NumPy view."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._chunk = np.repeat(np.arange(len(offsets), dtype=np.int32), [len(chunk) for chunk in column.chunks])
        self._start = _joined([chunk[:-1] for chunk in offsets])
        self._end = _joined([chunk[1:] for chunk in offsets])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return (self._end - self._start).astype(np.int64)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        values: NDArray[np.int32] = self._values[self._chunk[row]]
        return values[self._start[row] : self._end[row]]


class Examples(Sequence[Example]):
    """Examples that are put together when they are asked for: the tokens of all roll-outs are in memory once.

    rows: which rows of the columns, in this order.
    """

    def __init__(
        self,
        prompts: TokenLists,
        completions: TokenLists,
        prompt_ids: Sequence[str],
        first_labels: NDArray[np.int64],
        rewards: NDArray[np.float64],
        rows: NDArray[np.int64],
    ) -> None:
        self._prompts, self._completions, self._prompt_ids = prompts, completions, prompt_ids
        self._first_labels, self._rewards, self._rows = first_labels, rewards, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.take(self._rows[index])
        row = self._rows[index]
        prompt = self._prompts[row]
        token_ids = np.concatenate([prompt, self._completions[row]])
        first_label = len(prompt) + int(self._first_labels[row])
        return Example(self._prompt_ids[row], token_ids, first_label, float(self._rewards[row]))

    @property
    def prompts(self) -> Iterator[NDArray[np.int32]]:
        """Prompt tokens of each."""
        return (self._prompts[row] for row in self._rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each, prompt and completion."""
        return (self._prompts.lengths + self._completions.lengths)[self._rows]

    def where(self, keep: NDArray[np.bool_]) -> "Examples":
        """Those that `keep` marks."""
        return self.take(self._rows[keep])

    def take(self, rows: NDArray[np.int64]) -> "Examples":
        """The examples of these rows of the columns."""
        return Examples(self._prompts, self._completions, self._prompt_ids, self._first_labels, self._rewards, rows)


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
    cut_by_max_tokens: int
    """Of all rollouts; what becomes of them says `reward.truncated`."""
    without_reward: int
    """Rollouts that couldn't be graded, or were cut and dropped: they have no label and no say in unanimity."""
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


def first_labelled_tokens(
    lengths_N: NDArray[np.int64], switch_points_N: NDArray[np.int32], ended_N: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The first generated token of each completion that is labelled; its length when none is."""
    inside_roll_in_N = np.where(ended_N, lengths_N - 1, lengths_N)
    return np.where(lengths_N <= switch_points_N, inside_roll_in_N, np.maximum(switch_points_N - 1, 0))


def label_rollouts(rollouts: pa.Table, drop_unanimous: bool) -> tuple[Examples, LabelCounts]:
    """Examples of all rollouts that have a label, in the order of their ids, and the counts.

    rollouts: COLUMNS of the store. drop_unanimous: leave out prompts whose rollouts (over all iterations) all have the
    same reward, as the paper does. Raises ValueError when nothing is left to learn from.
    """
    rewards = rollouts.column("reward").to_numpy()  # NaN where there is none
    prompts = rollouts.column("prompt_id").combine_chunks().dictionary_encode()
    codes = prompts.indices.to_numpy()
    completions = TokenLists(rollouts.column("token_ids"))
    lengths = completions.lengths
    ended = rollouts.column("ended").to_numpy()
    first = first_labelled_tokens(lengths, rollouts.column("switch_point").to_numpy(), ended)
    graded = np.isfinite(rewards)
    unanimous = _unanimous(codes[graded], rewards[graded], len(prompts.dictionary))
    dropped = graded & unanimous[codes] & drop_unanimous
    kept = graded & ~dropped
    labelled = kept & (first < lengths)
    labelled_tokens = int((lengths - first)[labelled].sum())
    counts = LabelCounts(
        rollouts=rollouts.num_rows,
        prompts=len(prompts.dictionary),
        labelled_sequences=int(labelled.sum()),
        labelled_tokens=labelled_tokens,
        roll_in_tokens_masked=int(lengths[kept].sum()) - labelled_tokens,
        ended_in_roll_in_without_label=int((kept & ~labelled).sum()),
        cut_by_max_tokens=cut_count(rollouts),
        without_reward=int((~graded).sum()),
        unanimous_prompts_dropped=int(unanimous.sum()) if drop_unanimous else 0,
        unanimous_rollouts_dropped=int(dropped.sum()),
    )
    logger.info("labels: %s", counts.to_dict())
    _check_labels(counts)
    names = prompts.dictionary.to_pylist()
    order = pc.sort_indices(rollouts.column("rollout_id")).to_numpy()  # whenever and in whatever parts they came
    examples = Examples(
        TokenLists(rollouts.column("prompt_token_ids")),
        completions,
        [names[code] for code in codes],
        first,
        rewards,
        order[labelled[order]],
    )
    return examples, counts


def split_prompts(examples: Examples, held_out: float, seed: int) -> tuple[Examples, Examples]:
    """(training, held-out) examples, split by prompt; the same prompt falls on the same side in every iteration.

    By the prompt's tokens: problems with the same prompt and different answers are on one side.
    held_out: fraction of the prompts, 0 <= held_out < 1. With held_out > 0 and at least two prompts neither side is
    empty. Raises ValueError for a fraction out of range.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")
    position_N = np.array([_position(prompt, seed) for prompt in examples.prompts])
    is_held = position_N < held_out
    if np.ptp(position_N) == 0:  # A single prompt: there is nothing to hold out.
        is_held[:] = False
    elif held_out > 0:
        is_held = (is_held | (position_N == position_N.min())) & (position_N < position_N.max())
    return examples.where(~is_held), examples.where(is_held)


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[list[Example]]:
    """One epoch of length-bucketed batches in an order that depends on `seed` only. The last one may be smaller."""
    rng = np.random.default_rng(seed)
    lengths = examples.lengths
    order = rng.permutation(len(examples))
    groups: list[list[int]] = []
    for start in range(0, len(order), BUCKET_BATCHES * batch_size):
        bucket = sorted(order[start : start + BUCKET_BATCHES * batch_size], key=lambda i: lengths[i])
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


def _joined(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def _unanimous(codes_N: NDArray[np.int32], rewards_N: NDArray[np.float64], prompts: int) -> NDArray[np.bool_]:
    """Of each prompt, whether all its rewards are equal; codes_N: the prompt of each rollout."""
    highest, lowest = np.full(prompts, -np.inf), np.full(prompts, np.inf)
    np.maximum.at(highest, codes_N, rewards_N)
    np.minimum.at(lowest, codes_N, rewards_N)
    same: NDArray[np.bool_] = highest == lowest
    return same


def _check_labels(counts: LabelCounts) -> None:
    if counts.labelled_sequences:
        return
    raise ValueError(
        f"no labels in {counts.rollouts} rollouts of {counts.prompts} prompts ({counts.unanimous_prompts_dropped} "
        f"prompts dropped because their rewards agree, {counts.without_reward} rollouts without a reward): collect "
        "more samples per prompt, or set fit.drop_unanimous = false"
    )


def _position(prompt: NDArray[np.int32], seed: int) -> float:
    """A uniform number in [0, 1) that belongs to this prompt."""
    digest = hashlib.sha256(f"{seed}:".encode() + prompt.tobytes()).digest()
    return int.from_bytes(digest[:8]) / 2**64
