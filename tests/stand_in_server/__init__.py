"""A stand-in for qtilt-server where a test needs to fail, hang or kill at a chosen request. It speaks its HTTP only."""

from stand_in_server.server import StandInServer, make_tokenizer

__all__ = ["StandInServer", "make_tokenizer"]
