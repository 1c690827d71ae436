"""Steps that are captured and replayed give what steps give that aren't, whatever the batch does in between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from played_graphs import PlayedGraphs
from qtilt.distributions import Bernoulli
from qtilt.forwards.modules import ModulesForward
from qtilt.vllm_plugin import captured
from qtilt.vllm_plugin.captured import Graphs, choose_graphs
from qtilt.vllm_plugin.failure import not_numbers
from qtilt.vllm_plugin.step import Guided
from running_batch import RunningBatch, make_residents

SLOTS = 7


class Runner(RunningBatch):
    """Of a value model that overflows on POISON, in pages."""

    def __init__(self, directory: Path, type_: str, graphs: Graphs | None, **more: bool) -> None:
        super().__init__(SLOTS, graphs=graphs, **more)
        path = poison(make_value_model(directory / type_, type_, Bernoulli(), "gpt2", seed=1))
        self.version = make_residents(SLOTS, kv_fraction=0.9).load_at_start("value", str(path))

    def put(self, slot: int, length: int, output: list[int] | None = None, **more: object) -> None:
        self.add(slot, self.version, prompt(length, seed=slot), output or [], **({"trace_id": str(slot)} | more))


@pytest.fixture(autouse=True)
def _capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs no forward is, for attention there asks the host; what is captured here may do so."""
    monkeypatch.setattr(ModulesForward, "is_capturable", True)


@pytest.mark.parametrize("type_", ["q", "v"])
def test_a_batch_in_which_everything_happens_is_guided_as_if_nothing_were_captured(tmp_path: Path, type_: str) -> None:
    graphs = PlayedGraphs()
    ours, plain = (Runner(tmp_path / str(each), type_, each) for each in (graphs, None))

    def both(act: Callable[[Runner], Tensor | None]) -> None:
        got, expected = act(ours), act(plain)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)

    both(lambda runner: runner.put(3, 9))
    both(lambda runner: runner.step({3: [5]}))
    both(lambda runner: runner.put(0, 30, method="cd", eta=0.5))
    both(lambda runner: runner.add_unguided(1, prompt(4, seed=1)))
    both(lambda runner: runner.put(5, 3, tail="mean", temperature=0.7, guided_tokens=3))
    for token in (6, 7):
        both(lambda runner, token=token: runner.step({0: [token], 1: [token], 3: [8], 5: [9]}))
    both(lambda runner: runner.put(6, 4, eta=0.02, candidate_mass=0.4))
    both(lambda runner: runner.put(2, 12, output=[4, 4]))
    both(lambda runner: runner.step({5: [3], 6: [1], 2: [POISON], 0: [4], 3: [2]}))
    both(lambda runner: runner.step({6: [1], 2: [1], 5: [4]}))
    both(lambda runner: runner.batch.look_for_failures())
    both(lambda runner: runner.step({2: [5], 3: [2], 6: [7]}))
    both(lambda runner: runner.put(3, 20))
    both(lambda runner: runner.step({3: [2], 6: [8]}))
    assert ours.records.failures() == plain.records.failures() == {"2": not_numbers()}
    drawn = {"0": [6, 7, 4], "5": [9, 9, 3], "6": [1, 1, 7, 8]}
    for trace, tokens in drawn.items():
        assert ours.summary(tokens, trace) == pytest.approx(plain.summary(tokens, trace), rel=1e-5)
    assert graphs.replayed == 7, "every step that guides something"
    assert {kind.rows for kind in ours.version.captured} == {1, 4, 8, 2}
    assert graphs.captured == len(ours.version.captured) < graphs.replayed


