"""The task of data files: formats, golds, splits and matchers, on files made here."""

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qtilt_trainer.tasks import Problem, Task, make_task
from qtilt_trainer.tasks.data_rows import read_rows, source_of
from qtilt_trainer.tasks.matching import MATCHERS
from qtilt_trainer.votes import votes

CATASTROPHIC = r"(a|aa)+\1+$"
ROWS: list[dict[str, Any]] = [{"prompt": f"question {n}", "answer": str(n)} for n in range(40)]


def write_jsonl(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def task_of(train: Path | str, **settings: Any) -> Task:
    return make_task({"name": "jsonl", "train": str(train), **settings})


def one_problem(tmp_path: Path, record: dict[str, Any], **settings: Any) -> tuple[Task, Problem]:
    file = write_jsonl(tmp_path / "one.jsonl", [record])
    other = write_jsonl(
        tmp_path / "other.jsonl", [{"prompt": "another", "answer": "1"} | record | {"prompt": "another"}]
    )
    task = task_of(file, test=str(other), **settings)
    (problem,) = task.problems("train", 1)
    return task, problem


# Formats


def as_jsonl(place: Path) -> Path:
    return write_jsonl(place / "rows.jsonl", ROWS)


def as_jsonl_with_byte_order_mark(place: Path) -> Path:
    lines = "\r\n".join(json.dumps(row) for row in ROWS)
    (place / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    return place / "rows.jsonl"


def as_compressed_jsonl(place: Path) -> Path:
    with gzip.open(place / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return place / "rows.jsonl.gz"


def as_parquet(place: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), place / "rows.parquet", row_group_size=7)
    return place / "rows.parquet"


def as_saved_dataset(place: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(place / "saved")
    return place / "saved"


def as_saved_dataset_with_splits(place: Path) -> Path:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(3))}).save_to_disk(place / "saved")
    return place / "saved"


def as_folder_of_files(place: Path) -> Path:
    (place / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), place / "folder" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), place / "folder" / "test-00000-of-00001.parquet")
    return place / "folder"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "write",
    [
        as_jsonl,
        as_jsonl_with_byte_order_mark,
        as_compressed_jsonl,
        as_parquet,
        as_saved_dataset,
        as_saved_dataset_with_splits,
        as_folder_of_files,
    ],
)
def test_every_format_gives_the_same_problems(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path)
    assert [row.record for row in read_rows(source, None, None)] == ROWS
    wanted = task_of(write_jsonl(tmp_path / "wanted.jsonl", ROWS), held_out=0.5)
    task = task_of(source, held_out=0.5)
    for split in ("train", "test"):
        assert task.problems(split, 10) == wanted.problems(split, 10)


def test_a_split_and_a_subset_of_a_directory_are_chosen_by_name(tmp_path: Path) -> None:
    source = as_folder_of_files(tmp_path)
    task = task_of(source, test=str(source), test_split="test", held_out=0.5)
    assert {problem.prompt for problem in task.problems("test", 3)} == {row["prompt"] for row in ROWS[:3]}
    assert len(task.problems("train", 37)) == 37
    (tmp_path / "folder" / "README.md").write_text(
        "---\nconfigs:\n- config_name: few\n  data_files: test-00000-of-00001.parquet\n"
        "- config_name: many\n  data_files: train-00000-of-00001.parquet\n---\n"
    )
    assert len(list(read_rows(source, "few", None))) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "dev"}, "has no split 'dev', only ['train', 'validation']"),
        ({"subset": "main"}, "what save_to_disk wrote has no subsets"),
    ],
)
def test_a_split_that_is_not_there_is_named(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    task = task_of(as_saved_dataset_with_splits(tmp_path), **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        task.problems("train", 1)


def test_a_hub_id_is_told_from_a_path_and_without_a_network_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    assert source_of("openai/gsm8k") == "openai/gsm8k"
    assert source_of("data/train.jsonl") == Path("data/train.jsonl")
    assert source_of("./gsm8k") == Path("gsm8k")
    assert source_of(str(tmp_path)) == tmp_path
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    task = task_of("nobody/no-such-data", subset="main", train_split="train")
    assert task.name == "no-such-data"
    with pytest.raises(
        ValueError, match=r"can't load nobody/no-such-data \(there is no file or directory .*HF_HUB_OFFLINE"
    ):
        task.problems("train", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b"{", "bad.jsonl, line 1: not JSON"),
        (
            "bad.jsonl",
            rb'{"prompt": "\ud83d", "answer": "1"}',
            "bad.jsonl, line 1: prompt and answer must be texts that UTF-8 can hold, and there is half a character",
        ),
        ("bad.jsonl", b'{"prompt": "a", "answer": "1"}\n\n[]', "bad.jsonl, line 3: a JSON object is needed, got list"),
        ("bad.jsonl", b'{"prompt": "\xff"}', "bad.jsonl, line 1: not UTF-8"),
        ("bad.jsonl", b'{"answer": "1"}', "line 1: no field 'prompt', only ['answer']"),
        ("bad.jsonl", b'{"prompt": 3, "answer": "1"}', "line 1: 'prompt' must be a text or a list of chat"),
        ("bad.jsonl", b'{"prompt": "a", "answer": null}', "'answer' must be a text, a number, true or"),
        ("bad.jsonl", b'{"prompt": "a", "answer": []}', "line 1: 'answer' is an empty list"),
        ("bad.jsonl", b'{"prompt": "a", "answer": [[1]]}', "or a list of them, got [1]"),
        ("bad.jsonl", b'{"prompt": "a", "answer": " "}', "line 1: 'answer' is empty"),
        ("bad.jsonl.gz", b"not compressed", "can't read"),
        ("bad.parquet", b"not parquet", "is not Parquet"),
        ("bad.csv", b"prompt,answer", "must end in one of .jsonl"),
        ("there-is-none.jsonl", None, "can't read"),
        ("there-is-none.parquet", None, "can't read"),
    ],
)  # fmt: skip
def test_a_bad_file_or_row_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        task_of(tmp_path / name).problems("train", 1)
    assert name in str(error.value)


