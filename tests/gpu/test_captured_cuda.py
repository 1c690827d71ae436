"""Captured steps on CUDA, with FlashAttention in half precision, against the same batch without capture."""

from pathlib import Path

import pytest
import torch

from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer, make_value_model, prompt
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Categorical
from qtilt.vllm_plugin.captured import CudaGraphs
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.kernels import VllmKernels
from qtilt.vllm_plugin.versions import EngineSettings, Residents
from running_batch import LENGTH, RunningBatch

CUDA = torch.device("cuda")


@pytest.mark.parametrize("type_", ["q", "v"])
def test_replayed_steps_guide_as_others_do_while_histories_grow(tmp_path: Path, type_: str) -> None:
    """Over the ends of pages, in batches whose rows come and go."""
    directory = make_value_model(tmp_path / "value", type_, Categorical(-1.0, 0.5, 4), "llama", seed=1)
    runners = []
    for graphs in (CudaGraphs(CUDA), None):
        reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, LENGTH)
        settings = EngineSettings(6, LENGTH, torch.bfloat16, CUDA, kernels=VllmKernels())
        version = Residents(reference, settings).load_at_start("value", str(directory))
        assert version.engine.forward.is_capturable
        runner = RunningBatch(6, device=CUDA, graphs=graphs)
        for slot in range(5):
            runner.add(slot, version, prompt(10 + 3 * slot, seed=slot), eta=1.0, top_k=8, trace_id=str(slot))
        runners.append((runner, version))
    torch.manual_seed(0)
    for step in range(38):
        slots = [slot for slot in range(5) if (step + slot) % 7]
        logits_BV = torch.randn(len(slots), REFERENCE_VOCAB, device=CUDA)
        guided, expected = (runner.guide(slots, logits_BV.clone()) for runner, _ in runners)
        torch.testing.assert_close(guided, expected, rtol=0, atol=0.1)  # bfloat16's rounding, of 1/η = 1
        assert not torch.allclose(guided, logits_BV, atol=0.3)
        for runner, _ in runners:
            for slot in slots:
                runner.requests.commit(slot, [step % 50])
    _, version = runners[0]
    assert version.captured
    assert all(captured is not None and captured.agrees for captured in version.captured.values())
