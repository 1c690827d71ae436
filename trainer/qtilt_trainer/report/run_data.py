"""What the report shows of one run directory (layout: `loop.py`). Only reads; the server isn't needed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from qtilt.checkpoint import load_tokenizer, load_value_model
from qtilt.value_model import ValueModel
from qtilt_trainer.evaluate import Record, read_results
from qtilt_trainer.evaluate.degeneration import repetition
from qtilt_trainer.fit import FitPoint, fit_record_path
from qtilt_trainer.result_table import RegimeRecords, by_regime, described
from qtilt_trainer.rollouts import Rollout, RolloutStore
from qtilt_trainer.values import completion_values

SHOWN_INV_ETA = 10.0
"""Completions are shown at the 1/eta nearest to this: eta = 0.1, the default of requests."""
COMPARISONS = {(False, True): 4, (True, True): 1, (False, False): 1, (True, False): 1}
"""How many prompts are shown by (reference right, guided right), failures included. Right: above mid-range."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One iteration's fit: its label counts and training curves."""

    iteration: int
    labels: dict[str, int]
    history: list[FitPoint]
    cut: float | None
    """Share of the iteration's roll-outs that max_tokens cut; None when they are gone."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a completion and the return the value model expects after it, scaled to 0 (worst) … 1 (best)."""

    text: str
    value: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One policy's answer."""

    policy: str
    reward: float
    kl: float
    kl_candidates: float
    tokens: list[Token]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompt answered by the reference and under guidance, with the same seed."""

    prompt: str
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Degeneration:
    """A guided policy whose text differs grossly from the reference's, and a completion that shows it."""

    policy: str
    signs: list[str]
    example: str


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything the report shows of one run."""

    task: str
    tables: list[RegimeRecords]
    constant: str | None
    """The text of the best constant answer."""
    fits: list[Fit]
    compared_in: str
    """The regime of the comparisons."""
    comparisons: list[Comparison]
    degenerations: list[Degeneration]


def read_run(run_dir: Path) -> RunData:
    """Raises ValueError when the run has no results yet, or those of another version."""
    results = run_dir / "results.json"
    if not results.exists():
        raise ValueError(f"{run_dir} has no results.json: run `qtilt-trainer evaluate` or `loop` there first")
    records = read_results(results)
    if not records:
        raise ValueError(f"{results} is empty: run `qtilt-trainer evaluate` or `loop` there first")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    tables = by_regime(records)
    compared = _compared_table(tables)
    return RunData(
        task=records[0].task,
        tables=tables,
        constant=next((record.text for record in records if record.text is not None), None),
        fits=_read_fits(run_dir, len(config["iterations"])),
        compared_in=compared.regime.label if compared is not None else "",
        comparisons=_compare(run_dir, compared) if compared is not None else [],
        degenerations=_degenerations(run_dir, tables),
    )


def _read_fits(run_dir: Path, iterations: int) -> list[Fit]:
    fits = []
    for iteration in range(1, iterations + 1):
        file = fit_record_path(run_dir / "value_models" / f"iteration-{iteration:03d}")
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            history = [FitPoint(**point) for point in content["history"]]
            fits.append(Fit(iteration, content["labels"], history, _share_cut(run_dir / "rollouts", iteration)))
    return fits


def _share_cut(rollouts: Path, iteration: int) -> float | None:
    reasons = RolloutStore(rollouts).table(iteration, ["finish_reason"]).column("finish_reason")
    return pc.mean(pc.equal(reasons, "length").cast("float64")).as_py() if len(reasons) else None


def _compared_table(tables: Sequence[RegimeRecords]) -> RegimeRecords | None:
    """Where sampling truncates as guidance does, so that only guidance differs; else the first that samples."""
    sampled = [table for table in tables if not table.regime.is_greedy and _shown_record(table) is not None]
    return next((table for table in sampled if table.reference.is_truncated_to_candidates), next(iter(sampled), None))


def _shown_record(table: RegimeRecords) -> Record | None:
    """Q♯ at the 1/eta nearest to SHOWN_INV_ETA, with the first tail."""
    qsharp = [record for record in table.guided if record.method == "qsharp"]
    return min(qsharp, key=lambda record: abs((record.inv_eta or 0.0) - SHOWN_INV_ETA), default=None)


def _compare(run_dir: Path, table: RegimeRecords) -> list[Comparison]:
    shown = _shown_record(table)
    assert shown is not None
    reference, tilted = (_first_samples(run_dir, record) for record in (table.reference, shown))
    directory = run_dir / "value_models" / Path(str(shown.cell)).parent
    model = load_value_model(directory)
    tokenizer = load_tokenizer(directory)
    return [
        Comparison(
            str(tokenizer.decode(reference[prompt_id].prompt_token_ids)),
            [
                _completion("reference", reference[prompt_id], model, tokenizer),
                _completion(described(shown), tilted[prompt_id], model, tokenizer),
            ],
        )
        for prompt_id in _chosen_prompts(reference, tilted, _middle(model))
    ]


def _degenerations(run_dir: Path, tables: Sequence[RegimeRecords]) -> list[Degeneration]:
    return [
        Degeneration(f"{described(record)}, {table.regime.label}", signs, _telling_example(run_dir, table, record))
        for table in tables
        for record in table.guided
        if (signs := table.signs(record))
    ]


def _telling_example(run_dir: Path, table: RegimeRecords, record: Record) -> str:
    """The most repetitive completion where the cell repeats itself most, else one of median length."""
    rollouts = _stored(run_dir, record)
    if (record.rep_4 or 0.0) > (table.reference.rep_4 or 0.0):
        return max(rollouts, key=lambda rollout: repetition(rollout.token_ids)).text
    return sorted(rollouts, key=lambda rollout: len(rollout.token_ids))[len(rollouts) // 2].text


def _stored(run_dir: Path, record: Record) -> list[Rollout]:
    """The reward of what couldn't be graded is NaN: shown as such, and not right."""
    return RolloutStore(run_dir / "evaluation" / str(record.cell)).read(ungraded=math.nan)


def _first_samples(run_dir: Path, record: Record) -> dict[str, Rollout]:
    """prompt id -> the first completion."""
    return {rollout.prompt_id: rollout for rollout in reversed(_stored(run_dir, record))}


def _middle(model: ValueModel) -> float:
    return (model.distribution.v_min + model.distribution.v_max) / 2


def _chosen_prompts(reference: dict[str, Rollout], guided: dict[str, Rollout], middle: float) -> list[str]:
    """The first prompts of each outcome, in the order of COMPARISONS."""
    both = sorted(reference.keys() & guided.keys())
    outcome = {key: (reference[key].reward > middle, guided[key].reward > middle) for key in both}
    return [
        key for wanted, count in COMPARISONS.items() for key in [k for k in outcome if outcome[k] == wanted][:count]
    ]


def _completion(policy: str, rollout: Rollout, model: ValueModel, tokenizer: Any) -> Completion:
    values = completion_values(model, rollout.prompt_token_ids, rollout.token_ids)
    low, high = model.distribution.v_min, model.distribution.v_max
    scaled = [min(max((value - low) / (high - low), 0.0), 1.0) for value in values]
    pieces = _pieces(tokenizer, rollout.token_ids)
    tokens = [Token(text, value) for text, value in zip(pieces, scaled, strict=True)]
    return Completion(policy, rollout.reward, rollout.kl, rollout.kl_candidates, tokens)


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds; joined they are the decoded completion, also where one character takes two tokens."""
    texts = [tokenizer.decode(token_ids[:end]).rstrip("\ufffd") for end in range(len(token_ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]
