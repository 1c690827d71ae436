"""Which tokens are labelled, how prompts are split, and what a batch looks like."""

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from qtilt_trainer.dataset import (
    Example,
    Examples,
    batches,
    collate,
    first_labelled_tokens,
    label_rollouts,
    split_prompts,
)
from qtilt_trainer.rollouts import Rollout
from stored_rollouts import as_table, make_rollout


def rollout(
    prompt_id: str,
    token_ids: list[int],
    reward: float = 1.0,
    switch_point: int = 0,
    ended: bool = True,
    sample: int = 0,
) -> Rollout:
    return replace(
        make_rollout(prompt_id, sample),
        token_ids=token_ids,
        reward=reward,
        switch_point=switch_point,
        ended=ended,
        finish_reason="stop" if ended else "length",
        prompt_token_ids=[7, 8],
    )


@pytest.mark.parametrize(
    ("length", "switch_point", "ended", "first"),
    [
        (5, 0, True, 0),  # unguided: every token
        (5, 1, True, 0),  # the reference alone follows the one guided token
        (5, 3, True, 2),
        (5, 5, True, 4),  # ended by its last guided token
        (5, 9, True, 4),  # ended inside its roll-in: the end token is certain
        (5, 9, False, 5),  # cut off inside its roll-in: nothing is certain
        (5, 5, False, 5),
        (5, 4, False, 3),  # cut off in its roll-out: labelled like any other
        (1, 0, False, 0),
        (0, 0, False, 0),
    ],
)
def test_first_labelled_token(length: int, switch_point: int, ended: bool, first: int) -> None:
    found = first_labelled_tokens(np.array([length]), np.array([switch_point], dtype=np.int32), np.array([ended]))
    assert found.tolist() == [first]


def test_labels_begin_behind_the_prompt_and_are_counted() -> None:
    rollouts = [
        rollout("a", [1, 2, 3], reward=1.0, sample=0),
        rollout("a", [1, 2, 3, 4], reward=0.0, switch_point=3, sample=1),
        rollout("a", [1, 2], reward=0.0, switch_point=4, ended=False, sample=2),
        rollout("b", [1], reward=1.0, sample=0),
        rollout("b", [2], reward=1.0, sample=1),
        rollout("b", [2], reward=math.nan, sample=2),
        rollout("c", [1, 2], reward=math.nan, ended=False),
    ]
    examples, counts = label_rollouts(as_table(rollouts), drop_unanimous=True)
    assert [(example.token_ids.tolist(), example.first_label) for example in examples] == [
        ([7, 8, 1, 2, 3], 2),
        ([7, 8, 1, 2, 3, 4], 4),
    ]
    assert counts.to_dict() == {
        "rollouts": 7,
        "prompts": 3,
        "labelled_sequences": 2,
        "labelled_tokens": 5,
        "roll_in_tokens_masked": 4,
        "ended_in_roll_in_without_label": 1,
        "cut_by_max_tokens": 2,
        "without_reward": 2,
        "unanimous_prompts_dropped": 1,
        "unanimous_rollouts_dropped": 2,
    }


UNANIMOUS = [rollout("b", [1], sample=0), rollout("b", [2], sample=1)]


def test_the_order_is_that_of_the_ids_in_whatever_parts_they_came() -> None:
    rollouts = [rollout(f"p{n:03d}", [n, n + 1], reward=n % 2) for n in range(50)]
    shuffled = [rollouts[n] for n in np.random.default_rng(0).permutation(50)]
    parts = pa.concat_tables([as_table(shuffled[:20]), as_table(shuffled[20:23]), as_table(shuffled[23:])])
    for table in (parts, parts.slice(0, 50).combine_chunks()):
        examples, _ = label_rollouts(table, drop_unanimous=False)
        assert [example.token_ids.tolist() for example in examples] == [[7, 8, n, n + 1] for n in range(50)]
        assert [example.reward for example in examples] == [n % 2 for n in range(50)]
    examples, _ = label_rollouts(parts.slice(10, 30), drop_unanimous=False)
    assert {e.prompt_id: e.token_ids.tolist() for e in examples} == {
        r.prompt_id: [7, 8, *r.token_ids] for r in shuffled[10:40]
    }


def test_unanimous_prompts_stay_when_asked_to() -> None:
    examples, counts = label_rollouts(as_table(UNANIMOUS), drop_unanimous=False)
    assert (len(examples), counts.unanimous_prompts_dropped) == (2, 0)


