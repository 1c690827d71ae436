"""The public path of what lies in :mod:`qtilt.model.value_model`."""

from qtilt.model.value_model import (
    ValueModel,
    ValueType,
    embedding_rows,
    head_rows,
)

__all__ = [
    "ValueModel",
    "ValueType",
    "embedding_rows",
    "head_rows",
]
