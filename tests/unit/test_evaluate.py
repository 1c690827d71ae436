"""The evaluation against the server: figures computed by hand from the stored completions."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtilt_trainer.client import GuidedClient
from qtilt_trainer.config import EvaluateConfig, SamplingConfig, SamplingOverride, ServerConfig, checked
from qtilt_trainer.evaluate import Record, evaluate
from qtilt_trainer.evaluate.grid import Cell, grid
from qtilt_trainer.evaluate.measure import _grade_stored
from qtilt_trainer.rewards import Rules, TooManyFailuresError
from qtilt_trainer.rollouts import Rollout, RolloutStore
from qtilt_trainer.server_errors import ServerError
from qtilt_trainer.tasks import Problem
from stand_in_server import StandInServer
from star_graph import StarGraph
from stored_rollouts import make_rollout, store_graded

TASK = StarGraph()
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, max_tokens=9)
CONCURRENCY = 4
PLAIN = (SamplingOverride(),)
CONFIG = EvaluateConfig(prompts=30, samples=4, inv_eta=(2.0, 10.0), methods=("qsharp", "cd"), sampling=PLAIN)


def run(server: StandInServer, directory: Path, config: EvaluateConfig = CONFIG, iteration: int = 1) -> list[Record]:
    async def once() -> list[Record]:
        async with GuidedClient(ServerConfig(url=server.url, retries=0, concurrency=CONCURRENCY)) as client:
            return await evaluate(
                client,
                TASK,
                directory,
                iteration,
                f"value@{iteration}",
                config,
                SAMPLING,
                CONCURRENCY,
                lambda cell: {"seed": config.seed, "regime": cell.regime.label},
            )

    return asyncio.run(once())


def by_name(records: list[Record]) -> dict[str, Record]:
    return {str(record.cell).split("/")[1]: record for record in records}


def right_answers(rollouts: list[Rollout]) -> dict[str, int]:
    """prompt id -> how many of its completions are right."""
    problems = {problem.id: problem for problem in TASK.problems("test", CONFIG.prompts)}
    right: dict[str, int] = dict.fromkeys(problems, 0)
    for rollout in rollouts:
        right[rollout.prompt_id] += rollout.text == problems[rollout.prompt_id].answer
    return right


def test_records_say_what_the_completions_say(tmp_path: Path) -> None:
    with StandInServer() as server:
        records = by_name(run(server, tmp_path))
    for name, place in (("reference-t0.7-k5-p0.9", "iteration-000"), ("cd-10-t0.7-k5-p0.9", "iteration-001")):
        rollouts = RolloutStore(tmp_path / place / name).read()
        right = right_answers(rollouts)
        record = records[name]
        assert record.cell == f"{place}/{name}"
        assert (record.n, record.samples, record.k, len(rollouts)) == (30, 4, 4, 120)
        assert record.accuracy == pytest.approx(sum(right.values()) / 120)
        assert record.pass_at_k == pytest.approx(sum(c > 0 for c in right.values()) / 30)
        # Two possible answers: three of four right win the vote, two of four share it.
        votes = {0: 0.0, 1: 0.0, 2: 0.5, 3: 1.0, 4: 1.0}
        assert record.maj_at_k == pytest.approx(sum(votes[c] for c in right.values()) / 30)
        assert record.low < record.accuracy < record.high
        assert record.tokens == np.mean([len(rollout.token_ids) for rollout in rollouts])
        assert (record.temperature, record.top_p, record.top_k, record.guidance_top_k) == (0.7, 0.9, 5, 20)
        assert record.regime == "T 0.7, top-k 5, top-p 0.9"
        assert record.cut == 0.0
    reference, guided = records["reference-t0.7-k5-p0.9"], records["cd-10-t0.7-k5-p0.9"]
    assert (reference.method, reference.value_model, reference.tail, reference.mass) == ("reference", None, None, None)
    assert (reference.kl, reference.kl_candidates, reference.gain) == (0.0, 0.0, None)
    assert (guided.method, guided.value_model, guided.tail, guided.mass) == ("cd", "value@1", "floor", 0.75)
    assert guided.kl == pytest.approx(0.25 * 5)
    assert guided.kl_candidates == pytest.approx(0.125 * 5)
    assert records["cd-10-greedy"].samples == records["cd-10-greedy"].k == 1


def test_mass_is_the_mean_over_guided_steps(tmp_path: Path) -> None:
    with StandInServer() as server:
        # Responses of different length: the mass of a response is 1 / how many of its tokens were guided.
        server.choice = lambda body, choice: choice["token_ids"].extend([3] * (body["seed"] % 3))
        server.mass = lambda guided: 1 / guided
        (record,) = [r for r in run(server, tmp_path) if r.cell == "iteration-001/cd-2-greedy"]
    lengths = [len(r.token_ids) for r in RolloutStore(tmp_path / "iteration-001" / "cd-2-greedy").read()]
    assert len(set(lengths)) > 1
    assert record.mass == pytest.approx(len(lengths) / sum(lengths))


def test_a_gain_is_over_the_reference_on_the_same_prompts_in_the_same_regime(tmp_path: Path) -> None:
    def answer_some_rightly(body: Any, choice: dict[str, Any]) -> None:
        """Guidance repairs a third of the prompts where top_k is 0, and breaks as many where it isn't."""
        if body.get("guidance") and body["seed"] % 3 == 0:
            choice["text"] = next(p.answer for p in problems if p.prompt == body["prompt"])
            choice["text"] += "?" if body["top_k"] else ""

    problems = TASK.problems("test", 30)
    overrides = (SamplingOverride(top_k=0), SamplingOverride(top_k=5))
    config = EvaluateConfig(prompts=30, samples=4, inv_eta=(2.0,), methods=("cd",), sampling=overrides)
    with StandInServer() as server:
        server.choice = answer_some_rightly
        records = by_name(run(server, tmp_path, config))
    for regime, sign in (("t0.7-p0.9", 1), ("t0.7-k5-p0.9", -1)):
        reference = right_answers(RolloutStore(tmp_path / "iteration-000" / f"reference-{regime}").read())
        guided = right_answers(RolloutStore(tmp_path / "iteration-001" / f"cd-2-{regime}").read())
        differences = [(guided[name] - reference[name]) / 4 for name in reference]
        record = records[f"cd-2-{regime}"]
        assert record.gain == pytest.approx(np.mean(differences))
        assert record.gain is not None and record.gain_low is not None and record.gain_high is not None
        assert sign * record.gain > 0
        assert record.gain_low < record.gain < record.gain_high


