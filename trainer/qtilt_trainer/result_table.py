"""The records of an evaluation as a table for the terminal."""

from collections.abc import Sequence

from qtilt_trainer.evaluate import Record

HEADER = ("policy", "1/eta", "decoding", "accuracy", "95 % interval", "KL (nats)", "maj@k", "pass@k", "k", "n")


def result_table(records: Sequence[Record]) -> str:
    """Right-aligned columns, one line a record."""
    rows = [HEADER, *(_cells(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cells(record: Record) -> tuple[str, ...]:
    return (
        record.method,
        "" if record.inv_eta is None else f"{record.inv_eta:g}",
        record.decoding,
        f"{record.accuracy:.3f}",
        f"[{record.low:.3f}, {record.high:.3f}]",
        f"{record.kl:.3f}",
        f"{record.maj_at_k:.3f}",
        f"{record.pass_at_k:.3f}",
        str(record.k),
        str(record.n),
    )
