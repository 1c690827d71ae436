"""Rows of other people's data: JSON lines (.jsonl, .jsonl.gz), Parquet, directories and hub ids of `datasets`.

Parquet goes through pyarrow, everything else but JSON lines through `datasets`. JSON lines are read line by line: a
column may then hold texts in one row and numbers or lists in the next, and an error can name its line.
"""

import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

JSON_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET = (".parquet",)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
DEFAULT_SPLIT = "train"


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it was found: "train.jsonl, line 3"."""

    where: str
    record: dict[str, Any]


def source_of(written: object) -> object:
    """A path that exists, or that ends like a data file, as Path; a hub id as str; anything else unchanged."""
    if not isinstance(written, str):
        return written
    path = Path(written).expanduser()
    is_file_name = written.endswith((*JSON_LINES, *PARQUET)) or written.startswith((".", "/", "~"))
    return written if HUB_ID.fullmatch(written) and not is_file_name and not path.exists() else path


def read_rows(source: Path | str, subset: str | None, split: str | None) -> Iterator[Row]:
    """All rows of a file, a directory or a data set of the hub.

    subset, split: of `datasets`; None: the only subset, and the split "train" or the only one.
    Raises ValueError that names the file and, where there is one, the line or row.
    """
    if isinstance(source, str) or source.is_dir():
        return _dataset_rows(source, subset, split)
    if subset is not None or split is not None:
        raise ValueError(f"task: {source} is a file, and has neither subset nor split")
    if source.name.endswith(JSON_LINES):
        return _json_lines(source)
    if source.name.endswith(PARQUET):
        return _parquet_rows(source)
    if not source.exists():
        raise ValueError(f"task: can't read {source}: No such file or directory")
    raise ValueError(f"task: {source} must end in one of {', '.join((*JSON_LINES, *PARQUET))}, or be a directory")


def _json_lines(file: Path) -> Iterator[Row]:
    with _reading(file), gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):  # Bytes: text would also be split at U+2028 inside strings.
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # A byte-order mark.
            if line.strip():
                yield _json_row(line, f"{file}, line {number}")


def _json_row(line: bytes, where: str) -> Row:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, got {type(record).__name__}")
    return Row(where, record)


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    with _reading(file):
        try:
            with ParquetFile(file) as parquet:
                records = itertools.chain.from_iterable(batch.to_pylist() for batch in parquet.iter_batches())
                for number, record in enumerate(records, 1):
                    yield Row(f"{file}, row {number}", record)
        except ArrowInvalid as error:
            raise ValueError(f"task: {file} is not Parquet: {error}") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise ValueError(f"task: can't read {file}: {getattr(error, 'strerror', None) or error}") from error


def _dataset_rows(source: Path | str, subset: str | None, split: str | None) -> Iterator[Row]:
    dataset, name = _load(source, subset, split)
    where = f"{source} ({', '.join(part for part in (subset, name) if part)})"
    return (Row(f"{where}, row {number}", dict(record)) for number, record in enumerate(_records(dataset), 1))


def _records(dataset: "Dataset") -> Iterable[dict[str, Any]]:
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        yield from batch.to_pylist()


def _load(source: Path | str, subset: str | None, split: str | None) -> tuple["Dataset", str]:
    """A split and its name. Raises ValueError with what `datasets` says, and the splits there are."""
    import datasets

    try:
        if isinstance(source, Path) and _was_saved(source):
            if subset is not None:
                raise ValueError("what save_to_disk wrote has no subsets")
            found = datasets.load_from_disk(str(source))
        else:
            found = datasets.load_dataset(str(source), subset)
    except Exception as error:  # Whatever a loader, its formats or the network raise: it is bad input.
        hint = "" if isinstance(source, Path) else f" (there is no file or directory {source!r}; as a hub id it needs"
        hint += "" if isinstance(source, Path) else " the network, or HF_HUB_OFFLINE=1 and a filled cache)"
        raise ValueError(f"task: can't load {source}{hint}: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise ValueError(f"task: {source} is one split, and has no split {split!r}")
        return found, ""
    name = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in found or len(found) != 1 else next(iter(found)))
    if name not in found:
        raise ValueError(f"task: {source} has no split {name!r}, only {sorted(found)}")
    return found[name], str(name)


def _was_saved(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))
