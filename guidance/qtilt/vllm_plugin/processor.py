"""GuidanceProcessor: what vLLM's model runners call before temperature. Only what is particular to vLLM is here.

vLLM 0.32 has two model runners, each with an interface for logits processors; one class serves both. What it is told of
requests becomes rows of a batch: batch.py for V1, slots.py for Model Runner V2. The facts of V1 this rests on
(``vllm/v1/sample/logits_processor`` and ``gpu_input_batch.py``):

- ``update_state(None)`` means an unchanged batch. Removals come first, then additions, then moves; an index that is
  refilled by an addition or a move is missing from ``removed``.
- The output list of an added request is live. It is complete in ``apply`` only: with async scheduling it ends in a
  placeholder until then.
- Rows of an unfinished chunked prefill reach ``apply``. Their logits are discarded; guiding them does no harm, advances
  the value cache, and their KL doesn't count (see records.py).
- A preempted request is removed, and added again when it resumes; its prefill, in chunks too, starts anew.

Of both: masks (allowed tokens, bad words, ``min_tokens``, logit bias, a grammar's) come before this processor, and the
scheduler ends a request at its end or stop tokens whatever ``min_tokens`` says (``check_stop``, see failure.py).
Penalties come after it on V1 and before it on V2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample import logits_processor as v1
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample import logits_processor as v2

from qtilt.forwards.compiled import library
from qtilt.method.params import GuidanceParams
from qtilt.model.checkpoint import fingerprint_tokenizer
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.records import RecordStore
from qtilt.vllm_plugin.step import RowSettings
from qtilt.vllm_plugin.v1.batch import GuidedBatch, GuidedRow
from qtilt.vllm_plugin.v1.history import TokenHistory
from qtilt.vllm_plugin.v1.seeded_prefill import keep_seeds_through_chunked_prefill
from qtilt.vllm_plugin.v2.slots import GuidedSlots, SlotRequest
from qtilt.vllm_plugin.v2.stays import Stay, StayLog
from qtilt.vllm_plugin.versions import EngineSettings, Residents, ResidentVersion
from vllm import _custom_ops

logger = init_logger(__name__)


class GuidanceProcessor(v1.LogitsProcessor, v2.LogitsProcessor):
    """Guides the requests whose ``extra_args`` ask for it.

    Loads the first value models at construction, so that vLLM counts their memory before it sizes its own cache.

    Raises ValueError when the settings or a value model can't be used.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device_or_requests: torch.device | v2.LogitsProcRequestState,
        is_pin_memory: bool = False,  # V1 passes it
    ) -> None:
        self.config = PluginConfig.from_additional_config(vllm_config.additional_config)
        slots = vllm_config.scheduler_config.max_num_seqs
        self.batch: GuidedBatch | GuidedSlots
        self.records: RecordStore | StayLog
        if isinstance(device_or_requests, torch.device):
            device = device_or_requests
            self.batch, self.records = GuidedBatch(), RecordStore()
            if device.type == "cpu":
                keep_seeds_through_chunked_prefill()
        else:
            device = device_or_requests.device
            self._requests = device_or_requests
            speculates = vllm_config.speculative_config is not None
            self.batch, self.records = GuidedSlots(device_or_requests, speculates=speculates), StayLog()
            slots = device_or_requests.max_num_reqs
        _refuse_what_is_not_exact(vllm_config, speculates=isinstance(self.batch, GuidedSlots))
        load_compiled_parts(device)
        settings = _engine_settings(vllm_config, self.config, device, slots)
        self.residents = Residents(_reference(vllm_config), settings)
        for name, path in self.config.value_models.items():
            version = self.residents.load_at_start(name, path)
            for warning in version.warnings:
                logger.warning(warning)
            logger.info(
                "value cache of %s: %.2f GiB, %s of what %d sequences of %d tokens need (--guidance-kv-fraction)",
                version.label,
                version.engine.cache.gib,
                format(self.config.kv_fraction, ".4g"),
                slots,
                settings.max_length,
            )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called in the API process for each request. Raises ValueError for malformed guidance."""
        GuidanceParams.from_extra_args(sampling_params.extra_args)

    def describe(self) -> dict[str, Any]:
        """What is loaded and running, JSON-able."""
        return {
            "value_models": [version.describe() for version in self.residents],
            "max_top_k": self.config.max_top_k,
            "guided_rows": len(self.batch),
            "traces": self.records.held,
        }

    def is_argmax_invariant(self) -> bool:
        """V1."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1."""
        if batch_update is None:
            return
        assert isinstance(self.batch, GuidedBatch)
        for index in batch_update.removed:
            self.batch.put(index, None)
        for index, sampling_params, prompt_token_ids, output_token_ids in batch_update.added:
            self.batch.put(index, self._row(sampling_params, prompt_token_ids, output_token_ids))
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                self.batch.swap(source, target)
            else:
                self.batch.move(source, target)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2."""
        assert isinstance(self.batch, GuidedSlots)
        request = self._slot_request(req_idx, sampling_params)
        settings = None
        if request is not None:
            settings = RowSettings.of(request.params, sampling_params.temperature, _ending_token(sampling_params))
        self.batch.put(req_idx, request, settings)
        return request is not None

    def apply_staged_writes(self) -> None:
        """V2."""
        assert isinstance(self.batch, GuidedSlots)
        self.batch.flush()

    @torch.inference_mode()
    def apply(self, logits: Tensor, ctx: v2.LogitsContext | None = None) -> Tensor:
        """Both; V2 passes the step's layout."""
        if isinstance(self.batch, GuidedBatch):
            return self.batch.guide(logits)
        assert ctx is not None
        return self.batch.guide(logits, ctx)

    def _guidance(
        self, sampling_params: SamplingParams, *, has_tokens: bool = True
    ) -> tuple[GuidanceParams, ResidentVersion] | None:
        """What an added request asks for, None for one without guidance. has_tokens: its prompt isn't embeddings.

        Raises ValueError for what the server must not let through: an unguided answer would be worse than none.
        """
        params = GuidanceParams.from_extra_args(sampling_params.extra_args)
        if params is None:
            return None
        if not has_tokens:
            raise ValueError("guidance needs a prompt of tokens, this request has prompt embeddings")
        if params.top_k > self.config.max_top_k:
            raise ValueError(f"guidance.top_k is {params.top_k}, this server allows at most {self.config.max_top_k}")
        return params, self.residents.get(params.value_model, params.version)

    def _row(
        self, sampling_params: SamplingParams, prompt_token_ids: Sequence[int] | None, output_token_ids: list[int]
    ) -> GuidedRow | None:
        """V1's state of an added request."""
        guidance = self._guidance(sampling_params, has_tokens=prompt_token_ids is not None)
        if guidance is None or prompt_token_ids is None:
            return None
        params, version = guidance
        record = None
        if params.trace_id:
            assert isinstance(self.records, RecordStore)
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

    def _slot_request(self, slot: int, sampling_params: SamplingParams) -> SlotRequest | None:
        """V2's state of an added request."""
        if (guidance := self._guidance(sampling_params)) is None:
            return None
        params, version = guidance
        assert isinstance(self.batch, GuidedSlots)
        stay = Stay(self._requests, self.batch.table, slot, params.guided_tokens)
        request = SlotRequest(
            slot=slot,
            params=params,
            version=version,
            stay=stay,
            prompt_len=int(self._requests.prompt_len.np[slot]),
            prefill_len=int(self._requests.prefill_len.np[slot]),
        )
        if params.trace_id:
            assert isinstance(self.records, StayLog)
            if request.generated:
                request.failure = self.records.failed(params.trace_id)
            self.records.open(params.trace_id, stay)
        return request


