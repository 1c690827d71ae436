"""NaN values on CUDA: never sampled from, acted on by the host later, and no step waits for the device to find them."""

from pathlib import Path

import pytest
import torch

from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.failure import not_numbers
from running_batch import END, RunningBatch, make_residents


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("type_", ["q", "v"])
def test_a_row_with_nan_values_ends_and_no_step_waits_for_the_device(tmp_path: Path, type_: str) -> None:
    device = torch.device("cuda")
    directory = poison(make_value_model(tmp_path / "value", type_, Bernoulli(), "gpt2", seed=1))
    version = make_residents(4, device=device).load_at_start("value", str(directory))
    running = RunningBatch(4, device=device)
    asks = [([1, 2, POISON], "qsharp"), (prompt(5, 1), "cd"), (prompt(6, 2), "qsharp")]
    for slot, (tokens, method) in enumerate(asks):
        running.add(slot, version, tokens, method=method, trace_id=str(slot))
    logits_BV = torch.randn(3, REFERENCE_VOCAB, device=device)
    layouts = []
    for _ in range(4):
        layouts.append(running.layout([0, 1, 2]))
        for slot in range(3):
            running.requests.commit(slot, [3])
    running.batch.flush()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [running.batch.guide(logits_BV.clone(), layout) for layout in layouts]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    running.batch.look_for_failures()
    assert running.records.failures() == {"0": not_numbers()}
    assert version.engine.cache.free_slots == 2
    for guided_BV in steps:
        pmf_BV = guided_BV.softmax(-1).cpu()
        assert pmf_BV[0, END] == 1
        assert not pmf_BV.isnan().any()
        assert not torch.equal(guided_BV[1], logits_BV[1])