def test_nothing_to_learn_from_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="drop_unanimous = false"):
        label_rollouts(as_table(UNANIMOUS), drop_unanimous=True)
    with pytest.raises(ValueError, match="no labels in 0 rollouts"):
        label_rollouts(as_table([]), drop_unanimous=False)


def examples_of(prompt_ids: Sequence[str], lengths: Sequence[int] | None = None) -> Examples:
    rollouts = [
        replace(rollout(prompt_id, list(range(length))), prompt_token_ids=list(prompt_id.encode()))
        for prompt_id, length in zip(prompt_ids, lengths or [3] * len(prompt_ids), strict=True)
    ]
    return label_rollouts(as_table(rollouts), drop_unanimous=False)[0]


def test_labels_split_and_batches_copy_no_tokens_but_those_of_a_batch() -> None:
    parts = [[rollout(f"p{n}", [1] * 512, n % 2) for n in range(first, first + 250)] for first in range(0, 3000, 250)]
    table = pa.concat_tables([as_table(part) for part in parts])
    token_bytes = 3000 * 512 * 4
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    examples, _ = label_rollouts(table, drop_unanimous=False)
    training, _ = split_prompts(examples, 0.1, seed=0)
    seen = sum(len(batch) for batch in batches(training, 64, seed=0))
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow_before
    tracemalloc.stop()
    assert seen == len(training)
    assert peak < 0.5 * token_bytes


def test_prompts_stay_on_their_side_when_iterations_are_added() -> None:
    first = examples_of([f"p{index}" for index in range(200)])
    more = examples_of([f"p{index}" for index in [*range(200), *range(400)]])
    held_first = {e.prompt_id for e in split_prompts(first, 0.1, seed=0)[1]}
    training, held_out = split_prompts(more, 0.1, seed=0)
    held_more = {e.prompt_id for e in held_out}
    assert held_first <= held_more
    assert held_more.isdisjoint(e.prompt_id for e in training)
    assert 20 <= len(held_more) <= 60
    assert len(training) + len(held_out) == len(more)


def test_problems_with_the_same_prompt_are_on_the_same_side() -> None:
    """Other answers make other problems; what the value model sees is the prompt."""
    asked = [(f"p{index}", f"q{index // 2}") for index in range(400)]
    rollouts = [replace(rollout(name, [1, 2]), prompt_token_ids=list(prompt.encode())) for name, prompt in asked]
    examples, _ = label_rollouts(as_table(rollouts), drop_unanimous=False)
    training, held_out = ({tuple(p.tolist()) for p in side.prompts} for side in split_prompts(examples, 0.2, seed=0))
    assert training.isdisjoint(held_out)
    assert 20 <= len(held_out) <= 60


def test_neither_side_of_a_split_is_empty_with_two_prompts() -> None:
    for held_out in (0.01, 0.99):
        training, held = split_prompts(examples_of("ab"), held_out, seed=0)
        assert len(training) == len(held) == 1
    assert len(split_prompts(examples_of("ab"), 0.0, seed=0)[1]) == 0
    for lonely in "abcdef":
        assert [len(side) for side in split_prompts(examples_of(lonely), 0.5, seed=0)] == [1, 0]
    with pytest.raises(ValueError, match="held_out"):
        split_prompts(examples_of("a"), 1.0, seed=0)


def test_an_epoch_has_every_sequence_once_in_batches_of_similar_length() -> None:
    rng = np.random.default_rng(0)
    examples = examples_of([str(index) for index in range(640)], rng.integers(1, 200, 640).tolist())
    epoch = list(batches(examples, 10, seed=3))
    assert sorted(e.prompt_id for batch in epoch for e in batch) == sorted(e.prompt_id for e in examples)
    padded = sum(len(batch) * max(len(e.token_ids) for e in batch) for batch in epoch)
    assert padded < 1.15 * sum(len(e.token_ids) for e in examples)
    assert [[e.prompt_id for e in batch] for batch in epoch] == [
        [e.prompt_id for e in batch] for batch in batches(examples, 10, seed=3)
    ]
    assert [e.prompt_id for e in epoch[0]] != [e.prompt_id for e in next(batches(examples, 10, seed=4))]


def test_a_batch_is_padded_on_the_right_and_marks_labelled_positions() -> None:
    batch = collate([Example("a", np.array([1, 2]), 1, 0.5), Example("b", np.array([1, 2, 3, 4]), 2, 1.0)])
    assert batch.token_ids_NT.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert batch.labelled_NT.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert batch.reward_N.tolist() == [0.5, 1.0]
