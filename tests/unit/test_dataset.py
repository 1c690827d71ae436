"""Which tokens are labelled, how prompts are split, and what a batch looks like."""

from dataclasses import dataclass

import numpy as np
import pytest

from qtilt_trainer.dataset import Example, batches, collate, first_labelled_token, label_rollouts, split_prompts


@dataclass(frozen=True)
class Rollout:
    prompt_id: str
    token_ids: list[int]
    reward: float = 1.0
    switch_point: int = 0
    ended: bool = True
    prompt_token_ids: tuple[int, ...] = (7, 8)


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
    assert first_labelled_token(length, switch_point, ended) == first


def test_labels_begin_behind_the_prompt_and_are_counted() -> None:
    rollouts = [
        Rollout("a", [1, 2, 3], reward=1.0),
        Rollout("a", [1, 2, 3, 4], reward=0.0, switch_point=3),
        Rollout("a", [1, 2], reward=0.0, switch_point=4, ended=False),
        Rollout("b", [1], reward=1.0),
        Rollout("b", [2], reward=1.0),
    ]
    examples, counts = label_rollouts(rollouts, drop_unanimous=True)
    assert [(example.token_ids.tolist(), example.first_label) for example in examples] == [
        ([7, 8, 1, 2, 3], 2),
        ([7, 8, 1, 2, 3, 4], 4),
    ]
    assert counts.to_dict() == {
        "rollouts": 5,
        "prompts": 2,
        "labelled_sequences": 2,
        "labelled_tokens": 5,
        "roll_in_tokens_masked": 4,
        "ended_in_roll_in_without_label": 1,
        "unanimous_prompts_dropped": 1,
        "unanimous_rollouts_dropped": 2,
    }


def test_unanimous_prompts_stay_when_asked_to() -> None:
    examples, counts = label_rollouts([Rollout("b", [1]), Rollout("b", [2])], drop_unanimous=False)
    assert (len(examples), counts.unanimous_prompts_dropped) == (2, 0)


def test_nothing_to_learn_from_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="drop_unanimous = false"):
        label_rollouts([Rollout("b", [1]), Rollout("b", [2])], drop_unanimous=True)
    with pytest.raises(ValueError, match="no labels in 0 rollouts"):
        label_rollouts([], drop_unanimous=False)


def example(prompt_id: str, length: int = 3, first_label: int = 1, reward: float = 1.0) -> Example:
    return Example(prompt_id, np.arange(1, length + 1, dtype=np.int32), first_label, reward)


def test_prompts_stay_on_their_side_when_iterations_are_added() -> None:
    first = [example(f"p{index}") for index in range(200)]
    more = first + [example(f"p{index}") for index in range(400)]
    held_first = {e.prompt_id for e in split_prompts(first, 0.1, seed=0)[1]}
    training, held_out = split_prompts(more, 0.1, seed=0)
    held_more = {e.prompt_id for e in held_out}
    assert held_first <= held_more
    assert held_more.isdisjoint(e.prompt_id for e in training)
    assert 20 <= len(held_more) <= 60
    assert len(training) + len(held_out) == len(more)


def test_neither_side_of_a_split_is_empty_with_two_prompts() -> None:
    for held_out in (0.01, 0.99):
        training, held = split_prompts([example("a"), example("b")], held_out, seed=0)
        assert len(training) == len(held) == 1
    assert split_prompts([example("a"), example("b")], 0.0, seed=0)[1] == []
    with pytest.raises(ValueError, match="held_out"):
        split_prompts([example("a")], 1.0, seed=0)


def test_an_epoch_has_every_sequence_once_in_batches_of_similar_length() -> None:
    rng = np.random.default_rng(0)
    examples = [example(str(index), int(length)) for index, length in enumerate(rng.integers(1, 200, 640))]
    epoch = list(batches(examples, 10, seed=3))
    assert sorted(e.prompt_id for batch in epoch for e in batch) == sorted(e.prompt_id for e in examples)
    padded = sum(len(batch) * max(len(e.token_ids) for e in batch) for batch in epoch)
    assert padded < 1.15 * sum(len(e.token_ids) for e in examples)
    assert [[e.prompt_id for e in batch] for batch in epoch] == [
        [e.prompt_id for e in batch] for batch in batches(examples, 10, seed=3)
    ]
    assert [e.prompt_id for e in epoch[0]] != [e.prompt_id for e in next(batches(examples, 10, seed=4))]


def test_a_batch_is_padded_on_the_right_and_marks_labelled_positions() -> None:
    batch = collate([example("a", 2, 1, 0.5), example("b", 4, 2, 1.0)])
    assert batch.token_ids_NT.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert batch.labelled_NT.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert batch.reward_N.tolist() == [0.5, 1.0]
