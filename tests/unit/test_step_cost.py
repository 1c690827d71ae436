"""What a step of the value engine costs, counted: operations, and the numbers they read, on a CPU."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_histories import Histories, value_logits
from hf_oracle import make_value_model


class Cost(TorchDispatchMode):
    """operations: that aren't views. numbers: in the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.operations += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.numbers += sum(tensor.numel() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def cost_of_a_step(run: Histories, slots: list[int]) -> tuple[int, int]:
    for slot in slots:
        run.grow(slot, 1)
    with Cost() as cost:
        score(run, slots)
    return cost.operations, cost.numbers


def score(run: Histories, slots: list[int]) -> None:
    candidates_BK = torch.ones(len(slots), 3, dtype=torch.int64)
    value_logits(run.engine, slots, [run.tokens[slot] for slot in slots], candidates_BK)


@pytest.mark.parametrize("kv_fraction", [1.0, 0.5])
@pytest.mark.parametrize("value_type", ["q", "v"])
def test_histories_that_have_ended_cost_nothing(value_type: str, kv_fraction: float) -> None:
    def after(ended: int) -> tuple[int, int]:
        run = Histories(make_value_model("llama-gqa", value_type), kv_fraction=kv_fraction)
        (first,) = run.start(12)
        for _ in range(ended):
            slots = run.start(80, 70, 70, 30, 20)
            for slot in slots:
                score(run, [first, slot])  # with half of the memory, that drops others
            for slot in [*slots[1::2], *slots[::2]]:
                run.stop(slot)
        slots = [first, *run.start(12, 12)]
        score(run, slots)
        assert (run.engine.cache.dropped > 0) == (ended > 0 and kv_fraction < 1)
        return cost_of_a_step(run, slots)

    assert after(ended=5) == after(ended=0)


@pytest.mark.parametrize("value_type", ["q", "v"])
def test_cost_is_linear_in_live_tokens(value_type: str) -> None:
    run = Histories(make_value_model("llama-gqa", value_type))
    slots = run.start(10, 10, 10)
    score(run, slots)
    costs = []
    for _ in range(4):
        costs.append(cost_of_a_step(run, slots))
        for slot in slots:
            run.grow(slot, 19)
        score(run, slots)
    operations, numbers = zip(*costs, strict=True)
    assert len(set(operations)) == 1
    increases = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert len(increases) == 1
    assert increases.pop() > 0
