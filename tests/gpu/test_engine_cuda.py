"""The value engine on CUDA against plain Hugging Face forwards there, and that a step doesn't wait for the device."""

import pytest
import torch

from engine_histories import Histories, acquire, value_logits
from hf_oracle import CONFIGS, POSITIONS, make_value_model, plain_value_logits
from qtilt.engine import ValueEngine

EXACT_ON_CUDA = {"atol": 1e-4, "rtol": 1e-4}  # float32 sums in another order than the plain forward's


def histories_on_cuda(
    family: str, type: str, slots: int = 6, max_new_tokens: int = 8192, kv_fraction: float = 1.0
) -> Histories:
    model = make_value_model(family, type, "categorical").to("cuda")
    settings = {"max_new_tokens": max_new_tokens, "kv_fraction": kv_fraction}
    return Histories(model, slots, seed=5, exact=EXACT_ON_CUDA, **settings)


@pytest.mark.parametrize("kv_fraction", [0.3, 1.0])
@pytest.mark.parametrize("type", ["q", "v"])
@pytest.mark.parametrize("family", CONFIGS)
def test_random_histories_stay_exact(family: str, type: str, kv_fraction: float):
    histories_on_cuda(family, type, max_new_tokens=24, kv_fraction=kv_fraction).wander(steps=25)


@pytest.mark.parametrize("type", ["q", "v"])
def test_scattered_slots_are_gathered(type: str):
    run = histories_on_cuda("llama-gqa", type, slots=12)
    slots = run.start(*range(3, 15))
    run.check(*slots)
    for slot in slots[1:-1]:
        run.stop(slot)
    run.grow(slots[0], 1)
    run.check(slots[-1], slots[0])


@pytest.mark.parametrize("type", ["q", "v"])
def test_bfloat16_is_as_close_to_float32_as_the_plain_forward_is(type: str):
    exact = make_value_model("llama-gqa", type).to("cuda")
    half = make_value_model("llama-gqa", type).to("cuda", torch.bfloat16)
    histories, candidates_BK = [list(range(5)), list(range(40))], torch.tensor([[1, 2, 3], [4, 5, 6]], device="cuda")
    expected_BKA = plain_value_logits(exact, histories, candidates_BK)
    plain_error = (plain_value_logits(half, histories, candidates_BK) - expected_BKA).abs().max()
    engine = ValueEngine(half, 2, POSITIONS - 1)
    got_BKA = value_logits(engine, [acquire(engine), acquire(engine)], histories, candidates_BK)
    assert (got_BKA - expected_BKA).abs().max() < 2 * plain_error + 0.05


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kv_fraction", [0.9, 1.0])
@pytest.mark.parametrize("type", ["q", "v"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2"])
def test_a_step_never_waits_for_the_device(family: str, type: str, kv_fraction: float):
    run = histories_on_cuda(family, type, kv_fraction=kv_fraction)
    slots = run.start(3, 9, 40)
    candidates_BK = torch.ones(3, 5, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for new in (0, 1, 0, 4):
            for slot in slots:
                run.grow(slot, new)
            value_logits(run.engine, slots, [run.tokens[slot] for slot in slots], candidates_BK)
        run.engine.cache.copy(slots[2], acquire(run.engine), 40)
        run.engine.cache.rewind(slots[2], 1)
        run.engine.release(slots[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
