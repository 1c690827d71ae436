"""The report of a small finished run: what the page says, what it leaves out, and that it needs nothing else."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qtilt.checkpoint import load_value_model
from qtilt_trainer.config import Method
from qtilt_trainer.evaluate import Cell, Record, Regime, write_results
from qtilt_trainer.evaluate.grid import GREEDY
from qtilt_trainer.initialise import initialise_value_model
from qtilt_trainer.report import write_report
from qtilt_trainer.report.page import background
from qtilt_trainer.report.run_data import read_run
from qtilt_trainer.rollouts import Rollout, RolloutStore
from qtilt_trainer.values import completion_values
from stored_rollouts import store_graded
from tiny_backbone import write_tiny_backbone
from tiny_reference import build_tokenizer

PROMPT = [1, 6]
RIGHT, WRONG = [7, 8, 2], [9, 8, 2]


TRUNCATED, PLAIN = Regime(1.0, 1.0, 20), Regime(1.0, 1.0, 0)
CONSTANT = "a d | <d>"


def record(method: Method | None, inv_eta: float | None, regime: Regime, accuracy: float, rep_4: float = 0.0) -> Record:
    return Record(
        task="toy",
        method=method or "reference",
        n=3,
        accuracy=accuracy,
        low=accuracy - 0.1,
        high=accuracy + 0.05,
        inv_eta=inv_eta,
        tail=None if inv_eta is None else "floor",
        regime=regime.label,
        temperature=regime.temperature,
        top_p=regime.top_p,
        top_k=regime.top_k,
        guidance_top_k=20,
        gain=None if inv_eta is None else 0.25,
        gain_low=None if inv_eta is None else -0.0625,
        gain_high=None if inv_eta is None else 0.5,
        kl=0.0 if inv_eta is None else 0.1 * inv_eta,
        kl_candidates=0.0 if inv_eta is None else 0.03 * inv_eta,
        mass=None if inv_eta is None else 0.75,
        tokens=3.0,
        cut=0.125,
        rep_4=rep_4,
        distinct_2=0.5,
        samples=1,
        k=1,
        maj_at_k=accuracy,
        pass_at_k=accuracy,
        value_model=None if inv_eta is None else "toy@1",
        cell=Cell(method, inv_eta, None, regime).place(1),
    )


def constant_record() -> Record:
    return Record(task="toy", method="constant", n=3, accuracy=0.375, low=0.25, high=0.4375, text=CONSTANT)


def completion(prompt: int, right: bool, guided: bool) -> Rollout:
    return Rollout(
        rollout_id=f"{int(guided)}/test-{prompt}/0",
        iteration=int(guided),
        prompt_id=f"test-{prompt}",
        prompt_digest="d",
        split="test",
        prompt_token_ids=PROMPT,
        token_ids=RIGHT if right else WRONG,
        text="",
        finish_reason="stop",
        ended=True,
        switch_point=-1 if guided else 0,
        guided_tokens=3 if guided else 0,
        value_model="toy@1" if guided else None,
        eta=0.1 if guided else None,
        method="qsharp" if guided else None,
        guidance_top_k=20 if guided else None,
        tail="floor" if guided else None,
        temperature=1.0,
        top_p=1.0,
        sampling_top_k=0,
        max_tokens=4,
        seed=prompt,
        model="toy",
        kl=0.75 if guided else 0.0,
        kl_candidates=0.5 if guided else 0.0,
        mass=0.8 if guided else None,
        reward=float(right),
    )


POLICIES: list[tuple[Method | None, float | None]] = [
    (None, None),
    ("qsharp", 1.0),
    ("qsharp", 10.0),
    ("cd", 1.0),
    ("cd", 10.0),
]
RECORDS = [
    constant_record(),
    *(record(*policy, regime, 0.5) for policy in POLICIES for regime in (PLAIN, TRUNCATED, GREEDY)),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts: repaired, right both times, and broken by guidance. One letter of the alphabet is <."""
    root = tmp_path_factory.mktemp("run")
    write_tiny_backbone(root / "backbone", build_tokenizer(["a", "<", "\n", "d"]))
    value_models = root / "value_models"
    initialise_value_model(str(root / "backbone"), "v", {"name": "bernoulli"}, value_models / "iteration-001", 0.5)
    history = [
        {"step": step, "train_loss": 0.7, "held_out_loss": 0.6, "auc": 0.9, "calibration_error": 0.01}
        for step in (1, 2)
    ]
    labels = {
        "rollouts": 4321,
        "prompts": 8,
        "labelled_tokens": 99,
        "roll_in_tokens_masked": 7,
        "unanimous_rollouts_dropped": 5,
    }
    (value_models / "iteration-001.fit.json").write_text(json.dumps({"labels": labels, "history": history}))
    (root / "config.json").write_text(json.dumps({"task": {"name": "toy"}, "iterations": [{}]}))
    write_results(root / "results.json", RECORDS)
    rollouts = [completion(prompt, False, False) for prompt in range(8)]
    cut = [replace(rollout, iteration=1, finish_reason="length") for rollout in rollouts[:3]]
    RolloutStore(root / "rollouts").append([*cut, *[replace(rollout, iteration=1) for rollout in rollouts[3:]]])
    for cell, guided, rights in [
        (Cell(None, None, None, TRUNCATED), False, (False, True, True)),
        (Cell("qsharp", 10.0, None, TRUNCATED), True, (True, True, False)),
    ]:
        store = RolloutStore(root / "evaluation" / cell.place(1))
        store_graded(store, [completion(prompt, right, guided) for prompt, right in enumerate(rights)])
    return root


