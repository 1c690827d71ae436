"""Of several ranks one guides, and the others' logits become the same to the bit, whatever it does."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from guided_vllm.poisoned import POISON, broken_layer, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli, Categorical
from qtilt.vllm_plugin import step
from qtilt.vllm_plugin.ranks import FollowingBatch, Ranks
from running_batch import CPU, RunningBatch, make_residents

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS = 6
MAX_TOP_K = 40


class PlayedGroup:
    """Two ranks in one thread: what the first one sends waits for the second."""

    world_size = 2

    def __init__(self, rank_in_group: int, sent: list[Tensor]) -> None:
        self.rank_in_group = rank_in_group
        self._sent = sent

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        if self.rank_in_group == src:
            self._sent.append(input_.clone())
            return input_
        return input_.copy_(self._sent.pop(0))


class TwoRanks(RunningBatch):
    """A rank that guides by two value models, of which the first overflows on POISON, and one that follows."""

    def __init__(self, directory: Path, *, speculates: bool) -> None:
        sent: list[Tensor] = []
        guides, follows = (Ranks(PlayedGroup(rank, sent), MAX_TOP_K, CPU) for rank in range(2))
        assert [guides.guides, follows.guides] == [True, False]
        super().__init__(SLOTS, speculates=speculates, ranks=guides)
        self.following, self.sent = FollowingBatch(follows), sent
        residents = make_residents(SLOTS)
        of_poison = poison(make_value_model(directory / "first", "v", Bernoulli(), "gpt2", seed=1))
        other = make_value_model(directory / "second", "q", Categorical(-1.0, 2.0, 5), "llama", seed=2)
        self.first = residents.load_at_start("first", str(of_poison))
        self.second = residents.load_at_start("second", str(other))

    def check(self, logits_RV: Tensor, slots: list[int], drafts: dict[int, list[int]] | None = None) -> Tensor:
        """One step of both ranks: what it has made of the logits."""
        ours_RV = self.guide(slots, logits_RV.clone(), drafts)
        theirs_RV = self.following.guide(logits_RV.clone(), self.layout(slots, drafts))
        assert not self.sent, "not everything that was sent has been received"
        assert torch.equal(theirs_RV.view(torch.int32), ours_RV.view(torch.int32))
        return ours_RV


def logits_of(rows: int) -> Tensor:
    """Masks and a zero of either sign among them."""
    logits_RV = torch.randn(rows, REFERENCE_VOCAB) * 3
    logits_RV[:, 7], logits_RV[:, 8], logits_RV[:, 9], logits_RV[:, 10] = -torch.inf, torch.nan, -0.0, 0.0
    return logits_RV


@pytest.mark.parametrize("tail", ["floor", "mean"])
def test_of_guided_rows_of_two_versions_beside_unguided_and_failing_ones(tmp_path: Path, tail: str) -> None:
    ranks = TwoRanks(tmp_path, speculates=False)
    ranks.add(0, ranks.first, prompt(5, seed=1), tail=tail, temperature=0.7)
    ranks.add(1, ranks.second, prompt(9, seed=2), tail=tail, eta=0.003)
    ranks.add_unguided(2, prompt(6, seed=3))
    ranks.add(3, ranks.first, [4, POISON, 5], tail=tail)
    ranks.add(4, ranks.second, prompt(4, seed=5), tail=tail, temperature=0.0, top_k=MAX_TOP_K, method="cd")
    ranks.add(5, ranks.first, [POISON, 5], tail=tail, ending_token=None)
    for _ in range(3):
        before_RV = logits_of(SLOTS)
        after_RV = ranks.check(before_RV, list(range(SLOTS)))
        both = zip(after_RV, before_RV, strict=True)
        is_moved = [not torch.equal(after_V.nan_to_num(), before_V.nan_to_num()) for after_V, before_V in both]
        assert is_moved == [True, True, False, True, True, False]  # the last one fails, and has no token to end with
        for slot in range(SLOTS):
            ranks.requests.commit(slot, [3 + slot])


def test_of_a_version_that_raises_after_another_has_guided(tmp_path: Path) -> None:
    ranks = TwoRanks(tmp_path, speculates=False)
    ranks.add(0, ranks.first, prompt(5, seed=1))
    ranks.add(1, ranks.second, prompt(9, seed=2))
    logits_RV = logits_of(2)
    with broken_layer(ranks.first.engine.model.head):
        after_RV = ranks.check(logits_RV, [0, 1])
    assert int(after_RV[0].nan_to_num().argmax()) == 17
    assert int(after_RV[1].nan_to_num().argmax()) != 17


def test_of_a_step_that_breaks_off_when_all_is_done_but_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can end this request in this step: both ranks go on with the reference."""
    ranks = TwoRanks(tmp_path, speculates=False)
    ranks.add(0, ranks.second, prompt(5, seed=1), ending_token=None)
    monkeypatch.setattr(step, "end_unless", Mock(side_effect=RuntimeError("out of memory")))
    logits_RV = logits_of(1)
    assert torch.equal(ranks.check(logits_RV, [0]).nan_to_num(), logits_RV.nan_to_num())


def test_of_drafts(tmp_path: Path) -> None:
    ranks = TwoRanks(tmp_path, speculates=True)
    ranks.add(0, ranks.first, prompt(5, seed=1), guided_tokens=4)
    ranks.add_unguided(1, prompt(3, seed=2))
    ranks.add(2, ranks.second, prompt(9, seed=3), top_k=9, temperature=1.6)
    ranks.add(3, ranks.first, [4, POISON, 5])
    for _ in range(3):
        ranks.check(logits_of(8), [3, 0, 2, 1], {0: [5, 6], 2: [7], 1: [8]})
        for slot in range(4):
            ranks.requests.commit(slot, [3 + slot])


def test_both_know_when_a_step_has_guided_requests() -> None:
    """Else one would wait for the other."""
    following = FollowingBatch(Ranks(PlayedGroup(1, [torch.zeros(1)]), MAX_TOP_K, CPU))
    for slot in (1, 2, 4):
        following.put(slot)
    following.remove(2)
    following.remove(3)
    assert len(following) == 2
    following.keep_only([2, 4, 5])
    assert len(following) == 1
