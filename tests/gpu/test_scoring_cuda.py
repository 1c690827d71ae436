"""Values of given tokens on CUDA, against plain forwards on the CPU."""

from pathlib import Path

import pytest
import torch

from guided_vllm.oracle import value_oracle
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer, make_value_model, prompt
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Categorical
from qtilt.vllm_plugin import scoring
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.kernels import VllmKernels
from qtilt.vllm_plugin.scoring import Text
from qtilt.vllm_plugin.versions import EngineSettings, Residents


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("type_", ["q", "v"])
def test_each_token_has_the_distribution_of_the_return_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: str, family: str, dtype: torch.dtype, close: float
) -> None:
    monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cuda", 10)
    directory = make_value_model(tmp_path / "value", type_, Categorical(-1.0, 0.5, 4), family, seed=1)
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, 64)
    settings = EngineSettings(4, 64, dtype, torch.device("cuda"), kernels=VllmKernels())
    version = Residents(reference, settings).load_at_start("value", str(directory))
    tokens = prompt(40, seed=3)
    text = Text(version, tokens, 15, REFERENCE_VOCAB, wants_all=True)
    while not text.is_done:
        text.advance()
    oracle = value_oracle(directory)
    for number, pmf in enumerate(text.values()["distributions"], start=15):
        _, pmf_1Z = oracle.pmf(oracle.logits(tokens[:number], [tokens[number]]))
        assert pmf == pytest.approx(pmf_1Z[0].tolist(), abs=close)
