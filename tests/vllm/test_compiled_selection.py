"""When guidance runs on its C++ parts, and what it says when it can't."""

import pytest
import torch

from qtilt.forwards.compiled import library
from qtilt.vllm_plugin import processor


def test_only_cpus_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", [])
    processor.load_compiled_parts(torch.device("cuda"))
    assert not library.is_loaded()
    processor.load_compiled_parts(torch.device("cpu"))
    assert library.is_loaded()


def test_without_a_compiler_the_log_says_why_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise RuntimeError("no compiler here")

    warnings: list[str] = []
    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(processor.logger, "warning", lambda text, *values: warnings.append(text % values))
    processor.load_compiled_parts(torch.device("cpu"))
    assert warnings == ["guidance runs slower than it could: no compiler here"]
