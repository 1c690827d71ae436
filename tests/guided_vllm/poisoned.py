"""Value models that fail on some requests: real models, damaged in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guided_vllm.tiny_models import TOKENS
from qtilt.engine import ValueEngine
from qtilt.forwards.packing import PackedStep

POISON = TOKENS + 3
"""A row of the value model's embedding and a column of the reference's logits that no tokenizer gives: it is never a
candidate, and a history has it only if its prompt does, or by a sample of little probability.
"""


def poison(directory: Path, token: int = POISON) -> Path:
    """Let a GPT-2 value model overflow on one token: every history with it has NaN values.

    A directory with weights that aren't finite is refused when it is read. These are finite, but their variance, which
    GPT-2's layer norm takes, isn't.
    """
    path = directory / "backbone" / "model.safetensors"
    weights = load_file(path)
    weights["wte.weight"][token] = 3e38
    weights["wte.weight"][token, ::2] = -3e38
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@contextmanager
def broken_layer(layer: nn.Module) -> Iterator[None]:
    """A linear layer of the wrong shape in the block: a forward raises when it gets there, half done."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    layer.weight = nn.Parameter(weight[:-1, :-1].clone(), requires_grad=False)
    try:
        yield
    finally:
        layer.weight = weight


@contextmanager
def broken_forward(engine: ValueEngine) -> Iterator[None]:
    """A compiled forward that raises in the block, once it has written to the cache."""
    compiled = engine.forward
    assert compiled.name == "compiled"

    def break_off(step: PackedStep) -> Tensor:
        compiled(step)
        raise RuntimeError("the forward broke off")

    engine.forward = break_off  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.forward = compiled
