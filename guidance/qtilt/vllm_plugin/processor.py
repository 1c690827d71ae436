"""GuidanceProcessor: what vLLM's V1 model runner calls, before penalties and temperature.

Only what is particular to that runner is here; the batch, the step and the records know nothing of it. The facts of
V1 this file rests on (vLLM 0.32, ``vllm/v1/sample/logits_processor`` and ``gpu_input_batch.py``):

- ``update_state(None)`` means an unchanged batch. Removals come first, then additions, then moves; an index that is
  refilled by an addition or a move is missing from ``removed``.
- The output list of an added request is live. It is complete in ``apply`` only: with async scheduling it ends in a
  placeholder until then.
- Rows of an unfinished chunked prefill reach ``apply``. Their logits are discarded; guiding them does no harm, advances
  the value cache, and their KL doesn't count (see records.py).
- A preempted request is removed, and added again when it resumes; its prefill, in chunks too, starts anew.
- Masks (allowed tokens, bad words, ``min_tokens``, logit bias, a grammar's) come before this processor; the scheduler
  ends a request at its end or stop tokens whatever ``min_tokens`` says (``check_stop``). See failure.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.batch import GuidedBatch, GuidedRow
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.history import TokenHistory
from qtilt.vllm_plugin.records import RecordStore
from qtilt.vllm_plugin.residents import EngineSettings, Residents
from qtilt.vllm_plugin.seeded_prefill import keep_seeds_through_chunked_prefill

logger = init_logger(__name__)


class GuidanceProcessor(LogitsProcessor):
    """Guides the rows whose ``extra_args`` ask for it.

    Loads the first value models at construction, so that vLLM counts their memory before it sizes its own cache.

    Raises ValueError when the settings or a value model can't be used.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = PluginConfig.from_additional_config(vllm_config.additional_config)
        _refuse_what_is_not_exact(vllm_config)
        if device.type == "cpu":
            keep_seeds_through_chunked_prefill()
        self.residents = Residents(_reference(vllm_config), _engine_settings(vllm_config, self.config, device))
        self.records = RecordStore()
        self.batch = GuidedBatch()
        for name, path in self.config.value_models.items():
            for warning in self.residents.load_at_start(name, path).warnings:
                logger.warning(warning)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called in the API process for each request. Raises ValueError for malformed guidance."""
        GuidanceParams.from_extra_args(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.batch.put(index, None)
        for index, sampling_params, prompt_token_ids, output_token_ids in batch_update.added:
            self.batch.put(index, self._row(sampling_params, prompt_token_ids, output_token_ids))
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                self.batch.swap(source, target)
            else:
                self.batch.move(source, target)

    @torch.inference_mode()
    def apply(self, logits: Tensor) -> Tensor:
        return self.batch.guide(logits)

    def describe(self) -> dict[str, Any]:
        """What is loaded and running, JSON-able."""
        return {
            "value_models": [version.describe() for version in self.residents],
            "max_top_k": self.config.max_top_k,
            "guided_rows": len(self.batch),
            "traces": self.records.held,
        }

    def _row(
        self, sampling_params: SamplingParams, prompt_token_ids: Sequence[int] | None, output_token_ids: list[int]
    ) -> GuidedRow | None:
        """The state of an added request, None for one without guidance.

        Raises ValueError for what the server must not let through: an unguided answer would be worse than none.
        """
        params = GuidanceParams.from_extra_args(sampling_params.extra_args)
        if params is None:
            return None
        if prompt_token_ids is None:
            raise ValueError("guidance needs a prompt of tokens, this request has prompt embeddings")
        if params.top_k > self.config.max_top_k:
            raise ValueError(f"guidance.top_k is {params.top_k}, this server allows at most {self.config.max_top_k}")
        version = self.residents.get(params.value_model, params.version)
        record = None
        if params.trace_id:
            record = self.records.open(params.trace_id, output_token_ids, params.guided_tokens)
        return GuidedRow(
            params=params,
            temperature=sampling_params.temperature,
            output_token_ids=output_token_ids,
            history=TokenHistory(list(prompt_token_ids), output_token_ids, version.manifest.vocab_size),
            version=version,
            record=record,
            ending_token=_ending_token(sampling_params),
            failure=record.failure if record is not None else None,
        )


def _ending_token(sampling_params: SamplingParams) -> int | None:
    """A token at which the scheduler ends this request, before it looks at ``min_tokens``; None if there is none."""
    stop_token_ids = [sampling_params.eos_token_id, *(sampling_params.stop_token_ids or [])]
    return next((token for token in stop_token_ids if token is not None), None)


def _refuse_what_is_not_exact(vllm_config: VllmConfig) -> None:
    """Raise ValueError for settings under which guidance would be wrong or missing on this runner."""
    if vllm_config.speculative_config is not None:
        raise ValueError("guidance on this model runner excludes speculative decoding: drop --speculative-config")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("guidance supports no pipeline parallelism yet: set --pipeline-parallel-size 1")
    if vllm_config.model_config.skip_tokenizer_init:
        raise ValueError("guidance compares tokenizers at start: drop --skip-tokenizer-init")


def _reference(vllm_config: VllmConfig) -> Reference:
    model_config = vllm_config.model_config
    return Reference(
        tokenizer=fingerprint_tokenizer(cached_tokenizer_from_config(model_config)),
        vocab_size=model_config.get_vocab_size(),
        max_model_len=model_config.max_model_len,
    )


def _engine_settings(vllm_config: VllmConfig, config: PluginConfig, device: torch.device) -> EngineSettings:
    dtype = vllm_config.model_config.dtype if config.value_dtype == "auto" else getattr(torch, config.value_dtype)
    assert isinstance(dtype, torch.dtype), "vLLM resolves its dtype before it builds a worker"
    return EngineSettings(
        slots=vllm_config.scheduler_config.max_num_seqs,
        max_length=vllm_config.model_config.max_model_len,
        dtype=dtype,
        device=device,
    )
