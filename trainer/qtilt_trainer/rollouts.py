"""Roll-outs and their store: the only writer and reader of the roll-out files.

A store is a directory of Parquet parts. `iteration-001/part-00000.parquet` holds completions, which never change;
`iteration-001/rewards-00000.parquet` beside it holds their rewards, row by row, and is written when they are graded: a
completion is on disk before anything is known about its reward. Each file appears at once and complete. What a killed
process had not written yet is simply missing: `ids` tells a resumed one what to skip.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qtilt_trainer.atomic_file import UNFINISHED, publish_file

FORMAT_VERSION = 2
_VERSION_KEY = b"qtilt_rollouts"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion with everything needed to label it and to make it again."""

    rollout_id: str
    """Unique: see `rollout_id`."""
    iteration: int
    prompt_id: str
    prompt_digest: str
    """Of the task's prompt alone: finds the problem again when its id has changed with its gold answer."""
    split: str
    prompt_token_ids: list[int]
    """As the server tokenised the prompt."""
    token_ids: list[int]
    """The completion as it was generated, end token included."""
    text: str
    """The answer as a task sees it: `sampling.prefill` and what was generated."""
    finish_reason: str
    """stop, or length: cut by max_tokens."""
    ended: bool
    """Whether nothing can follow: the last token is an end token, or the one that completed a stop string."""
    switch_point: int
    """g: how many tokens were asked to be guided; max_tokens when all of them were."""
    guided_tokens: int
    """How many were."""
    value_model: str | None
    """NAME@VERSION that guided; None without guidance."""
    eta: float | None
    method: str | None
    guidance_top_k: int | None
    tail: str | None
    """What tokens that are no candidates got: floor or mean."""
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
    kl_candidates: float
    """The same given that the token is a candidate."""
    mass: float | None
    """Mean over guided steps of the reference's mass in the candidates; None without guidance."""
    reward: float = math.nan
    """NaN until it is graded."""


SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("iteration", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt_digest", pa.string()),
        ("split", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("ended", pa.bool_()),
        ("switch_point", pa.int32()),
        ("guided_tokens", pa.int32()),
        ("value_model", pa.string()),
        ("eta", pa.float64()),
        ("method", pa.string()),
        ("guidance_top_k", pa.int32()),
        ("tail", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("sampling_top_k", pa.int32()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("kl", pa.float64()),
        ("kl_candidates", pa.float64()),
        ("mass", pa.float64()),
    ],
    metadata={_VERSION_KEY: str(FORMAT_VERSION).encode()},
)
REWARDS = pa.schema(
    [("reward", pa.float64()), ("failure", pa.string())],
    metadata={_VERSION_KEY: str(FORMAT_VERSION).encode()},
)
"""`failure`: why a completion could not be graded."""


def rollout_id(iteration: int, prompt_id: str, sample: int) -> str:
    """The unique key of a roll-out within its store."""
    return f"{iteration}/{prompt_id}/{sample}"


def read_compactly() -> None:
    """From now on Arrow allocates through jemalloc where this build has it.

    A large store is many small parts: with Arrow's usual allocator their token lists take half as much again as they
    hold (424 instead of 306 MiB for 120,000 roll-outs of 512 tokens).
    """
    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())


class RolloutStore:
    """Roll-outs in a directory. One writer at a time; readers at any time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def append(self, rollouts: Sequence[Rollout]) -> Path:
        """Writes the completions of one iteration as a part, atomically and durably; their rewards come later."""
        (iteration,) = {rollout.iteration for rollout in rollouts}
        directory = self.iteration_directory(iteration)
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"part-{_next_number(directory):05d}.parquet"
        _write(pa.Table.from_pylist([asdict(rollout) for rollout in rollouts], schema=SCHEMA), part)
        return part

    def set_rewards(self, part: Path, rewards: Sequence[float | None], failures: Sequence[str | None]) -> None:
        """Writes or replaces the rewards of a part, in the order of its rows."""
        _write(pa.Table.from_pydict({"reward": rewards, "failure": failures}, schema=REWARDS), _rewards_file(part))

    def is_graded(self, part: Path) -> bool:
        """Whether the part has rewards, be it for none of its completions."""
        return _rewards_file(part).exists()

    def rename_prompts(self, part: Path, new_ids: Mapping[str, str]) -> None:
        """Gives prompts of a part another id, rewards and all else staying as they are."""
        table = self.read_part(part, SCHEMA.names)
        prompt_ids = table.column("prompt_id").to_pylist()
        if new_ids.keys().isdisjoint(prompt_ids):
            return
        renamed = [new_ids.get(prompt_id, prompt_id) for prompt_id in prompt_ids]
        rollout_ids = [
            rollout_id(iteration, prompt_id, int(old.rpartition("/")[2]))
            for iteration, prompt_id, old in zip(
                table.column("iteration").to_pylist(), renamed, table.column("rollout_id").to_pylist(), strict=True
            )
        ]
        for name, values in (("prompt_id", renamed), ("rollout_id", rollout_ids)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        _write(table.cast(SCHEMA).replace_schema_metadata(SCHEMA.metadata), part)

    def iteration_directory(self, iteration: int) -> Path:
        """Where the parts of an iteration are."""
        return self.directory / f"iteration-{iteration:03d}"

    def has(self, iteration: int) -> bool:
        """Whether any completion of this iteration is stored."""
        return bool(self.parts(iteration))

    def ids(self) -> set[str]:
        """The ids of all stored completions."""
        return set(self.table(columns=["rollout_id"]).column("rollout_id").to_pylist())

    def prompt_ids(self) -> set[str]:
        """The prompts of all stored completions."""
        return set(pc.unique(self.table(columns=["prompt_id"]).column("prompt_id")).to_pylist())

    def models(self) -> set[str]:
        """The server model ids of all stored completions."""
        return set(pc.unique(self.table(columns=["model"]).column("model")).to_pylist())

    def read(self, iteration: int | None = None, ungraded: float | None = None) -> list[Rollout]:
        """All roll-outs, or those of one iteration, in the order of their ids. For few: `table` takes less memory.

        ungraded: the reward of those that have none; None: they are left out.
        """
        names = [field.name for field in fields(Rollout)]
        table = self.table(iteration, names).sort_by("rollout_id")
        rewards = table.column("reward")
        if ungraded is None:
            table = table.filter(pc.is_valid(rewards))
        else:
            table = table.set_column(names.index("reward"), "reward", pc.fill_null(rewards, ungraded))
        columns = table.to_pydict()
        return [Rollout(*values) for values in zip(*(columns[name] for name in names), strict=True)]

    def table(self, iteration: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as an Arrow table, in the order of the parts; `reward` is null where there is none.

        columns: of SCHEMA and REWARDS; None: all.
        Raises ValueError that names the file when a part is damaged or of another format, or an id occurs twice.
        """
        names = list(columns) if columns is not None else [*SCHEMA.names, *REWARDS.names]
        parts = [self.read_part(part, names) for part in self.parts(iteration)]
        table = pa.concat_tables(parts) if parts else _schema_of(names).empty_table()
        _check_unique(table, self.directory)
        return table

    def parts(self, iteration: int | None = None) -> list[Path]:
        """The files of completions, in the order they were written."""
        pattern = "iteration-*" if iteration is None else f"iteration-{iteration:03d}"
        return sorted(self.directory.glob(f"{pattern}/part-*.parquet"))

    def read_part(self, part: Path, columns: Sequence[str]) -> pa.Table:
        """The columns of one part, its rewards included; raises what `table` raises."""
        completions = _read(part, [name for name in columns if name in SCHEMA.names], SCHEMA)
        wanted = [name for name in columns if name in REWARDS.names]
        arrays = dict(zip(completions.column_names, completions.columns, strict=True))
        if wanted:
            rewards = _read_rewards(part, wanted)
            arrays |= zip(rewards.column_names, rewards.columns, strict=True)
        return pa.table([arrays[name] for name in columns], schema=_schema_of(columns))

    def remove_unfinished(self) -> None:
        """Deletes what a killed writer left half-written."""
        for leftover in self.directory.glob(f"iteration-*/*{UNFINISHED}"):
            leftover.unlink()


def _rewards_file(part: Path) -> Path:
    return part.with_name(part.name.replace("part-", "rewards-"))


def _next_number(directory: Path) -> int:
    # Rewards count too: those of a part that was deleted must not become those of a new one.
    files = (file for kind in ("part", "rewards") for file in directory.glob(f"{kind}-*.parquet"))
    return max((int(file.stem.rpartition("-")[2]) for file in files), default=-1) + 1


def _write(table: pa.Table, file: Path) -> None:
    unfinished = file.with_name(file.name + UNFINISHED)
    pq.write_table(table, unfinished, compression="zstd")
    publish_file(unfinished, file)


def _read(file: Path, columns: Sequence[str], schema: pa.Schema) -> pa.Table:
    try:
        table: Any = pq.ParquetFile(file).read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, what it held is made again") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    if version != str(FORMAT_VERSION).encode() or table.schema != pa.schema([schema.field(name) for name in columns]):
        raise ValueError(f"{file} is not a roll-out file of format version {FORMAT_VERSION}: use another run directory")
    return table


def _read_rewards(part: Path, columns: Sequence[str]) -> pa.Table:
    rows, file = pq.read_metadata(part).num_rows, _rewards_file(part)
    if not file.exists():
        return pa.table({name: pa.nulls(rows, REWARDS.field(name).type) for name in columns})
    table = _read(file, columns, REWARDS)
    if table.num_rows != rows:
        raise ValueError(
            f"{file} has {table.num_rows} rewards for {rows} completions: delete it, they are graded again"
        )
    return table


def _schema_of(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([(SCHEMA if name in SCHEMA.names else REWARDS).field(name) for name in columns])


def _check_unique(table: pa.Table, directory: Path) -> None:
    if "rollout_id" not in table.column_names:
        return
    ids = table.column("rollout_id")
    if pc.count_distinct(ids).as_py() < len(ids):
        twice = sorted(item["values"].as_py() for item in pc.value_counts(ids) if item["counts"].as_py() > 1)
        raise ValueError(f"{directory}: {len(twice)} roll-out ids occur twice, the first is {twice[0]!r}")
