"""What the report shows of one run directory (layout: `loop.py`). Only reads; the server isn't needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qtilt.checkpoint import load_tokenizer, load_value_model
from qtilt.value_model import ValueModel
from qtilt_trainer.evaluate import Cell, Record, cell_directory
from qtilt_trainer.fit import FitPoint, fit_record_path
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
    tokens: list[Token]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompt answered by the reference and under guidance."""

    prompt: str
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything the report shows of one run."""

    task: str
    records: list[Record]
    fits: list[Fit]
    comparisons: list[Comparison]
    config: dict[str, Any]


def read_run(run_dir: Path) -> RunData:
    """Raises ValueError when the run has no results yet."""
    results = run_dir / "results.json"
    if not results.exists():
        raise ValueError(f"{run_dir} has no results.json: run `qtilt-trainer evaluate` or `loop` there first")
    records = [Record(**record) for record in json.loads(results.read_text(encoding="utf-8"))]
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    fits = _read_fits(run_dir / "value_models", len(config["iterations"]))
    return RunData(config["task"]["name"], records, fits, _compare(run_dir, records, len(fits)), config)


def _read_fits(directory: Path, iterations: int) -> list[Fit]:
    fits = []
    for iteration in range(1, iterations + 1):
        file = fit_record_path(directory / f"iteration-{iteration:03d}")
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            fits.append(Fit(iteration, content["labels"], [FitPoint(**point) for point in content["history"]]))
    return fits


def _compare(run_dir: Path, records: Sequence[Record], iteration: int) -> list[Comparison]:
    guided = [record for record in records if record.method == "qsharp" and record.decoding == "sample"]
    if not guided or not any(record.method == "reference" and record.decoding == "sample" for record in records):
        return []
    inv_eta = min((record.inv_eta or 0.0 for record in guided), key=lambda value: abs(value - SHOWN_INV_ETA))
    reference = _first_samples(run_dir, Cell(None, None, "sample"), 0)
    tilted = _first_samples(run_dir, Cell("qsharp", inv_eta, "sample"), iteration)
    directory = run_dir / "value_models" / f"iteration-{iteration:03d}"
    model = load_value_model(directory)
    tokenizer = load_tokenizer(directory)
    return [
        Comparison(
            str(tokenizer.decode(reference[prompt_id].prompt_token_ids)),
            [
                _completion("reference", reference[prompt_id], model, tokenizer),
                _completion(f"Q♯, η = {1 / inv_eta:g}", tilted[prompt_id], model, tokenizer),
            ],
        )
        for prompt_id in _chosen_prompts(reference, tilted, _middle(model))
    ]


def _first_samples(run_dir: Path, cell: Cell, iteration: int) -> dict[str, Rollout]:
    """prompt id -> the first completion."""
    rollouts = RolloutStore(cell_directory(run_dir / "evaluation", cell, iteration)).read()
    return {rollout.prompt_id: rollout for rollout in reversed(rollouts)}


def _middle(model: ValueModel) -> float:
    return (model.distribution.v_min + model.distribution.v_max) / 2


def _chosen_prompts(reference: dict[str, Rollout], guided: dict[str, Rollout], middle: float) -> list[str]:
    """The first prompts of each outcome, in the order of COMPARISONS."""
    outcome = {key: (reference[key].reward > middle, guided[key].reward > middle) for key in sorted(reference)}
    return [
        key for wanted, count in COMPARISONS.items() for key in [k for k in outcome if outcome[k] == wanted][:count]
    ]


def _completion(policy: str, rollout: Rollout, model: ValueModel, tokenizer: Any) -> Completion:
    values = completion_values(model, rollout.prompt_token_ids, rollout.token_ids)
    low, high = model.distribution.v_min, model.distribution.v_max
    scaled = [min(max((value - low) / (high - low), 0.0), 1.0) for value in values]
    pieces = _pieces(tokenizer, rollout.token_ids)
    tokens = [Token(text, value) for text, value in zip(pieces, scaled, strict=True)]
    return Completion(policy, rollout.reward, rollout.kl, tokens)


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds; joined they are the decoded completion, also where one character takes two tokens."""
    texts = [tokenizer.decode(token_ids[:end]).rstrip("\ufffd") for end in range(len(token_ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]
