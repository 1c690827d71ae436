"""The report's figures. matplotlib's object interface only: no global state, no display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtilt_trainer.evaluate import Record
from qtilt_trainer.report.run_data import Fit, RunData

COLOURS = {"reference": "#6b7280", "qsharp": "#2563eb", "cd": "#ea580c"}
NAMES = {"reference": "reference", "qsharp": "Q♯", "cd": "CD"}
PANEL_INCHES = (5.2, 3.9)
DOTS_PER_INCH = 140


def plot_frontier(runs: Sequence[RunData], file: Path) -> None:
    """Accuracy against KL, and against 1/eta: one row a task. Bars are 95 % intervals over prompts."""
    figure, rows = _panels(len(runs), 2)
    for run, (by_kl, by_inv_eta) in zip(runs, rows, strict=True):
        shown = _sampled_or_greedy(run.records)
        _frontier(by_kl, shown)
        _sweep(by_inv_eta, shown)
        by_kl.set_title(f"{_title(run)}: accuracy and KL", loc="left")
        by_inv_eta.set_title(f"{_title(run)}: how strong a tilt it takes", loc="left")
        by_kl.legend(frameon=False, loc="lower left")
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


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, [list(row) for row in grid]


def _frontier(axes: Axes, records: Sequence[Record]) -> None:
    _reference_band(axes, records)
    for method in ("qsharp", "cd"):
        line = sorted(_of(records, method), key=lambda record: record.inv_eta or 0.0)
        _bars(axes, [record.kl for record in line], line, method)
        for place, label in _labels(line):
            axes.annotate(
                label,
                place,
                xytext=(6, -12 if method == "cd" else 5),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS[method],
                annotation_clip=False,
            )
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.05)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL(guided ‖ reference), nats a response (numbers: 1/η)")
    _accuracy_axis(axes, records)


def _labels(line: Sequence[Record]) -> list[tuple[tuple[float, float], str]]:
    """Where to write which 1/eta; points that lie on each other share one label at the last of them."""
    labels: list[tuple[tuple[float, float], str]] = []
    for record in line:
        place, label = (record.kl, record.accuracy), f"{record.inv_eta:g}"
        if labels and _is_near(labels[-1][0], place):
            label = f"{labels.pop()[1]}, {label}"
        labels.append((place, label))
    return labels


def _is_near(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return abs(first[0] - second[0]) < 0.1 * max(first[0], 0.5) and abs(first[1] - second[1]) < 0.03


def _sweep(axes: Axes, records: Sequence[Record]) -> None:
    _reference_band(axes, records)
    for method in ("qsharp", "cd"):
        line = sorted(_of(records, method), key=lambda record: record.inv_eta or 0.0)
        _bars(axes, [record.inv_eta or 0.0 for record in line], line, method)
    axes.set_xscale("log")
    ticks = sorted({record.inv_eta for record in records if record.inv_eta})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("1/η")
    _accuracy_axis(axes, records)


def _bars(axes: Axes, xs: Sequence[float], line: Sequence[Record], method: str) -> None:
    accuracies = [record.accuracy for record in line]
    below = [record.accuracy - record.low for record in line]
    above = [record.high - record.accuracy for record in line]
    axes.errorbar(
        xs,
        accuracies,
        yerr=[below, above],
        marker="o",
        markersize=5,
        linewidth=1.5,
        capsize=3,
        color=COLOURS[method],
        label=NAMES[method],
    )


def _reference_band(axes: Axes, records: Sequence[Record]) -> None:
    for record in _of(records, "reference"):
        axes.axhspan(record.low, record.high, color=COLOURS["reference"], alpha=0.15, linewidth=0)
        axes.axhline(record.accuracy, color=COLOURS["reference"], linestyle="--", label=NAMES["reference"])


def _accuracy_axis(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_ylabel(f"mean reward ({records[0].decoding})")
    if all(0 <= record.accuracy <= 1 for record in records):
        axes.set_ylim(0, 1.03)


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


def _sampled_or_greedy(records: Sequence[Record]) -> list[Record]:
    """Sampled records; those of greedy decoding when nothing was sampled."""
    sampled = [record for record in records if record.decoding == "sample"]
    return sampled or list(records)


def _of(records: Sequence[Record], method: str) -> list[Record]:
    return [record for record in records if record.method == method]


def _title(run: RunData) -> str:
    return run.task.replace("_", " ")
