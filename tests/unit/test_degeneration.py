"""Measures of repetition and variety against examples counted by hand."""

from dataclasses import replace

import pytest

from qtilt_trainer.evaluate import Record
from qtilt_trainer.evaluate.degeneration import distinct, repetition, signs_of_degeneration

REFERENCE = Record(
    task="t", method="reference", n=1, accuracy=0.5, low=0.4, high=0.6, tokens=20.0, rep_4=0.05, distinct_2=0.6
)


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1] * 7, 3 / 4),  # Four 4-grams, one of them different.
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5),  # 1212, 2121, 1212, 2121, 1212.
        ([1, 2, 3], 0.0),
        ([], 0.0),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(token_ids: list[int], expected: float) -> None:
    assert repetition(token_ids) == pytest.approx(expected)


def test_distinct_counts_bigrams_over_all_completions() -> None:
    # 12, 23 | 12, 24 | nothing: three different ones of four.
    assert distinct([[1, 2, 3], [1, 2, 4], [5]]) == pytest.approx(3 / 4)
    assert distinct([[1, 0]] * 50) == pytest.approx(1 / 50)
    assert distinct([[1], []]) is None
    # No bigram reaches from one completion into the next.
    assert distinct([[1, 2], [3, 4]]) == 1.0


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({}, []),
        ({"rep_4": 0.14}, []),
        ({"rep_4": 0.16}, ["repeats itself: rep-4 0.16, the reference 0.05"]),
        ({"distinct_2": 0.31}, []),
        ({"distinct_2": 0.29}, ["little variety: dist-2 0.29, the reference 0.60"]),
        ({"tokens": 10.0}, []),
        ({"tokens": 40.0}, []),
        ({"tokens": 9.9}, ["other length: 9.9 tokens, the reference 20.0"]),
        ({"tokens": 40.5}, ["other length: 40.5 tokens, the reference 20.0"]),
        ({"rep_4": None, "distinct_2": None, "tokens": None}, []),
        ({"rep_4": 0.9, "distinct_2": 0.0, "tokens": 99.0}, ["repeats", "little", "other"]),
    ],
)
def test_what_differs_grossly_from_the_reference_is_said(changes: dict[str, float | None], signs: list[str]) -> None:
    found = signs_of_degeneration(replace(REFERENCE, method="qsharp", **changes), REFERENCE)
    assert len(found) == len(signs)
    assert all(line.startswith(sign) for line, sign in zip(found, signs, strict=True))