def test_rows_that_nobody_has_write_to_the_scratch_slot_only(tmp_path: Path) -> None:
    """Also where there was a request when a step of their kind was last replayed, in whose slot another one is now."""
    runner = Runner(tmp_path, "v", PlayedGraphs())
    for slot in range(4):
        runner.put(slot, 5 + slot)
    runner.step({slot: [5] for slot in range(4)})
    runner.put(3, 3, output=[9] * 17)
    runner.step({3: [7]})
    cache = runner.version.engine.cache
    held = [page for slot in range(3) for page in cache.pages.of(slot)]
    scratch = int(cache.pages.table_SM[cache.scratch_slot, 0])
    before = cache.memory.keys_LNGPD.clone()
    runner.step({1: [6], 2: [6], 0: [6]})
    changed = (cache.memory.keys_LNGPD != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert {kind.rows for kind in runner.version.captured} == {1, 4}
    assert set(changed) <= {*held, scratch}
    assert set(changed) >= set(held[:1])


@pytest.mark.parametrize(
    ("type_", "settings", "is_captured"),
    [
        ("v", [{"top_k": 5}, {"top_k": 5, "eta": 1.0}], True),
        ("v", [{"top_k": 5}, {"top_k": 6}], False),  # each costs its own
        ("q", [{"top_k": 5}, {"top_k": 6}], True),
        ("v", [{"candidate_mass": 0.5}, {}], True),  # all are run, and fewer count
        ("q", [{"candidate_mass": 0.5}, {}], True),
    ],
)
def test_what_the_host_must_know_in_each_step_is_not_captured(
    tmp_path: Path, type_: str, settings: list[dict[str, object]], is_captured: bool
) -> None:
    graphs = PlayedGraphs()
    runner = Runner(tmp_path, type_, graphs)
    for slot, more in enumerate(settings):
        runner.put(slot, 5, **more)
    runner.step({slot: [3] for slot in range(len(settings))})
    assert (graphs.replayed > 0) == is_captured


@pytest.mark.parametrize(
    ("type_", "most", "is_captured"), [("v", 12, True), ("v", 11, False), ("q", 4, True), ("q", 3, False)]
)
def test_steps_of_many_tokens_are_not_captured(
    tmp_path: Path, type_: str, most: int, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of a last token and 5 candidates, whose rows of a Q-type's head take less than another token."""
    monkeypatch.setattr(captured, "CAPTURED_TOKENS", most)
    graphs = PlayedGraphs()
    runner = Runner(tmp_path, type_, graphs)
    for slot in range(2):
        runner.put(slot, 5)
    runner.step({0: [3], 1: [3]})
    assert (graphs.replayed > 0) == is_captured


def test_with_speculation_nothing_is_captured(tmp_path: Path) -> None:
    graphs = PlayedGraphs()
    runner = Runner(tmp_path, "q", graphs, speculates=True)
    runner.put(0, 5)
    runner.step({0: [3, 4]}, {0: [3]})
    assert graphs.captured == 0


def test_a_step_that_cannot_be_captured_is_guided_nevertheless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class NoMemory:
        tries = 0

        def capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
            self.tries += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    broken = NoMemory()
    ours, plain = (Runner(tmp_path / str(each), "v", each) for each in (broken, None))
    for _ in range(3):
        for runner in (ours, plain):
            runner.put(0, 5)
        torch.testing.assert_close(ours.step({0: [3]}), plain.step({0: [3]}))
    assert broken.tries == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == captured.logger.name]
    assert message == "steps of 1 rows of value@1 can't be captured, and take longer"


def test_of_many_kinds_of_steps_the_least_recent_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And captured anew when they come again."""
    monkeypatch.setattr(captured, "MOST_KINDS", 2)
    graphs = PlayedGraphs()
    runner = Runner(tmp_path, "q", graphs)
    for top_k, count in [(3, 1), (4, 2), (3, 2), (5, 3), (3, 3), (4, 4), (3, 4)]:
        runner.put(0, 5, top_k=top_k)
        runner.step({0: [3]})
        assert graphs.captured == count
    assert [kind.asked.max_top_k for kind in runner.version.captured] == [4, 3]


def test_a_replay_that_gives_something_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class OfTheFirstRows:
        """Tilts as it did when it was captured."""

        replayed = 0

        def capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
            def replay() -> None:
                self.replayed += 1

            return step(), replay

    stale = OfTheFirstRows()
    ours, plain = (Runner(tmp_path / str(each), "v", each) for each in (stale, None))
    for runner in (ours, plain):
        runner.put(0, 5)
    for _ in range(3):
        torch.testing.assert_close(ours.step({0: [3]}), plain.step({0: [3]}))
    assert stale.replayed == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == captured.logger.name]
    assert message == "replayed steps of 1 rows of value@1 differ from what they replay: they aren't used"


def test_logits_are_alike_up_to_rounding_and_where_they_are_masked() -> None:
    before_BV = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, torch.nan, 3.0]])
    tilted_BV = before_BV - torch.tensor([[10.0], [0.0]])
    assert captured.are_alike(before_BV, tilted_BV, tilted_BV.clone())
    assert captured.are_alike(before_BV, tilted_BV, tilted_BV + 0.01)
    for place, value in (((0, 0), -8.5), ((0, 0), -torch.inf), ((0, 2), 1.0), ((1, 0), torch.nan), ((1, 2), 3.1)):
        again_BV = tilted_BV.clone()
        again_BV[place] = value
        assert not captured.are_alike(before_BV, tilted_BV, again_BV)


def test_logits_in_other_numbers_than_float32_are_not_captured(tmp_path: Path) -> None:
    graphs = PlayedGraphs()
    runner = Runner(tmp_path, "q", graphs)
    runner.put(0, 5)
    guided = runner.guide([0], torch.randn(1, REFERENCE_VOCAB, dtype=torch.float64))
    assert guided.dtype == torch.float64
    assert graphs.captured == 0


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_cpus_capture_nothing(enforce_eager: bool) -> None:
    assert choose_graphs(torch.device("cpu"), enforce_eager=enforce_eager) is None


def test_logits_that_do_not_lie_together_are_tilted_where_they_are(tmp_path: Path) -> None:
    """Guided requests between others, in an order of their own."""
    ours, plain = (Runner(tmp_path / str(each), "v", each) for each in (PlayedGraphs(), None))
    for runner in (ours, plain):
        for slot in (0, 2, 4):
            runner.put(slot, 5)
        for slot in (1, 3):
            runner.add_unguided(slot, prompt(4, seed=1))
    logits_BV = torch.randn(5, REFERENCE_VOCAB)
    guided, expected = (runner.guide([4, 1, 0, 3, 2], logits_BV.clone()) for runner in (ours, plain))
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(guided[[1, 3]], logits_BV[[1, 3]])
    assert not torch.isclose(guided[[0, 2, 4]], logits_BV[[0, 2, 4]]).all(-1).any()
