"""Evaluation on test prompts: which policies, in which regimes, by which figures.

Read `grid.py` first (what is measured), then `measure.py` (how), `record.py` (the figures of one cell),
`constant_answer.py` (what needs no model) and `degeneration.py` (what a high reward may hide).
"""

from qtilt_trainer.evaluate.constant_answer import measure_constant_answer
from qtilt_trainer.evaluate.grid import Cell, Regime, grid
from qtilt_trainer.evaluate.measure import RECORD, evaluate
from qtilt_trainer.evaluate.record import Record, read_results, write_results

__all__ = [
    "RECORD",
    "Cell",
    "Record",
    "Regime",
    "evaluate",
    "grid",
    "measure_constant_answer",
    "read_results",
    "write_results",
]