def test_a_bad_row_of_parquet_and_of_a_dataset_is_named(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "last", "answer": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet, row 41: 'answer' must be"):
        task_of(tmp_path / "rows.parquet").problems("train", 1)
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "folder" / "train.parquet")
    with pytest.raises(ValueError, match=r"folder \(train\), row 41: 'answer' must be"):
        task_of(tmp_path / "folder").problems("train", 1)


# Prompts and golds


def test_fields_templates_and_answers_inside_answers_are_read(tmp_path: Path) -> None:
    task, problem = one_problem(
        tmp_path,
        {"prompt": "2+3?\u2028", "answer": "2+3=5\n#### 5"},
        answer_pattern="#### (.*)",
        template=r"{prompt} Use \boxed{}.",
        chat=True,
        match="numeric",
    )
    assert problem.prompt == [{"role": "user", "content": "2+3?\u2028 Use \\boxed{}."}]
    assert problem.answer == "5"
    assert task.reward(problem, "it is 5") == 1.0
    assert task.name == "one"


def test_chat_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": messages, "answer": "Hello"}])
    assert task_of(file, held_out=0.99).problems("test", 1)[0].prompt == messages


def test_nested_fields_are_reached_by_dots_and_a_missing_one_is_named(tmp_path: Path) -> None:
    record = {"data": {"text": "2+3?"}, "reward_model": {"ground_truth": "5", "style": "rule"}, "a.b": "with a dot"}
    file = write_jsonl(tmp_path / "verl.jsonl", [record])
    task = task_of(file, prompt_field="data.text", answer_field="reward_model.ground_truth", held_out=0.99)
    (problem,) = task.problems("test", 1)
    assert (problem.prompt, problem.answer) == ("2+3?", "5")
    assert task_of(file, prompt_field="a.b", answer_field="data.text", held_out=0.99).problems("test", 1)
    with pytest.raises(
        ValueError, match=re.escape("line 1: no field 'reward_model.truth', only ['ground_truth', 'style']")
    ):
        task_of(file, prompt_field="data.text", answer_field="reward_model.truth").problems("train", 1)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (["72", "seventy-two"], ["72", "seventy-two"], ["7"]),
        (72, ["72"], ["7"]),
        (0.5, ["0.5"], ["0.25"]),
        (True, ["True", "true"], ["False"]),
        (123456789012345678901234567890, ["123456789012345678901234567890"], ["1e29"]),
    ],
)
def test_golds_are_texts_numbers_booleans_and_lists_of_which_any_is_right(
    tmp_path: Path, answer: Any, right: list[str], wrong: list[str]
) -> None:
    task, problem = one_problem(tmp_path, {"prompt": "?", "answer": answer})
    assert [task.reward(problem, one) for one in right] == [1.0] * len(right)
    assert [task.reward(problem, one) for one in wrong] == [0.0] * len(wrong)