def test_requests_ask_for_the_cells_policy(tmp_path: Path) -> None:
    config = EvaluateConfig(
        prompts=1, samples=3, inv_eta=(4.0,), methods=("cd",), guidance_top_k=6, tails=(None, "mean"), sampling=PLAIN
    )
    with StandInServer() as server:
        run(server, tmp_path, config)
        reference, greedy, untruncated, *guided = server.bodies("/v1/completions")
    assert not any("guidance" in body for body in (reference, greedy, untruncated))
    guidance = {"value_model": "value@1", "eta": 0.25, "top_k": 6, "method": "cd", "guided_tokens": None}
    assert [body["guidance"] for body in guided] == [guidance] * 2 + [{**guidance, "tail": "mean"}] * 2
    assert len({body["seed"] for body in (reference, greedy, *guided)}) == 1
    for body in (reference, guided[0], guided[2]):
        assert (body["n"], body["temperature"], body["top_p"], body["top_k"]) == (3, 0.7, 0.9, 5)
    for body in (greedy, guided[1], guided[3]):
        assert (body["n"], body["temperature"], body["top_p"], body["top_k"]) == (1, 0.0, 1.0, 0)
    assert (untruncated["n"], untruncated["temperature"], untruncated["top_p"], untruncated["top_k"]) == (
        3,
        0.7,
        1.0,
        0,
    )


