"""A run whose data, grader or size changes: noticed, refused with a way out, graded anew, extended."""

import json
from pathlib import Path
from typing import Any

import pytest

from file_task import content_id, write_problems
from qtilt_trainer.config import LoopConfig
from qtilt_trainer.digests import code_digests
from qtilt_trainer.loop import Run
from qtilt_trainer.rewards import Grader
from qtilt_trainer.rollouts import Rollout, RolloutStore
from qtilt_trainer.tasks import make_task
from stand_in_server import StandInServer
from star_graph import StarGraph
from stored_rollouts import store_graded

COMPLETIONS = "/v1/completions"
PROBLEMS = [(problem.prompt, problem.answer) for problem in StarGraph().problems("train", 10)]


class Work:
    """One run directory; every method is a process of its own as far as the trainer is concerned."""

    def __init__(self, directory: Path, server: StandInServer) -> None:
        self.directory, self.server = directory, server
        self.file = directory / "train.tsv"
        write_problems(self.file, PROBLEMS)  # type: ignore[arg-type]

    def run(self, prompts: int = 8, samples: int = 4, **tables: Any) -> Run:
        task = {"name": "file_task:FileTask", "train": str(self.file), "api_key": "hush-hush"}
        return Run(
            LoopConfig.model_validate(
                {
                    "run_dir": self.directory / "run",
                    "task": {**task, **tables.pop("task", {})},
                    "server": {
                        "url": self.server.url.replace("//", "//user:hush-hush@"),
                        "retries": 0,
                        "concurrency": 2,
                    },
                    "value_model": {"backbone": "none"},
                    "sampling": {"max_tokens": 8, **tables.pop("sampling", {})},
                    "collect": {"prompts": prompts, "samples_per_prompt": samples},
                    "fit": {"steps": 1},
                    "iterations": 1,
                    **tables,
                }
            )
        )

    def collect(self, **changes: Any) -> int:
        """How many completion requests it took, the trial left out."""
        before = len(self.server.bodies(COMPLETIONS))
        self.run(**changes).collect(1)
        asked = len(self.server.bodies(COMPLETIONS)) - before
        return max(0, asked - 1)

    def stored(self) -> list[Rollout]:
        return self.run().store.read(1)

    def edit(self, line: int, gold: str) -> None:
        problems = [tuple(text.split("\t")) for text in self.file.read_text().splitlines()]
        write_problems(self.file, [(p, gold if n == line else g) for n, (p, g) in enumerate(problems)])

    def fake_fit(self) -> Path:
        place = self.directory / "run" / "value_models" / "iteration-001"
        place.mkdir(parents=True)
        place.with_name("iteration-001.settings.json").write_text("{}")
        (self.directory / "run" / "results.json").write_text("[]")
        return place


@pytest.fixture
def work(tmp_path: Path) -> Any:
    with StandInServer() as server:
        work = Work(tmp_path, server)
        assert work.collect() == 8
        assert len(work.stored()) == 32
        yield work


def test_an_edited_gold_is_refused_until_it_is_undone_or_graded_anew(work: Work) -> None:
    before = {rollout.rollout_id: rollout for rollout in work.stored()}
    changed = content_id(*PROBLEMS[0])
    wrong = before[f"1/{changed}/0"].text + "?"
    original = work.file.read_text()
    work.edit(0, wrong)
    fitted = work.fake_fit()
    with pytest.raises(
        ValueError, match=r"settings \(data.train: .*undo the change, run `qtilt-trainer regrade CONFIG`"
    ):
        work.collect()
    work.file.write_text(original)
    assert work.collect() == 0
    work.edit(0, wrong)
    work.run().regrade(None)
    assert work.collect() == 0  # The prompt is known under its new id: nothing is asked again.
    after = work.stored()
    assert len(after) == 32
    new_id = content_id(PROBLEMS[0][0], wrong)
    assert {rollout.prompt_id for rollout in after} == {r.prompt_id for r in before.values()} - {changed} | {new_id}
    for rollout in after:
        if rollout.prompt_id == new_id:
            assert rollout.reward == 0.0
            assert rollout.token_ids == before[rollout.rollout_id.replace(new_id, changed)].token_ids
        else:
            assert rollout == before[rollout.rollout_id]
    # What was fitted on the old rewards is not used any more, and not deleted.
    assert not fitted.exists()
    aside = work.directory / "run" / "superseded-1"
    assert {path.name for path in aside.rglob("*") if path.name != "value_models"} == {
        "iteration-001",
        "iteration-001.settings.json",
        "results.json",
    }


