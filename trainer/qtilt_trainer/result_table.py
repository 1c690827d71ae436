"""The records of an evaluation as tables: one for each regime, the reference first, for terminal, Markdown and page.

In every table: the reference, the reference under the truncation that guidance implies (where the regime doesn't
truncate as far itself), the best constant answer, and the guided policies.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from qtilt_trainer.evaluate.degeneration import RULE, signs_of_degeneration
from qtilt_trainer.evaluate.grid import Regime
from qtilt_trainer.evaluate.record import Record

NAMES = {"reference": "reference", "constant": "best constant answer", "qsharp": "Q♯", "cd": "CD"}
LEGEND = (
    "[95 % bootstrap interval over prompts]; gain: over the reference in the same regime, paired by prompt",
    "KL: nats a response, before truncation; KL cand.: given that the token is a candidate",
    "mass: the reference's in the candidates; cut: share of completions cut by max_tokens",
    "rep-4: share of 4-grams repeated within a completion; dist-2: different bigrams by all bigrams",
    f"!: the text degenerates, by {RULE}",
)
"""What the columns mean."""
SHOWN_TEXT = 120
"""Characters of the constant answer."""


@dataclass(frozen=True, slots=True)
class RegimeRecords:
    """What stands in one table."""

    regime: Regime
    reference: Record
    truncated: Record | None
    """The reference under the truncation that guidance implies; None where that is the regime itself, or greedy."""
    constant: Record | None
    guided: list[Record]

    @property
    def records(self) -> list[Record]:
        """In the order of the rows."""
        beside = [record for record in (self.truncated, self.constant) if record is not None]
        return [self.reference, *beside, *self.guided]

    def policy(self, record: Record) -> str:
        """What a row calls its policy."""
        truncation = f", top-k {record.top_k}" if record is self.truncated else ""
        return NAMES[record.method] + truncation

    def signs(self, record: Record) -> list[str]:
        """How a guided policy's text degenerates, compared with the reference's in this regime."""
        return signs_of_degeneration(record, self.reference) if record in self.guided else []


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and what a record has there."""

    name: str
    cell: Callable[[Record], str]


def by_regime(records: Sequence[Record]) -> list[RegimeRecords]:
    """The tables of one task's records, in the order of the evaluation; regimes without a guided policy have none."""
    constant = next((record for record in records if record.method == "constant"), None)
    references = {record.drawn_in: record for record in records if record.method == "reference"}
    guided = [record for record in records if record.method not in ("reference", "constant")]
    tables = []
    for regime, reference in references.items():
        inside = [record for record in guided if record.drawn_in == regime]
        if regime is None or (guided and not inside):
            continue
        implied = regime.truncated_to(reference.guidance_top_k or 0)
        truncated = references.get(implied) if implied != regime else None
        if truncated is not None:
            # Its own KL to this regime's reference isn't measured.
            truncated = replace(truncated, kl=None, kl_candidates=None)
        tables.append(RegimeRecords(regime, reference, truncated, constant, inside))
    return tables


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Those that tell something: maj@k and pass@k only where k > 1."""
    k = max((record.k or 1 for record in records), default=1)
    several = [
        Column(f"maj@{k}", lambda record: _number(record.maj_at_k)),
        Column(f"pass@{k}", lambda record: _number(record.pass_at_k)),
    ]
    return [
        Column("1/η", lambda record: _number(record.inv_eta, "g")),
        Column("tail", lambda record: record.tail or ""),
        Column("reward", lambda record: _interval(record.accuracy, record.low, record.high)),
        Column("gain", lambda record: _interval(record.gain, record.gain_low, record.gain_high, "+.3f")),
        Column("KL", lambda record: _number(record.kl, ".2f")),
        Column("KL cand.", lambda record: _number(record.kl_candidates, ".2f")),
        Column("mass", lambda record: _number(record.mass, ".2f")),
        Column("tokens", lambda record: _number(record.tokens, ".1f")),
        Column("cut", lambda record: _number(record.cut, ".2f")),
        Column("rep-4", lambda record: _number(record.rep_4)),
        Column("dist-2", lambda record: _number(record.distinct_2)),
        *(several if k > 1 else []),
    ]


def result_table(records: Sequence[Record]) -> str:
    """For the terminal: right-aligned columns, and the notes below."""
    blocks = []
    for table in by_regime(records):
        columns = columns_of(table.records)
        rows = [["policy", *(column.name for column in columns)]]
        rows += [[_policy(table, record), *(column.cell(record) for column in columns)] for record in table.records]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        blocks.append("\n".join([title(table), *(_aligned(row, widths) for row in rows)]))
    return "\n\n".join([*blocks, "\n".join(notes(records))])


def markdown_table(records: Sequence[Record]) -> str:
    """The same for a README."""
    blocks = []
    for task, group in groupby(records, key=lambda record: record.task):
        of_task = list(group)
        for table in by_regime(of_task):
            columns = columns_of(table.records)
            lines = [["policy", *(column.name for column in columns)], ["---", *("---:" for _ in columns)]]
            lines += [
                [_policy(table, record), *(column.cell(record) for column in columns)] for record in table.records
            ]
            rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            blocks.append(f"**{task}, {title(table)}**\n\n{rows}")
        blocks.append("\n".join(f"- {note}" for note in notes(of_task)))
    return "\n\n".join(blocks) + "\n"


def title(table: RegimeRecords) -> str:
    """Regime, and how much it was measured on."""
    samples = table.reference.samples
    each = f" × {samples} completions" if samples and samples > 1 else ""
    return f"{table.regime.label} ({table.reference.n} prompts{each})"


def notes(records: Sequence[Record]) -> list[str]:
    """What the columns mean, the constant answer, and each policy whose text degenerates."""
    constants = [f"best constant answer: {shown(record.text)}" for record in records if record.text is not None]
    return [*LEGEND, *constants, *_degenerations(records)]


def described(record: Record) -> str:
    """A guided policy in words."""
    tail = f", tail {record.tail}" if record.tail else ""
    return f"{NAMES[record.method]}, 1/η = {record.inv_eta:g}{tail}"


def shown(text: str) -> str:
    """A text on one line, cut where it gets long."""
    line = text.replace("\n", "⏎")
    return f"“{line[:SHOWN_TEXT]}{'…' if len(line) > SHOWN_TEXT else ''}”"


def _degenerations(records: Sequence[Record]) -> Iterator[str]:
    for table in by_regime(records):
        for record in table.guided:
            signs = table.signs(record)
            if signs:
                yield f"! {described(record)}, {table.regime.label}: {'; '.join(signs)}"


def _policy(table: RegimeRecords, record: Record) -> str:
    return table.policy(record) + (" !" if table.signs(record) else "")


def _interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    if value is None or low is None or high is None:
        return ""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
