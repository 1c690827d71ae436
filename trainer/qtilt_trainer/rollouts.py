"""Roll-outs and their store: the only writer and reader of the roll-out files.

A store is a directory of Parquet parts, `iteration-001/part-00000.parquet`, …; each appears at once and complete, and
never changes. What a killed process had not written yet is simply missing, and `ids` tells a resumed one what to skip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qtilt_trainer.atomic_file import UNFINISHED, publish_file

FORMAT_VERSION = 1
_VERSION_KEY = b"qtilt_rollouts"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion with everything needed to label it and to make it again."""

    rollout_id: str
    """Unique: see `rollout_id`."""
    iteration: int
    prompt_id: str
    split: str
    prompt_token_ids: list[int]
    """As the server tokenised the prompt."""
    token_ids: list[int]
    """The completion as it was generated, end token included."""
    text: str
    finish_reason: str
    ended: bool
    """Whether the last token is the end token."""
    switch_point: int
    """g: how many tokens were asked to be guided; max_tokens when all of them were."""
    guided_tokens: int
    """How many were."""
    reward: float
    value_model: str | None
    """NAME@VERSION that guided; None without guidance."""
    eta: float | None
    method: str | None
    guidance_top_k: int | None
    temperature: float
    top_p: float
    sampling_top_k: int
    max_tokens: int
    seed: int
    """A request for this one completion with this seed makes it again, up to the server's rounding: what else is in a
    batch changes the last bits of vLLM's logits, and a draw near a boundary may then fall on the other side."""
    model: str
    """Server model id."""
    kl: float
    """Nats: sum over guided steps of KL(guided || reference); 0 without guidance."""


SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("ended", pa.bool_()),
        ("switch_point", pa.int32()),
        ("guided_tokens", pa.int32()),
        ("reward", pa.float64()),
        ("value_model", pa.string()),
        ("eta", pa.float64()),
        ("method", pa.string()),
        ("guidance_top_k", pa.int32()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("sampling_top_k", pa.int32()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("kl", pa.float64()),
    ],
    metadata={_VERSION_KEY: str(FORMAT_VERSION).encode()},
)


def rollout_id(iteration: int, prompt_id: str, sample: int) -> str:
    """The unique key of a roll-out within its store."""
    return f"{iteration}/{prompt_id}/{sample}"


class RolloutStore:
    """Roll-outs in a directory. One writer at a time; readers at any time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Writes one part for each iteration among `rollouts`, atomically and durably."""
        for iteration in sorted({rollout.iteration for rollout in rollouts}):
            self._write_part(iteration, [rollout for rollout in rollouts if rollout.iteration == iteration])

    def has(self, iteration: int) -> bool:
        """Whether any roll-out of this iteration is stored."""
        return any(self._parts(iteration))

    def ids(self) -> set[str]:
        """The ids of all stored roll-outs."""
        return set(self.table(columns=["rollout_id"]).column("rollout_id").to_pylist())

    def models(self) -> set[str]:
        """The server model ids of all stored roll-outs."""
        return set(self.table(columns=["model"]).column("model").to_pylist())

    def read(self, iteration: int | None = None) -> list[Rollout]:
        """All roll-outs, or those of one iteration, in the order of their ids."""
        names = [field.name for field in fields(Rollout)]
        columns = self.table(iteration).sort_by("rollout_id").to_pydict()
        return [Rollout(*values) for values in zip(*(columns[name] for name in names), strict=True)]

    def table(self, iteration: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as an Arrow table, unordered.

        Raises ValueError that names the file when a part is damaged or of another format, or an id occurs twice.
        """
        parts = [_read_part(part, columns) for part in self._parts(iteration)]
        table = pa.concat_tables(parts) if parts else _columns_of(SCHEMA.empty_table(), columns)
        _check_unique(table, self.directory)
        return table

    def remove_unfinished(self) -> None:
        """Deletes what a killed writer left half-written."""
        for leftover in self.directory.glob(f"iteration-*/*{UNFINISHED}"):
            leftover.unlink()

    def _write_part(self, iteration: int, rollouts: Sequence[Rollout]) -> None:
        directory = self.directory / f"iteration-{iteration:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"part-{_next_number(directory):05d}.parquet"
        unfinished = part.with_name(part.name + UNFINISHED)
        table = pa.Table.from_pylist([asdict(rollout) for rollout in rollouts], schema=SCHEMA)
        pq.write_table(table, unfinished, compression="zstd")
        publish_file(unfinished, part)

    def _parts(self, iteration: int | None) -> Iterator[Path]:
        pattern = "iteration-*" if iteration is None else f"iteration-{iteration:03d}"
        yield from sorted(self.directory.glob(f"{pattern}/part-*.parquet"))


def _next_number(directory: Path) -> int:
    return max((int(part.stem.removeprefix("part-")) for part in directory.glob("part-*.parquet")), default=-1) + 1


def _read_part(part: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        table: Any = pq.ParquetFile(part).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{part} is damaged ({error}): delete it, its roll-outs are made again") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    expected = _columns_of(SCHEMA.empty_table(), columns).schema
    if version != str(FORMAT_VERSION).encode() or table.schema != expected:
        raise ValueError(f"{part} is not a roll-out file of format version {FORMAT_VERSION}: use another run directory")
    return table


def _columns_of(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    return table if columns is None else table.select(list(columns))


def _check_unique(table: pa.Table, directory: Path) -> None:
    if "rollout_id" not in table.column_names:
        return
    counts = table.column("rollout_id").value_counts().to_pylist()
    twice = sorted(item["values"] for item in counts if item["counts"] > 1)
    if twice:
        raise ValueError(f"{directory}: {len(twice)} roll-out ids occur twice, the first is {twice[0]!r}")
