"""What must never reach a step, and how the worker says no."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, build_logitsprocs

from guided_vllm import tight_engine
from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import covers
from guided_vllm.served import Served
from guided_vllm.tiny_models import prompt
from qtilt.vllm_plugin import vllm_internals
from qtilt.vllm_plugin.config import PROCESSOR, PluginConfig
from qtilt.vllm_plugin.processor import GuidanceProcessor, _refuse_what_is_not_exact
from qtilt.vllm_plugin.worker_extension import GuidanceWorkerExtension
from vllm import SamplingParams


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("v-bernoulli", "is no JSON"),
        ("[1]", "expected an object"),
        ({"value_model": "v-bernoulli", "version": 1, "eta": 0.1, "top_k": 4, "strength": 2}, "strength"),
        ({"version": 1, "eta": 0.1, "top_k": 4}, "expected value_model"),
        ({"value_model": "v-bernoulli", "version": 1, "eta": -0.1, "top_k": 4}, "eta"),
        ({"value_model": "v-bernoulli", "version": True, "eta": 0.1, "top_k": 4}, "version"),
    ],
)
def test_malformed_guidance_is_refused_when_a_request_is_added(served: Served, entry: object, names: str) -> None:
    params = SamplingParams(max_tokens=2, extra_args={"qtilt": entry})
    with pytest.raises(VLLMValidationError, match=names):
        served.engine.add_request("malformed", {"prompt_token_ids": [1, 2]}, params)


def test_a_prompt_of_embeddings_ends_a_guided_request(served: Served) -> None:
    """The server refuses it; here it must be an error and never unguided, and the engine must go on."""
    processor = tight_engine.worker(served.engine)._qtilt_processor()
    guidance = served.guide("v-bernoulli")
    sampling = SamplingParams(extra_args={"qtilt": guidance.to_extra_args()})
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, sampling, None, [])], moved=[]))
    assert "prompt embeddings" in processor.records.failures()[guidance.trace_id]["reason"]
    processor.update_state(BatchUpdate(batch_size=0, removed=[0], added=[], moved=[]))
    assert len(processor.batch) == 0
    processor.records.take(guidance.trace_id, [])


@covers(
    "speculative decoding",
    engines=["sync", "async"],
    refused="model runner V1 shows a processor no drafts: refused at start",
)
def test_the_engine_is_not_built_with_speculative_decoding(served: Served) -> None:
    config = SimpleNamespace(speculative_config=object())
    with pytest.raises(ValueError, match="speculative decoding"):
        build_logitsprocs(config, torch.device("cpu"), False, False, [PROCESSOR])


def test_the_processor_is_not_built_on_a_vllm_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at: what it would be told may have another form."""
    monkeypatch.setattr(vllm_internals, "missing", lambda *_: ["vllm.a has no b (for this)"])
    with pytest.raises(vllm_internals.MissingInternalsError, match=r"vLLM 0\.\d+.*vllm\.a has no b"):
        GuidanceProcessor(SimpleNamespace(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "refused"), [("standard", False), ("block", False), ("synthetic", True), ("fly", True)]
)
def test_drafts_are_accepted_by_the_guided_logits_alone(method: str, refused: bool) -> None:
    """``fly`` comes with vLLM 0.33."""
    on_v2 = SimpleNamespace(
        speculative_config=SimpleNamespace(enable_adaptive_verification=False, rejection_sample_method=method),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False, pipeline_parallel_size=1),
        model_config=SimpleNamespace(skip_tokenizer_init=False, enable_sleep_mode=False),
    )
    with pytest.raises(ValueError, match=f"rejection_sample_method '{method}'") if refused else nullcontext():
        _refuse_what_is_not_exact(on_v2, PluginConfig(behind_server=True), is_v2=True)


ALONE: dict[str, object] = {"additional_config": {"qtilt": {}}}
MODEL = {
    "skip_tokenizer_init": False,
    "enable_sleep_mode": False,
    "enable_prompt_embeds": False,
    "is_multimodal_model": False,
}


