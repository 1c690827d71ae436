"""What was made from roll-outs that have since grown or been graded anew is moved aside, not deleted."""

import logging
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

RESULTS = ("results.json", "results.md", "config.json", "report.html", "plots")


def set_aside(run_dir: Path, iteration: int, reason: str) -> None:
    """Moves the fits from `iteration` on, and what was measured of them, to `superseded-N/` below the run directory.

    Roll-outs that such a fit rolled in stay: the reference completed them, so their rewards are still samples of Z.
    Each path is moved at once, a directory before the notes beside it: cut short, what is left is no finished output.
    """
    made = list(_made_from(run_dir, iteration))
    if not made:
        return
    aside = _free_place(run_dir)
    for path in made:
        place = aside / path.relative_to(run_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    logger.warning("%s: what was made from the roll-outs before is in %s, and is made anew", reason, aside)


def _made_from(run_dir: Path, iteration: int) -> Iterator[Path]:
    for folder, pattern in (
        ("value_models", "iteration-[0-9][0-9][0-9]"),
        ("value_models", "iteration-*.json"),
        ("published", "iteration-*.json"),
        ("evaluation", "iteration-*"),
    ):
        found = sorted((run_dir / folder).glob(pattern))
        yield from (path for path in found if int(path.name.removeprefix("iteration-")[:3]) >= iteration)
    yield from (path for name in RESULTS if (path := run_dir / name).exists())


def _free_place(run_dir: Path) -> Path:
    number = 1
    while (run_dir / f"superseded-{number}").exists():
        number += 1
    return run_dir / f"superseded-{number}"