def test_another_rule_for_cut_completions_needs_a_regrade(work: Work) -> None:
    with pytest.raises(ValueError, match=r"reward.truncated: 'zero' then, 'grade' now.*regrade CONFIG"):
        work.collect(reward={"truncated": "grade"})
    work.run(reward={"truncated": "grade"}).regrade(1)
    assert work.collect(reward={"truncated": "grade"}) == 0


def test_changed_reward_code_is_noticed(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import file_task

    other = tmp_path / "file_task.py"
    other.write_text(Path(file_task.__file__).read_text() + "\n# edited\n")
    monkeypatch.setattr(file_task, "__file__", str(other))
    with pytest.raises(ValueError, match=r"code.file_task.py: '\w{16}' then, '\w{16}' now.*regrade CONFIG"):
        work.collect()


def test_a_regrade_that_was_killed_can_not_be_taken_for_done(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    work.edit(0, "nothing")
    with monkeypatch.context() as patch:
        patch.setattr("qtilt_trainer.regrade.Grader.grade_part", fails)
        with pytest.raises(KeyboardInterrupt):
            work.run().regrade(None)
    for line, gold in ((0, "nothing"), (0, PROBLEMS[0][1])):
        work.edit(line, gold)
        with pytest.raises(ValueError, match=r"regrading: True then, None now.*regrade CONFIG"):
            work.collect()
    work.run().regrade(None)
    assert work.collect() == 0


def test_a_regrade_that_was_killed_between_two_parts_finds_all_prompts_again(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt whose gold changed has another id; when it is killed some of its completions have it already."""
    store = work.run().store
    split_into_parts(store)
    before = {rollout.rollout_id: rollout for rollout in work.stored()}
    new_id = content_id(PROBLEMS[0][0], "nothing")
    work.edit(0, "nothing")
    grade_part = Grader.grade_part
    graded: list[Path] = []

    def killed_at_the_second(grader: Grader, part: Path, again: bool = False) -> None:
        if graded:
            raise KeyboardInterrupt
        graded.append(part)
        grade_part(grader, part, again)

    with monkeypatch.context() as patch:
        patch.setattr(Grader, "grade_part", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            work.run().regrade(None)
    work.run().regrade(None)
    assert work.collect() == 0
    after = work.stored()
    assert len(after) == 32
    assert sum(rollout.prompt_id == new_id for rollout in after) == 4
    assert sorted(rollout.token_ids for rollout in after) == sorted(r.token_ids for r in before.values())


def split_into_parts(store: RolloutStore) -> None:
    """One completion of each prompt a part, as they may come from a server."""
    rollouts = store.read(1)
    for part in store.parts(1):
        part.unlink()
    for sample in range(4):
        store_graded(store, [rollout for rollout in rollouts if rollout.rollout_id.endswith(f"/{sample}")])


def test_a_fit_waits_for_rewards_that_a_killed_process_did_not_come_to(work: Work) -> None:
    before = work.stored()
    for file in (work.directory / "run/rollouts/iteration-001").glob("rewards-*.parquet"):
        file.unlink()
    with pytest.raises(ValueError, match=r"iteration 1 has 32 completions that nobody has graded yet: collect"):
        work.run().fit(1)
    assert work.collect() == 0
    assert work.stored() == before


def test_refused_prompts_that_are_asked_again_make_a_fit_a_new_one(work: Work) -> None:
    error = {"error": {"message": "too long", "param": "prompt"}}
    refused = PROBLEMS[8][0]
    work.server.before = lambda path, body: (400, error) if (body or {}).get("prompt") == refused else None
    assert work.collect(prompts=9) == 1
    fitted = work.fake_fit()
    work.server.before = lambda path, body: None
    assert work.collect(prompts=9) == 0
    assert fitted.exists()
    work.run(prompts=9).retry_refused()
    assert work.collect(prompts=9) == 1
    assert len(work.stored()) == 36
    assert not fitted.exists()


def test_refused_test_prompts_that_are_asked_again_make_all_records_new(work: Work) -> None:
    evaluation = work.directory / "run" / "evaluation"
    records = [evaluation / cell / "record.json" for cell in ("iteration-000/reference", "iteration-001/qsharp")]
    for record in records:
        record.parent.mkdir(parents=True)
        record.write_text("{}")
    work.run().retry_refused()
    assert all(record.exists() for record in records)
    (records[0].parent / "refused.jsonl").write_text('{"prompt_id": "1"}')
    work.run().retry_refused()
    assert [path for path in evaluation.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("stage", ["publish", "evaluate"])
def test_a_stage_does_not_take_a_fit_of_other_settings(work: Work, stage: str) -> None:
    work.fake_fit()
    with pytest.raises(ValueError, match=r"iteration-001.settings.json has other settings .*fit"):
        getattr(work.run(evaluate={"prompts": 2}), stage)(1)


def test_what_the_reward_imports_from_beside_it_is_its_code_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(
        "def score(completion, gold, problem):\n    import near\n    return near.one()\n"
    )
    (tmp_path / "near.py").write_text("from far import deep\nimport json\n")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "__init__.py").write_text("")
    (tmp_path / "far" / "deep.py").write_text("from . import deeper\n")
    (tmp_path / "far" / "deeper.py").write_text("from far.deep import what\n")
    (tmp_path / "stranger.py").write_text("")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')

    def digests() -> dict[str, str]:
        fields = {"name": "jsonl", "train": "train.jsonl", "reward": "my_reward.py:score"}
        return code_digests(make_task(fields), fields)

    before = digests()
    assert {"my_reward.py", "near.py", "__init__.py", "deep.py", "deeper.py"} < before.keys()
    assert "stranger.py" not in before
    (tmp_path / "far" / "deeper.py").write_text("\n")
    assert {name for name, digest in digests().items() if digest != before[name]} == {"deeper.py"}


def test_completions_whose_problem_was_taken_out_are_kept_without_a_reward(work: Work) -> None:
    problems = PROBLEMS[1:]
    write_problems(work.file, problems)  # type: ignore[arg-type]
    work.run().regrade(None)
    assert len(work.run().store.ids()) == 32
    assert len(work.stored()) == 28
    lines = (work.directory / "run/rollouts/iteration-001/failed_rewards.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all("not among the task's first `prompts` any more" in line for line in lines)
    assert work.collect() == 1  # The ninth problem is now among the first eight.
    assert len(work.stored()) == 32


def test_data_that_has_nothing_of_what_is_stored_is_no_reason_to_regrade(work: Work) -> None:
    before = work.stored()
    write_problems(work.file, [(prompt + "x", gold) for prompt, gold in PROBLEMS])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"none of the prompts in .* is in the task's data"):
        work.run().regrade(None)
    write_problems(work.file, PROBLEMS)  # type: ignore[arg-type]
    assert work.collect() == 0
    assert work.stored() == before


def test_a_regrade_does_not_hide_other_changes(work: Work) -> None:
    with pytest.raises(ValueError, match=r"sampling.max_tokens: 8 then, 9 now\): use another run_dir"):
        work.run(sampling={"max_tokens": 9}).regrade(None)


@pytest.mark.parametrize(("prompts", "samples", "asked"), [(10, 4, 2), (8, 6, 8), (10, 6, 10)])
def test_a_larger_run_asks_only_for_what_is_missing(work: Work, prompts: int, samples: int, asked: int) -> None:
    before = work.stored()
    fitted = work.fake_fit()
    assert work.collect(prompts=prompts, samples=samples) == asked
    after = {rollout.rollout_id: rollout for rollout in work.stored()}
    assert len(after) == prompts * samples
    assert all(after[rollout.rollout_id] == rollout for rollout in before)
    assert not fitted.exists()
    assert (work.directory / "run" / "superseded-1" / "value_models" / "iteration-001").exists()
    assert work.collect(prompts=prompts, samples=samples) == 0


def test_a_smaller_run_is_refused(work: Work) -> None:
    with pytest.raises(ValueError, match=r"collect.prompts was 8 and is 7: a run only grows"):
        work.collect(prompts=7)
    with pytest.raises(ValueError, match=r"collect.samples_per_prompt was 4 and is 2: a run only grows"):
        work.collect(samples=2)
    assert len(work.stored()) == 32


def test_output_without_its_settings_is_refused(work: Work) -> None:
    settings = work.directory / "run/rollouts/iteration-001/settings.json"
    text = settings.read_text()
    settings.unlink()
    with pytest.raises(ValueError, match=r"settings.json, and that file is missing: nobody knows how it was made"):
        work.collect()
    settings.write_text(text)
    assert work.collect() == 0


def test_secrets_are_in_nothing_that_is_written(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    run = work.run(evaluate={"prompts": 2, "decoding": ["sample"], "inv_eta": [1.0]})
    from qtilt_trainer.atomic_file import write_json
    from qtilt_trainer.redaction import redacted

    write_json(work.directory / "run" / "config.json", redacted(run.config.model_dump(mode="json")))
    written = [path for path in (work.directory / "run").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if b"hush-hush" in path.read_bytes()]
    settings = json.loads((work.directory / "run/rollouts/iteration-001/settings.json").read_text())
    assert settings["task"]["api_key"] == "***"
    assert "hush-hush" not in caplog.text