def test_the_gold_may_be_in_the_last_box_of_a_solution(tmp_path: Path) -> None:
    solution = r"First \boxed{3}, so $x = \boxed{\frac{1}{\sqrt{2}}}$."
    task, problem = one_problem(tmp_path, {"prompt": "?", "answer": solution}, answer_boxed=True, match="boxed")
    assert problem.answer == r"\frac{1}{\sqrt{2}}"
    assert task.reward(problem, r"\boxed{\frac{\sqrt{2}}{2}}") == 1.0
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "answer": r"\boxed{\frac{1}{2}"}])
    with pytest.raises(ValueError, match=re.escape(r"line 1: 'answer' has no complete \boxed{} in")):
        task_of(file, answer_boxed=True).problems("train", 1)


@pytest.mark.parametrize(
    ("settings", "answer", "message"),
    [
        ({"match": "numeric"}, "seven", "match = 'numeric' can't read the answer 'seven': there is no number in it"),
        (
            {"match": "boxed"},
            r"\frac{1}{",
            "match = 'boxed' can't read the answer '\\\\frac{1}{': its brackets are not",
        ),
        ({"match": "regex"}, "(", "match = 'regex' can't read the answer '(': not a regular expression"),
        ({"answer_pattern": "#### (.*)"}, "5", "'answer': answer_pattern '#### (.*)' finds nothing in '5'"),
        ({"answer_pattern": CATASTROPHIC}, "a" * 60 + "b", "takes too long in 'aaaa"),
    ],
)
def test_a_gold_that_can_not_be_matched_is_named_at_the_start(
    tmp_path: Path, settings: dict[str, str], answer: str, message: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "answer": answer}])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        task_of(file, test=str(file), **settings).problems("test", 1)
    assert f"{file}, line 1: " in str(error.value)


def test_rows_whose_gold_can_not_be_read_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"q{n}", "answer": "7" if n % 2 else "seven"} for n in range(300)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    task = task_of(file, test=str(write_jsonl(tmp_path / "t.jsonl", ROWS)), match="numeric", skip_unreadable=True)
    problems = task.problems("train", 150)
    assert {problem.answer for problem in problems} == {"7"}
    assert "the first because" in caplog.text
    assert task.problems("train", 20) == problems[:20]
    with pytest.raises(ValueError, match="has 150 train problems, not 151"):
        task.problems("train", 151)


# Splits and identity


def test_order_and_split_follow_from_the_seed_and_each_prompt_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "answer": n} for n in range(400)]
    first = task_of(write_jsonl(tmp_path / "a.jsonl", rows), held_out=0.25)
    shuffled = task_of(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), held_out=0.25)
    longer = task_of(write_jsonl(tmp_path / "c.jsonl", [{"prompt": "new", "answer": 1}, *rows]), held_out=0.25)
    other_seed = task_of(tmp_path / "a.jsonl", held_out=0.25, seed=1)
    for split, count in (("train", 270), ("test", 80)):
        problems = first.problems(split, count)
        assert first.problems(split, 20) == problems[:20]
        assert shuffled.problems(split, count) == problems
        assert [one for one in longer.problems(split, count) if one.prompt != "new"] == problems[: count - 1] or (
            longer.problems(split, count) == problems
        )
        assert other_seed.problems(split, count) != problems
        # Not the head of the file, nor its order.
        assert [problem.answer for problem in problems[:20]] != sorted(problem.answer for problem in problems[:20])
    train, test = ({problem.prompt for problem in first.problems(*part)} for part in (("train", 270), ("test", 80)))
    assert not train & test
    assert 0.15 < 1 - len(_all(first, "train")) / 400 < 0.35


def _all(task: Task, split: Any) -> list[Problem]:
    with pytest.raises(ValueError, match="ask for less") as error:
        task.problems(split, 10**6)
    count = int(re.search(r"has (\d+) ", str(error.value))[1])  # type: ignore[index]
    return task.problems(split, count)


def test_an_id_changes_with_prompt_or_gold_and_with_nothing_else(tmp_path: Path) -> None:
    def id_of(prompt: str, answer: str, n: int, **settings: Any) -> str:
        file = write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": prompt, "answer": answer, "extra": n}])
        return task_of(file, test=str(file), **settings).problems("test", 1)[0].id

    same = {id_of("a", "1", 1), id_of("a", "1", 2), id_of("a", "1", 3, seed=4, match="numeric")}
    assert len(same) == 1
    assert len({id_of("b", "1", 4), id_of("a", "2", 5), id_of("a", "1", 6, template="{prompt}!")} | same) == 4