def test_every_regime_is_asked_for_and_has_its_own_completions(tmp_path: Path) -> None:
    overrides = (SamplingOverride(top_k=0, top_p=1.0), SamplingOverride(top_k="guidance", temperature=1.0))
    config = EvaluateConfig(
        prompts=1, inv_eta=(4.0,), methods=("cd",), guidance_top_k=6, decoding=("sample",), sampling=overrides
    )
    with StandInServer() as server:
        records = run(server, tmp_path, config)
        bodies = server.bodies("/v1/completions")
    drawn = [(body["temperature"], body["top_p"], body["top_k"], "guidance" in body) for body in bodies]
    assert drawn == [
        *((0.7, 1.0, 0, False), (1.0, 0.9, 6, False), (0.7, 1.0, 6, False), (1.0, 1.0, 0, False)),
        *((0.7, 1.0, 0, True), (1.0, 0.9, 6, True)),
    ]
    assert [(record.temperature, record.top_p, record.top_k) for record in records] == [body[:3] for body in drawn]
    assert len({record.cell for record in records}) == 6


def test_a_broken_off_evaluation_goes_on_in_its_cell_and_repeats_only_what_was_under_way(tmp_path: Path) -> None:
    with StandInServer() as server:
        whole = run(server, tmp_path / "whole")
        total = len(server.bodies("/v1/completions"))

        def fail_late(path: str, body: Any) -> tuple[int, Any] | None:
            late = len(server.bodies("/v1/completions")) > total + 70
            return (500, {"error": {"message": "broken"}}) if late else None

        server.before = fail_late
        with pytest.raises(ServerError, match="answered 500"):
            run(server, tmp_path / "parts")
        server.before = lambda path, body: None
        asked = len(server.bodies("/v1/completions"))
        assert run(server, tmp_path / "parts") == whole
        # The requests under way when one failed are cancelled, and may be asked for again.
        answered = total - (len(server.bodies("/v1/completions")) - asked)
        assert 70 - (CONCURRENCY - 1) <= answered <= 70
        # The reference is measured once, whatever the iteration.
        asked = len(server.bodies("/v1/completions"))
        second = run(server, tmp_path / "parts", iteration=2)
        assert len(server.bodies("/v1/completions")) - asked == total - 90
        assert second[:3] == whole[:3]


def test_what_a_killed_evaluation_had_stored_is_graded_and_not_counted_as_wrong(tmp_path: Path) -> None:
    with StandInServer() as server:
        before = run(server, tmp_path)
        asked = len(server.bodies("/v1/completions"))
        for cell in ("iteration-000/reference-greedy", "iteration-001/qsharp-10-greedy"):
            for file in (tmp_path / cell / "record.json", *(tmp_path / cell).glob("iteration-*/rewards-*.parquet")):
                file.unlink()
        assert run(server, tmp_path) == before
        assert len(server.bodies("/v1/completions")) == asked
    assert by_name(before)["reference-greedy"].accuracy > 0


def test_failures_of_a_killed_evaluation_are_a_share_of_all_that_it_had_stored(tmp_path: Path) -> None:
    class Fails(StarGraph):
        def reward(self, problem: Problem, completion: str) -> float:
            raise KeyError(problem.id)

    store, problems = RolloutStore(tmp_path), TASK.problems("test", 2)
    store_graded(store, [replace(make_rollout(problems[0].id, n), iteration=1) for n in range(200)])
    store.append([replace(make_rollout(problems[1].id, n), iteration=1) for n in range(8)])
    _grade_stored(Fails(), store, 1, problems, Rules())
    with pytest.raises(TooManyFailuresError, match="8 of 208 completions"):
        _grade_stored(Fails(), store, 1, problems, Rules(max_failed_share=0.03))


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    with StandInServer() as server:
        run(server, tmp_path)
        (tmp_path / "iteration-000" / "reference-greedy" / "record.json").write_text('{"decoding": "greedy"}')
        with pytest.raises(
            ValueError, match=r"reference-greedy/record\.json is of another version of qtilt .*delete it"
        ):
            run(server, tmp_path)


def test_a_cell_made_with_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    with StandInServer() as server:
        run(server, tmp_path, EvaluateConfig(prompts=2, inv_eta=(1.0,), seed=1))
        with pytest.raises(ValueError, match=r"other settings .seed: 1 then, 2 now"):
            run(server, tmp_path, EvaluateConfig(prompts=2, inv_eta=(1.0,), seed=2))


