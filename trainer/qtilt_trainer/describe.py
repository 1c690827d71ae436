"""Pydantic's validation errors as one line a person can act on."""

from pydantic import ValidationError

from qtilt_trainer.redaction import HIDDEN, redacted


def describe_errors(error: ValidationError, prefix: str = "") -> str:
    """`section.field: what is wrong, got VALUE` for each error, joined by `; `."""
    return "; ".join(_describe(item, prefix) for item in error.errors(include_url=False))


def _describe(item: object, prefix: str) -> str:
    assert isinstance(item, dict)
    where = ".".join(str(part) for part in [prefix, *item["loc"]] if str(part))
    if item["type"] == "missing":
        return f"{where}: this field is required"
    if item["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = redacted(item["input"], str(item["loc"][-1]) if item["loc"] else "")
    # A table is too long to show, a secret isn't shown.
    shown = "" if isinstance(given, dict) or given == HIDDEN else f", got {given!r}"
    return f"{where}: {message}{shown}"
