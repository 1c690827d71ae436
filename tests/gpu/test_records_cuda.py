"""What was measured on CUDA is read without waiting for the steps that are queued behind it."""

from pathlib import Path

import pytest
import torch

from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.versions import ResidentVersion
from running_batch import RunningBatch, make_residents


@pytest.mark.parametrize("has_left", [False, True])
def test_records_are_read_while_later_steps_are_queued(tmp_path: Path, has_left: bool) -> None:
    device = torch.device("cuda")
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)
    version = make_residents(4, device=device).load_at_start("value", str(directory))
    running = RunningBatch(4, device=device)
    _load_kernels(running, version)
    request = running.add(0, version, prompt(5, seed=1))
    running.guide([0], torch.randn(1, REFERENCE_VOCAB, device=device))
    running.requests.commit(0, [3])
    torch.cuda.synchronize()
    later = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    later.record()
    if has_left:
        running.batch.keep_only([])
    steps = request.stay.read()
    assert not later.query(), "it has waited"
    assert steps.tokens_N.tolist() == [3]
    assert steps.divergence_N3[0, 0] > 0
    torch.cuda.synchronize()


def _load_kernels(running: RunningBatch, version: ResidentVersion) -> None:
    """All that a request has run in its life: CUDA waits for what is queued when it loads a kernel."""
    request = running.add(1, version, prompt(5, seed=2))
    running.guide([1], torch.randn(1, REFERENCE_VOCAB, device=running.requests.device))
    running.requests.commit(1, [3])
    running.batch.keep_only([])
    request.stay.read()