def test_a_cell_whose_tail_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    with StandInServer() as server:
        server.tail = lambda body: "mean" if body["seed"] % 2 else "floor"
        with pytest.raises(ValueError, match=r"qsharp-2-greedy.*tails floor and mean.*evaluate\.tails"):
            run(server, tmp_path, EvaluateConfig(prompts=8, inv_eta=(2.0,), decoding=("greedy",)))


def test_the_grid_is_every_policy_in_every_regime_the_references_first() -> None:
    assert [cell.name for cell in grid(CONFIG, SAMPLING)] == [
        *("reference-t0.7-k5-p0.9", "reference-greedy", "reference-t0.7"),
        *("qsharp-2-t0.7-k5-p0.9", "qsharp-2-greedy", "qsharp-10-t0.7-k5-p0.9", "qsharp-10-greedy"),
        *("cd-2-t0.7-k5-p0.9", "cd-2-greedy", "cd-10-t0.7-k5-p0.9", "cd-10-greedy"),
    ]


def test_the_reference_is_also_measured_untruncated_and_under_the_truncation_that_guidance_implies() -> None:
    overrides = (SamplingOverride(), SamplingOverride(temperature=0.8, top_p=0.9), SamplingOverride(top_k=50))
    config = EvaluateConfig(
        prompts=1, inv_eta=(2.0,), methods=("cd",), tails=("floor", "mean"), decoding=("sample",), sampling=overrides
    )
    assert [cell.name for cell in grid(config, SamplingConfig(max_tokens=4))] == [
        *("reference-t1", "reference-t0.8-p0.9", "reference-t1-k50", "reference-t1-k20", "reference-t0.8-k20-p0.9"),
        "reference-t0.8",
        *("cd-2-floor-t1", "cd-2-floor-t0.8-p0.9", "cd-2-floor-t1-k50"),
        *("cd-2-mean-t1", "cd-2-mean-t0.8-p0.9", "cd-2-mean-t1-k50"),
    ]


def test_by_default_policies_are_measured_plain_and_under_guidances_truncation() -> None:
    def sampled(sampling: SamplingConfig) -> list[str]:
        config = EvaluateConfig(prompts=1, inv_eta=(1.0,), methods=("cd",), decoding=("sample",))
        return [cell.regime.label for cell in grid(config, sampling)]

    assert sampled(SamplingConfig(max_tokens=4)) == ["T 1", "T 1, top-k 20"] * 2
    # Entries that come to the same are one regime.
    assert sampled(SamplingConfig(max_tokens=4, top_k=20)) == ["T 1, top-k 20", "T 1", "T 1, top-k 20"]


def test_cells_that_differ_have_different_places() -> None:
    strengths = (0.5, 1e-5, 10.0, 10.000001, 10.0000001)
    overrides = tuple(SamplingOverride(temperature=t, top_p=p) for t in (0.7, 0.70000001) for p in (0.9, 0.90000001))
    config = EvaluateConfig(
        prompts=1, inv_eta=strengths, methods=("cd",), tails=(None, "mean", "floor"), sampling=overrides
    )
    cells = grid(config, SamplingConfig(max_tokens=4))
    assert len({cell.place(3) for cell in cells}) == len(set(cells)) == len(cells)
    assert {"cd-0.5-greedy", "cd-1e-05-greedy", "cd-10-greedy"} <= {cell.name for cell in cells}
    greedy = next(cell for cell in cells if cell.regime.is_greedy)
    assert (Cell(None, None, None, greedy.regime).place(3), greedy.place(3)) == ("iteration-000/reference-greedy",) * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"top_k": "20"}, "sampling.0.top_k: must be a whole number >= 0 or \"guidance\", got '20'"),
        ({"top_k": -1}, "got -1"),
        ({"top_k": True}, "got True"),
        ({"temperature": 0.0}, "sampling.0.temperature: Input should be greater than 0"),
        ({"min_p": 0.1}, "sampling.0.min_p: there is no such field"),
    ],
)
def test_a_regime_that_is_none_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(EvaluateConfig, {"prompts": 1, "sampling": [entry]}, "evaluate")