def test_repeated_rows_are_kept_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, *ROWS[:5], {"prompt": "question 0", "answer": "another gold"}]
    task = task_of(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(_all(task, "train")) + len(_all(task, "test")) == 41
    assert "5 of 46 rows repeat another one" in caplog.text


def test_prompts_that_are_in_both_files_are_test_prompts_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = [*ROWS[:4], {"prompt": "question 4", "answer": "another gold"}]
    task = task_of(write_jsonl(tmp_path / "a.jsonl", ROWS), test=str(write_jsonl(tmp_path / "b.jsonl", test)))
    assert not {one.prompt for one in _all(task, "train")} & {one.prompt for one in _all(task, "test")}
    assert len(_all(task, "train")) == 35
    assert "left out 5 of 40 training problems: their prompts are test prompts too" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_boxed": True, "answer_pattern": "a"}, "answer_boxed and answer_pattern both say where the answer is"),
        ({"test_split": "test"}, "test_split is a split of `test`, and `test` is not given"),
        ({"pattern": "("}, "task.pattern: not a regular expression"),
        ({"held_out": 1.0}, "task.held_out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task_of("rows.jsonl", match="regex", **settings)


def test_a_file_has_neither_subset_nor_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a file, and has neither subset nor split"):
        task_of(as_jsonl(tmp_path), train_split="train").problems("train", 1)


# Matchers and votes


@pytest.mark.parametrize(
    ("match", "pattern", "expected", "completion", "right"),
    [
        ("exact", None, "yes", " yes\n", True),
        ("exact", None, "yes", "Yes", False),
        ("regex", None, r"(?i)\bparis\b", "It is Paris.", True),
        ("regex", None, r"(?i)\bparis\b", "It is London.", False),
        ("regex", r"Answer: (\w+)", "B", "Answer: A ... Answer: B", True),
        ("regex", r"Answer: (\w+)", "A", "Answer: A ... Answer: B", False),
        ("regex", r"Answer: (\w+)", "A", "A", False),
    ],
)
def test_exact_and_regex_matching(match: str, pattern: str | None, expected: str, completion: str, right: bool) -> None:
    assert MATCHERS[match].matches(expected, completion, pattern) is right


@pytest.mark.parametrize("pattern", [None, CATASTROPHIC])
def test_a_pattern_that_never_ends_is_no_match_and_said(pattern: str | None, caplog: pytest.LogCaptureFixture) -> None:
    begun = time.process_time()
    expected = CATASTROPHIC if pattern is None else "a"
    assert MATCHERS["regex"].matches(expected, "a" * 200 + "b", pattern) is False
    if pattern is not None:
        assert MATCHERS["regex"].extract("a" * 200 + "b", pattern) is None
    assert time.process_time() - begun < 10
    assert "counted as no match" in caplog.text


@pytest.mark.parametrize(
    ("match", "completions", "wanted"),
    [
        ("numeric", ["1/2", "it is 0.5", "50%", "0.25", "none"], [0, 0, 0, 3, None]),
        ("boxed", [r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{x+1}", r"\boxed{1+x}", "0.5"], [0, 0, 2, 2, None]),
        ("exact", ["a", "a ", "b"], [0, 0, 2]),
    ],
)
def test_answers_that_the_matcher_calls_equal_vote_together(
    tmp_path: Path, match: str, completions: list[str], wanted: list[int | None]
) -> None:
    task, problem = one_problem(tmp_path, {"prompt": "?", "answer": "1/2"}, match=match)
    voted = votes(task, problem, completions)
    assert [None if vote is None else voted.index(vote) for vote in voted] == wanted


def test_an_answer_that_fails_has_no_vote(caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        def answer(self, problem: Problem, completion: str) -> Any:
            return ["a", "list"] if completion == "unhashable" else json.loads(completion)["x"]

        def same_answer(self, problem: Problem, one: Any, other: Any) -> bool:
            return bool(one / 0 == other)

    completions = ['{"x": 1}', "no JSON", "unhashable", '{"x": 2}', '{"x": 1}', '{"y": 1}']
    assert votes(Fails(), Problem("7", "?", ""), completions) == [1, None, None, 2, 1, None]  # type: ignore[arg-type]
    assert "task.answer fails on a completion of problem 7" in caplog.text
    assert "task.same_answer fails on (1, 2), which then are two answers" in caplog.text


def test_votes_compare_only_answers_that_are_written_differently() -> None:
    compared = []

    class Counting:
        def answer(self, problem: Problem, completion: str) -> str:
            return completion

        def same_answer(self, problem: Problem, one: str, other: str) -> bool:
            compared.append((one, other))
            return one.lower() == other.lower()

    task: Any = Counting()
    assert votes(task, Problem("1", "?", ""), ["a", "A", "a", "b", "A", "B"]) == ["a", "a", "a", "b", "a", "b"]
    assert compared == [("a", "A"), ("a", "b"), ("a", "B"), ("b", "B")]