def _ending_token(sampling_params: SamplingParams) -> int | None:
    """A token at which the scheduler ends this request, before it looks at ``min_tokens``; None if there is none."""
    stop_token_ids = [sampling_params.eos_token_id, *(sampling_params.stop_token_ids or [])]
    return next((token for token in stop_token_ids if token is not None), None)


def _refuse_what_is_not_exact(vllm_config: VllmConfig, *, speculates: bool) -> None:
    """Raise ValueError for settings under which guidance would be wrong or missing on this runner."""
    if vllm_config.speculative_config is not None and not speculates:
        raise ValueError(
            "guidance excludes speculative decoding on model runner V1: drop --speculative-config, or set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError("guidance needs every request on every rank: drop --enable-batch-sharded-sampling")
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.enable_adaptive_verification:
        raise ValueError("guidance excludes adaptive verification of drafts: drop it from --speculative-config")
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


def _engine_settings(vllm_config: VllmConfig, config: PluginConfig, device: torch.device, slots: int) -> EngineSettings:
    dtype = vllm_config.model_config.dtype if config.value_dtype == "auto" else getattr(torch, config.value_dtype)
    assert isinstance(dtype, torch.dtype), "vLLM resolves its dtype before it builds a worker"
    return EngineSettings(
        slots=slots,
        max_length=vllm_config.model_config.max_model_len,
        dtype=dtype,
        device=device,
        kv_fraction=config.kv_fraction,
        kernels=_custom_ops,
        served=[vllm_config.model_config.model],
    )


def load_compiled_parts(device: torch.device) -> None:
    """On a CPU, have guidance run on its C++ parts, compiling them if that has never been done."""
    if device.type == "cpu":
        try:
            library.load()
        except RuntimeError as error:
            logger.warning("guidance runs slower than it could: %s", error)
