"""Versions that come and go on CUDA while steps are queued there."""

import gc
import time
import weakref
from pathlib import Path

import torch

from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer, make_value_model
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.versions import EngineSettings, Residents

A_SECOND_OR_SO = 2 * 10**9  # clock cycles


def test_a_discarded_version_is_kept_until_the_steps_that_may_read_it_are_done(tmp_path: Path) -> None:
    device = torch.device("cuda")
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, 64)
    residents = Residents(reference, EngineSettings(4, 64, torch.float32, device))
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "gpt2", seed=1)
    model = weakref.ref(residents.load_at_start("value", str(directory)).engine.model)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(A_SECOND_OR_SO)
        step = torch.cuda.Event()
        step.record()
        residents.discard("value", 1)
    gc.collect()
    assert not step.query()
    assert model() is not None
    residents.prepare("value", 2, str(directory))
    while residents.status("value", 2)["state"] == "loading":
        time.sleep(0.01)
    assert step.query()
    gc.collect()
    assert model() is None