class Page(HTMLParser):
    """Everything the page refers to, its table rows and the titles of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.titles: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        self.titles += [value or "" for name, value in attributes if name == "title"]


@pytest.fixture(scope="module")
def page(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, Path]:
    out = tmp_path_factory.mktemp("report")
    file = write_report([run_dir], out)
    assert file == out / "report.html"
    text = file.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(text)
    return text, parsed, out


def test_the_page_needs_no_other_file(page: tuple[str, Page, Path]) -> None:
    text, parsed, _ = page
    assert len(parsed.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text


def test_plots_are_written_as_png_files_too(page: tuple[str, Page, Path]) -> None:
    _, _, out = page
    plots = sorted(file.name for file in (out / "plots").iterdir())
    assert plots == ["frontier.png", "training.png"]
    assert all((out / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_every_record_and_every_fit_has_its_row(page: tuple[str, Page, Path]) -> None:
    text, parsed, _ = page
    # Each regime: a heading, the reference, the constant answer and four guided policies; the plain one also has the
    # reference under guidance's truncation.
    assert parsed.rows == 3 * (1 + 2 + 4) + 1 + (1 + 1)
    assert "4321" in text
    assert "37.5&nbsp;%" in text  # Of the roll-outs were cut.


def test_tokens_carry_the_values_the_checkpoint_gives_them(page: tuple[str, Page, Path], run_dir: Path) -> None:
    _, parsed, _ = page
    model = load_value_model(run_dir / "value_models" / "iteration-001")
    right, wrong = ([f"{value:.3f}" for value in completion_values(model, PROMPT, tokens)] for tokens in (RIGHT, WRONG))
    # Repaired, right both times, broken; the reference's completion first.
    assert parsed.titles == [*wrong, *right, *right, *right, *right, *wrong]


def test_text_from_models_is_escaped_and_white_space_is_visible(page: tuple[str, Page, Path]) -> None:
    text, _, _ = page
    assert re.search(r">&lt;</span>", text)
    assert re.search(r">⏎</span><br>", text)


def test_failures_of_guidance_are_shown_too(run_dir: Path) -> None:
    rewards = [tuple(side.reward for side in pair.completions) for pair in read_run(run_dir).comparisons]
    assert rewards == [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)]


def test_completions_are_compared_where_sampling_truncates_as_guidance_does(
    page: tuple[str, Page, Path], run_dir: Path
) -> None:
    assert read_run(run_dir).compared_in == "T 1, top-k 20"
    assert "Drawn at T 1, top-k 20 with the same seed" in page[0]
    assert "KL 0.75, among candidates 0.50" in page[0]


def test_the_constant_answer_is_shown(page: tuple[str, Page, Path]) -> None:
    assert "<code>a·d·|·&lt;d&gt;</code>" in page[0]


def test_degenerate_text_is_said_and_shown(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    loud = record("qsharp", 10.0, TRUNCATED, 0.5, rep_4=0.25)
    write_results(
        copy / "results.json", [record(None, None, TRUNCATED, 0.5), loud, record("qsharp", 1.0, TRUNCATED, 0.5)]
    )
    store = RolloutStore(copy / "evaluation" / str(loud.cell))
    worst = replace(completion(9, False, True), token_ids=[7] * 8, text="so <good> so good")
    store.append([worst, replace(completion(8, False, True), token_ids=[7, 8] * 3, text="other")])
    (degeneration,) = read_run(copy).degenerations
    assert degeneration.policy == "Q♯, 1/η = 10, tail floor, T 1, top-k 20"
    assert degeneration.signs == ["repeats itself: rep-4 0.25, the reference 0.00"]
    assert degeneration.example == "so <good> so good"
    text = write_report([copy], tmp_path / "out").read_text(encoding="utf-8")
    assert "Where guided text degenerates" in text
    assert "so·&lt;good&gt;·so·good" in text


def test_nothing_is_said_of_degeneration_where_there_is_none(page: tuple[str, Page, Path]) -> None:
    assert "Where guided text degenerates" not in page[0]


def test_results_of_another_version_are_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps([{"task": "toy", "decoding": "sample"}]))
    with pytest.raises(ValueError, match=r"results\.json is of another version of qtilt .*'decoding'.*evaluate again"):
        write_report([tmp_path], tmp_path)


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results\.json"):
        write_report([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)


def test_a_run_that_only_decoded_greedily_has_a_page(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text((run_dir / "config.json").read_text())
    write_results(copy / "results.json", [record for record in RECORDS if record.regime in (None, "greedy")])
    assert "coloured" not in write_report([copy], copy).read_text(encoding="utf-8")


def test_colours_go_from_orange_over_white_to_blue() -> None:
    worst, middle, best = (
        [int(number) for number in re.findall(r"\d+", background(value))] for value in (0.0, 0.5, 1.0)
    )
    assert worst[0] > worst[2]
    assert best[2] > best[0]
    assert min(middle) > 240
