"""When the plugin has value models run compiled, and what it says when it can't."""

import pytest
import torch

from qtilt.compiled import library
from qtilt.vllm_plugin import processor


@pytest.mark.parametrize(
    ("dtype", "device", "compiles"),
    [(torch.float32, "cpu", True), (torch.bfloat16, "cpu", False), (torch.float32, "cuda", False)],
)
def test_only_float32_on_cpus_is_compiled(dtype: torch.dtype, device: str, compiles: bool) -> None:
    assert processor.compiles_forward(dtype, torch.device(device)) == compiles


def test_without_a_compiler_the_log_says_why_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise RuntimeError("no compiler here")

    warnings: list[str] = []
    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(processor.logger, "warning", lambda text, *values: warnings.append(text % values))
    assert not processor.compiles_forward(torch.float32, torch.device("cpu"))
    assert warnings == ["value models run slower than they could: no compiler here"]