def test_guidance_of_a_client_that_came_past_the_server_ends_its_request(served: Served) -> None:
    processor = tight_engine.worker(served.engine)._qtilt_processor()
    guidance = replace(served.guide("v-bernoulli"), trace_id="")
    (answer,) = drive(served.engine, [Ask(prompt(5, seed=301), guidance, sampling={"stop_token_ids": [7]})])
    assert [choice.token_ids for choice in answer.choices] == [[7]]
    assert not processor.records.failures()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"additional_config": {}}, "additional_config"),
        ({"speculative_config": object()}, "speculative"),
        pytest.param(
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=2, enable_batch_sharded_sampling=None)},
            "pipeline",
            marks=covers("pipeline parallelism", refused="not supported yet: refused at start"),
        ),
        (
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=1, enable_batch_sharded_sampling=True)},
            "batch-sharded",
        ),
        ({"model_config": SimpleNamespace(skip_tokenizer_init=True)}, "skip-tokenizer-init"),
        ({"model_config": SimpleNamespace(skip_tokenizer_init=False, enable_sleep_mode=True)}, "enable-sleep-mode"),
        (ALONE | {"lora_config": object()}, "enable-lora, or start qtilt-server"),
        (ALONE | {"model_config": SimpleNamespace(**MODEL | {"enable_prompt_embeds": True})}, "enable-prompt-embeds"),
        (ALONE | {"model_config": SimpleNamespace(**MODEL | {"is_multimodal_model": True})}, "a model of text"),
    ],
)
def test_settings_under_which_guidance_is_wrong_are_refused_at_construction(
    served: Served, change: dict[str, object], names: str
) -> None:
    config = served.engine.vllm_config
    parts = (
        "additional_config",
        "speculative_config",
        "parallel_config",
        "model_config",
        "scheduler_config",
        "lora_config",
    )
    changed = SimpleNamespace(**{part: getattr(config, part) for part in parts} | change)
    with pytest.raises(ValueError, match=names):
        GuidanceProcessor(changed, torch.device("cpu"), False)


def test_a_worker_without_the_processor_says_that_every_request_would_be_unguided() -> None:
    runner = SimpleNamespace(input_batch=SimpleNamespace(logitsprocs=LogitsProcessors()))
    worker = GuidanceWorkerExtension()
    worker.model_runner = runner
    with pytest.raises(RuntimeError, match="unguided"):
        worker.qtilt_describe()


def test_records_of_tokens_nobody_generated_are_an_error(served: Served) -> None:
    guidance = served.guide("q-bernoulli")
    (answer,) = drive(served.engine, [Ask(prompt(5, seed=300), guidance)])
    tokens = answer.choices[0].token_ids
    with pytest.raises(ValueError, match="no guidance record"):
        served.rpc("qtilt_take_records", guidance.trace_id, [[*tokens[:-2], (tokens[-2] + 1) % 80, tokens[-1]]])


def test_a_choice_cut_short_counts_only_its_own_steps(served: Served) -> None:
    guidances = [served.guide("q-bernoulli"), served.guide("q-bernoulli")]
    asks = [Ask(prompt(5, seed=301), guidance, temperature=0.0, max_tokens=6) for guidance in guidances]
    asks[1].max_tokens = 4
    longer, shorter = drive(served.engine, asks)
    assert longer.choices[0].token_ids[:4] == shorter.choices[0].token_ids
    (cut,) = served.rpc("qtilt_take_records", guidances[0].trace_id, [longer.choices[0].token_ids[:4]])
    served.check(shorter)
    assert (cut["guided_tokens"], cut["candidates"]) == (4, guidances[0].top_k)
    (nothing,) = served.rpc("qtilt_take_records", "no such trace", [[]])
    assert nothing == {"guided_tokens": 0, "kl": 0.0, "kl_candidates": 0.0, "mass": None, "candidates": 0.0}
