"""NaN values on CUDA: never sampled from, acted on by the host later, and no step waits for the device to find them."""

from pathlib import Path

import pytest
import torch

from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer, make_value_model, prompt
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Bernoulli
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.v1.batch import GuidedBatch, GuidedRow
from qtilt.vllm_plugin.v1.history import TokenHistory
from qtilt.vllm_plugin.versions import EngineSettings, Residents

END = 17


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("type_", ["q", "v"])
def test_a_row_with_nan_values_ends_and_no_step_waits_for_the_device(tmp_path: Path, type_: str) -> None:
    device = torch.device("cuda")
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, 64)
    residents = Residents(reference, EngineSettings(4, 64, torch.float32, device))
    directory = poison(make_value_model(tmp_path / "value", type_, Bernoulli(), "gpt2", seed=1))
    version = residents.load_at_start("value", str(directory))
    batch, rows = GuidedBatch(), []
    asks = [([1, 2, POISON], "qsharp"), (prompt(5, 1), "cd"), (prompt(6, 2), "qsharp")]
    for index, (tokens, method) in enumerate(asks):
        output: list[int] = []
        params = GuidanceParams("value", 1, 0.1, 5, method=method)
        rows.append(GuidedRow(params, 1.0, output, TokenHistory(tokens, output, 96), version, None, END))
        batch.put(index, rows[-1])
    logits_BV = torch.randn(3, REFERENCE_VOCAB, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = []
        for _ in range(4):
            steps.append(batch.guide(logits_BV.clone()))
            for row in rows:
                row.output_token_ids.append(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batch.settle(wait=True)
    assert [row.failure is None for row in rows] == [False, True, True]
    assert version.engine.cache.free_slots == 2
    for guided_BV in steps:
        pmf_BV = guided_BV.softmax(-1).cpu()
        assert pmf_BV[0, END] == 1
        assert not pmf_BV.isnan().any()
        assert not torch.equal(guided_BV[1], logits_BV[1])
    for index in range(3):
        batch.put(index, None)
