"""Writes the page: data from `run_data.py`, figures from `plots.py`, HTML from `page.html.j2`."""

import base64
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from qtilt_trainer.atomic_file import write_text
from qtilt_trainer.evaluate.degeneration import RULE
from qtilt_trainer.report.plots import plot_frontier, plot_training
from qtilt_trainer.report.run_data import Token, read_run
from qtilt_trainer.result_table import LEGEND, columns_of, title

WORST, MIDDLE, BEST = (234, 88, 12), (250, 250, 249), (37, 99, 235)
"""Orange, white, blue: told apart with any colour vision."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes `out/report.html` (everything inlined) and `out/plots/*.png`; returns the page's path.

    Raises ValueError for a run without results, or when none is given.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    plot_frontier(runs, plots / "frontier.png")
    plot_training(runs, plots / "training.png")
    environment = Environment(
        loader=PackageLoader("qtilt_trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["background"] = background
    environment.filters["visible"] = visible
    page = environment.get_template("page.html.j2").render(
        runs=runs,
        columns_of=columns_of,
        title=title,
        legend=LEGEND,
        rule=RULE,
        images={file.stem: _inline(file) for file in plots.glob("*.png")},
        scale=[Token("", step / 20) for step in range(21)],
        version=version("qtilt"),
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def background(value: float) -> str:
    """CSS colour of a value scaled to 0 … 1."""
    end, weight = (WORST, 1 - 2 * value) if value < 0.5 else (BEST, 2 * value - 1)
    # Never the full colour: black text stays readable on it.
    mixed = [round(middle + 0.65 * weight * (strong - middle)) for middle, strong in zip(MIDDLE, end, strict=True)]
    return f"rgb({mixed[0]}, {mixed[1]}, {mixed[2]})"


def visible(text: str) -> str:
    """A token's text with its white space made visible; HTML is escaped by the template."""
    return text.replace("\n", "⏎").replace(" ", "·")


def _inline(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
