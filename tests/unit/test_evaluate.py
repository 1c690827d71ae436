"""The evaluation grid against figures computed by hand from the stored completions."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.client import GuidedClient
from qtilt_trainer.config import EvaluateConfig, SamplingConfig, ServerConfig
from qtilt_trainer.evaluate import Record, evaluate, grid
from qtilt_trainer.result_table import result_table
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.server_errors import ServerError
from stand_in_server import StandInServer
from star_graph import StarGraph

TASK = StarGraph()
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, max_tokens=9)
CONCURRENCY = 4
CONFIG = EvaluateConfig(prompts=30, samples=4, inv_eta=(2.0, 10.0), methods=("qsharp", "cd"))


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
                lambda cell: {"seed": config.seed},
            )

    return asyncio.run(once())


def test_the_grid_is_the_reference_and_every_method_eta_and_decoding() -> None:
    assert [cell.name for cell in grid(CONFIG)] == [
        "reference-sample",
        "reference-greedy",
        "qsharp-2-sample",
        "qsharp-2-greedy",
        "qsharp-10-sample",
        "qsharp-10-greedy",
        "cd-2-sample",
        "cd-2-greedy",
        "cd-10-sample",
        "cd-10-greedy",
    ]


def test_records_say_what_the_completions_say(tmp_path: Path) -> None:
    with StandInServer() as server:
        records = run(server, tmp_path)
    by_name = {cell.name: record for cell, record in zip(grid(CONFIG), records, strict=True)}
    problems = {problem.id: problem for problem in TASK.problems("test", 30)}
    for name, place in (("reference-sample", "iteration-000"), ("cd-10-sample", "iteration-001")):
        rollouts = RolloutStore(tmp_path / place / name).read()
        right: dict[str, int] = dict.fromkeys(problems, 0)
        for rollout in rollouts:
            right[rollout.prompt_id] += rollout.text == problems[rollout.prompt_id].answer
        record = by_name[name]
        assert (record.n, record.samples, record.k, len(rollouts)) == (30, 4, 4, 120)
        assert record.accuracy == pytest.approx(sum(right.values()) / 120)
        assert record.pass_at_k == pytest.approx(sum(c > 0 for c in right.values()) / 30)
        # Two possible answers: three of four right win the vote, two of four share it.
        votes = {0: 0.0, 1: 0.0, 2: 0.5, 3: 1.0, 4: 1.0}
        assert record.maj_at_k == pytest.approx(sum(votes[c] for c in right.values()) / 30)
        assert record.low < record.accuracy < record.high
        assert record.kl == (0.0 if place == "iteration-000" else pytest.approx(0.25 * 5))
    assert by_name["reference-sample"].value_model is None
    assert by_name["cd-10-sample"].value_model == "value@1"
    assert by_name["cd-10-greedy"].samples == by_name["cd-10-greedy"].k == 1
    fields = {"task", "method", "inv_eta", "decoding", "accuracy", "low", "high", "kl", "n"}
    assert fields <= Record.__dataclass_fields__.keys()


def test_requests_ask_for_the_cells_policy(tmp_path: Path) -> None:
    with StandInServer() as server:
        run(server, tmp_path, EvaluateConfig(prompts=1, samples=3, inv_eta=(4.0,), methods=("cd",), guidance_top_k=6))
        reference, greedy, guided, greedy_guided = server.bodies("/v1/completions")
    assert "guidance" not in reference and "guidance" not in greedy
    guidance = {"value_model": "value@1", "eta": 0.25, "top_k": 6, "method": "cd", "guided_tokens": None}
    assert guided["guidance"] == greedy_guided["guidance"] == guidance
    assert len({body["seed"] for body in (reference, greedy, guided, greedy_guided)}) == 1
    assert (guided["n"], guided["temperature"], guided["top_p"], guided["top_k"]) == (3, 0.7, 0.9, 5)
    assert (greedy["n"], greedy["temperature"], greedy["top_p"], greedy["top_k"]) == (1, 0.0, 1.0, 0)


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
        assert len(server.bodies("/v1/completions")) - asked == total - 60
        assert second[:2] == whole[:2]


def test_a_cell_made_with_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    with StandInServer() as server:
        run(server, tmp_path, EvaluateConfig(prompts=2, inv_eta=(1.0,), seed=1))
        with pytest.raises(ValueError, match=r"other settings .seed: 1 then, 2 now"):
            run(server, tmp_path, EvaluateConfig(prompts=2, inv_eta=(1.0,), seed=2))


def test_cells_of_different_strength_have_different_places() -> None:
    strengths = (0.5, 1e-5, 10.0, 10.000001, 10.0000001)
    names = [cell.name for cell in grid(EvaluateConfig(prompts=1, inv_eta=strengths, methods=("cd",)))[2::2]]
    assert names[:3] == ["cd-0.5-sample", "cd-1e-05-sample", "cd-10-sample"]
    assert len(set(names)) == 5


def test_the_table_has_a_line_a_record() -> None:
    record = Record("t", "qsharp", 10.0, "sample", 0.95, 0.93, 0.97, 0.87, 300, 4, 4, 0.98, 0.99, "value@2")
    lines = result_table([record, Record(**{**json.loads(json.dumps(vars_of(record))), "method": "reference"})]).split(
        "\n"
    )
    assert len(lines) == 3
    assert lines[1].split() == [
        *("qsharp", "10", "sample", "0.950", "[0.930,", "0.970]", "0.870", "0.980", "0.990", "4", "300")
    ]
    assert len({len(line) for line in lines}) == 1


def vars_of(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__dataclass_fields__}
