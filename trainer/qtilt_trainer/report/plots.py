"""The report's figures. matplotlib's object interface only: no global state, no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator

from qtilt_trainer.evaluate import Record
from qtilt_trainer.report.run_data import Fit, RunData
from qtilt_trainer.result_table import NAMES, RegimeRecords

COLOURS = {"reference": "#4d4d4d", "constant": "#009e73", "qsharp": "#0072b2", "cd": "#d55e00"}
"""Of Okabe and Ito's palette: told apart with any colour vision."""
SOLID = ("-", "o")
STYLES = {"mean": ("--", "s")}
"""Tail -> line and marker; any other tail has SOLID."""
KL_TICKS = (0, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
PANEL_INCHES = (5.4, 3.9)
DOTS_PER_INCH = 150


def plot_frontier(runs: Sequence[RunData], file: Path) -> None:
    """Reward against KL: a column a task, a row a regime; greedy decoding only where nothing was sampled.

    Bars and bands are 95 % intervals over prompts. Where sampling keeps the candidates only, KL is the one given that
    the token is a candidate: by the chain rule its sum over the steps is the KL of what is sampled to the reference
    truncated alike. (Exactly so for top_k alone, as many as candidates; with the tail `mean` as long as no other token
    overtakes a candidate.) Elsewhere it is the KL before truncation: of what is sampled where nothing truncates.
    """
    shown = [_plotted(run) for run in runs]
    labels = list(dict.fromkeys(table.regime.label for tables in shown for table in tables))
    figure, rows = _panels(max(len(labels), 1), len(runs), sharey="col")
    for column, (run, tables) in enumerate(zip(runs, shown, strict=True)):
        by_label = {table.regime.label: table for table in tables}
        for row, label in enumerate(labels):
            axes, table = rows[row][column], by_label.get(label)
            if table is None:
                axes.set_axis_off()
                continue
            _frontier(axes, table)
            axes.set_title(f"{_title(run)}, {label}", loc="left")
            axes.set_ylabel("mean reward" if column == 0 else "")
    _legend(figure, [axes for row in rows for axes in row], columns=2 * len(runs))
    figure.savefig(file, dpi=DOTS_PER_INCH)


def plot_training(runs: Sequence[RunData], file: Path) -> None:
    """Loss on training and held-out prompts, and AUC, over the steps of every fit: one row a task."""
    figure, rows = _panels(len(runs), 2)
    for run, (losses, aucs) in zip(runs, rows, strict=True):
        for fit in run.fits:
            _curves(losses, aucs, fit)
        losses.set_title(f"{_title(run)}: loss (nats a token)", loc="left")
        aucs.set_title(f"{_title(run)}: AUC on held-out prompts", loc="left")
        for axes in (losses, aucs):
            axes.set_xlabel("optimiser step")
            if axes.lines:
                axes.legend(frameon=False)
    figure.savefig(file, dpi=DOTS_PER_INCH)


def frontier_x(record: Record) -> float:
    """The KL of what is sampled, as far as it is known: see `plot_frontier`."""
    kl = record.kl_candidates if record.is_truncated_to_candidates else record.kl
    return kl or 0.0


def kl_name(table: RegimeRecords) -> str:
    """What `frontier_x` is."""
    if table.reference.is_truncated_to_candidates:
        return "KL among the candidates"
    return "KL to the reference" if table.regime.is_untruncated else "KL before truncation"


def _plotted(run: RunData) -> list[RegimeRecords]:
    sampled = [table for table in run.tables if not table.regime.is_greedy]
    return sampled or list(run.tables)


def _panels(rows: int, columns: int, sharey: Literal["none", "col"] = "none") -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, [list(row) for row in grid]


def _frontier(axes: Axes, table: RegimeRecords) -> None:
    _level(axes, table.reference, "reference", "--")
    if table.truncated is not None:
        _level(axes, table.truncated, f"reference, top-k {table.truncated.top_k}", ":")
    if table.constant is not None:
        _level(axes, table.constant, NAMES["constant"], "-.")
    for method, tail in dict.fromkeys((record.method, record.tail) for record in table.guided):
        line = [record for record in table.guided if (record.method, record.tail) == (method, tail)]
        _line(axes, sorted(line, key=lambda record: record.inv_eta or 0.0))
    _open_markers(axes, [record for record in table.guided if table.signs(record)])
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.05)
    axes.xaxis.set_major_locator(FixedLocator(KL_TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{kl_name(table)}, nats a response")


def _level(axes: Axes, record: Record, label: str, linestyle: str) -> None:
    colour = COLOURS[record.method]
    axes.axhspan(record.low, record.high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(record.accuracy, color=colour, linestyle=linestyle, linewidth=1.4, label=label)


def _line(axes: Axes, line: Sequence[Record]) -> None:
    method, tail = line[0].method, line[0].tail
    linestyle, marker = STYLES.get(tail or "", SOLID)
    axes.errorbar(
        [frontier_x(record) for record in line],
        [record.accuracy for record in line],
        yerr=[[r.accuracy - r.low for r in line], [r.high - r.accuracy for r in line]],
        linestyle=linestyle,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        elinewidth=1.0,
        capsize=2.5,
        color=COLOURS[method],
        label=NAMES[method] + (f", tail {tail}" if tail else ""),
    )
    for place, label in _labels(line):
        axes.annotate(
            label,
            place,
            xytext=(6, -12 if method == "cd" else 5),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS[method],
            path_effects=[withStroke(linewidth=2, foreground="white")],
            annotation_clip=False,
        )


def _open_markers(axes: Axes, degenerate: Sequence[Record]) -> None:
    for record in degenerate:
        _, marker = STYLES.get(record.tail or "", SOLID)
        axes.plot(
            [frontier_x(record)],
            [record.accuracy],
            linestyle="none",
            marker=marker,
            markersize=5,
            markerfacecolor="white",
            markeredgecolor=COLOURS[record.method],
            zorder=5,
        )
    if degenerate:
        axes.plot([], [], "o", color="black", markerfacecolor="white", markersize=5, label="open: text degenerates")


def _labels(line: Sequence[Record]) -> list[tuple[tuple[float, float], str]]:
    """Where to write which 1/eta; points that lie on each other share one label at the last of them."""
    labels: list[tuple[tuple[float, float], str]] = []
    for record in line:
        place, label = (frontier_x(record), record.accuracy), f"{record.inv_eta:g}"
        if labels and _is_near(labels[-1][0], place):
            label = f"{labels.pop()[1]}, {label}"
        labels.append((place, label))
    return labels


def _is_near(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return abs(first[0] - second[0]) < 0.1 * max(first[0], 0.5) and abs(first[1] - second[1]) < 0.03


def _legend(figure: Figure, panels: Sequence[Axes], columns: int) -> None:
    """One for all panels, below them."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=columns, frameon=False
    )


def _curves(losses: Axes, aucs: Axes, fit: Fit) -> None:
    steps = [point.step for point in fit.history]
    shade = 1.0 if fit.iteration % 2 else 0.55
    name = f"iteration {fit.iteration}"
    losses.plot(
        steps,
        [point.train_loss for point in fit.history],
        color=COLOURS["reference"],
        alpha=shade,
        label=f"training, {name}",
    )
    held_out = [(point.step, point.held_out_loss) for point in fit.history if point.held_out_loss is not None]
    if held_out:
        losses.plot(*zip(*held_out, strict=True), color=COLOURS["qsharp"], alpha=shade, label=f"held out, {name}")
    scored = [(point.step, point.auc) for point in fit.history if point.auc is not None]
    if scored:
        aucs.plot(*zip(*scored, strict=True), color=COLOURS["qsharp"], alpha=shade, label=name)


def _title(run: RunData) -> str:
    return run.task.replace("_", " ")
