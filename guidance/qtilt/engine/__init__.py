"""The value engine: token histories in, the return distributions of candidate tokens out."""

from qtilt.engine.engine import ValueEngine

__all__ = ["ValueEngine"]
