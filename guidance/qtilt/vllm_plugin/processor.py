"""GuidanceProcessor: what vLLM's model runners call before temperature. Only what is particular to vLLM is here.

vLLM 0.32 has two model runners, each with an interface for logits processors; one class serves both. What each tells of
requests (v1/, v2/) becomes the one batch of guided.py.

Of both: masks (allowed tokens, bad words, ``min_tokens``, logit bias, a grammar's) come before this processor, and the
scheduler ends a request at its end or stop tokens whatever ``min_tokens`` says (``check_stop``, see failure.py).
Penalties come after it on V1 and before it on V2.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from qtilt.forwards.compiled import library
from qtilt.method.budget import ROUNDING
from qtilt.method.params import GuidanceParams, asks_for_guidance
from qtilt.model.checkpoint import fingerprint_tokenizer
from qtilt.vllm_plugin.captured import choose_graphs
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.details import Details
from qtilt.vllm_plugin.failure import of_exception
from qtilt.vllm_plugin.guided import GuidedBatch, GuidedRequest
from qtilt.vllm_plugin.plan import VERSIONS, MemoryPlan
from qtilt.vllm_plugin.ranks import FollowingBatch, Ranks
from qtilt.vllm_plugin.records import Records, Stay
from qtilt.vllm_plugin.reserve import Reserve
from qtilt.vllm_plugin.runner import Requests
from qtilt.vllm_plugin.scoring import Texts
from qtilt.vllm_plugin.sizing import bytes_of, is_planned, plan_of, published, serving_of, value_dtype
from qtilt.vllm_plugin.step import RowSettings
from qtilt.vllm_plugin.v1.interface import V1Interface, v1_requests
from qtilt.vllm_plugin.v2.interface import V2Interface, show_forced_tokens
from qtilt.vllm_plugin.v2.requests import V2Requests, step_rows
from qtilt.vllm_plugin.versions import EngineSettings, Residents
from qtilt.vllm_plugin.vllm_internals import WORKER, require_internals

logger = logging.getLogger("vllm.qtilt.processor")  # vLLM configures the loggers below its own name only


EXACT_VERIFICATION = ("standard", "block")
"""The ways to verify drafts after which tokens are distributed as the guided logits say."""


class GuidanceProcessor(V1Interface, V2Interface):
    """Guides the requests whose ``extra_args`` ask for it.

    Loads the first value models at construction, so that vLLM counts their memory before it sizes its own cache. Under
    tensor parallelism that is the first rank's business, see ranks.py.

    Raises ValueError when the settings or a value model can't be used, MissingInternalsError for a vLLM that lacks what
    is needed of it: so what isn't documented of vLLM is imported where it is used, after that.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device_or_requests: torch.device | LogitsProcRequestState,
        is_pin_memory: bool = False,  # V1 passes it
    ) -> None:
        require_internals(WORKER)
        self.config = PluginConfig.from_additional_config(vllm_config.additional_config)
        _refuse_what_is_not_exact(vllm_config, self.config, is_v2=not isinstance(device_or_requests, torch.device))
        self.requests: Requests
        if isinstance(device_or_requests, torch.device):
            slots, max_length = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
            self.requests = v1_requests(device_or_requests, slots, max_length)
        else:
            speculates = vllm_config.speculative_config is not None
            self.requests = V2Requests(device_or_requests, speculates=speculates)
            show_forced_tokens(self)
        self.batch, self.records = _batch(vllm_config, self.config, self.requests), Records()
        plan = _plan(vllm_config, self.config, self.requests.device)
        settings = _engine_settings(vllm_config, self.config, self.requests, plan)
        self.reference = _reference(vllm_config)
        self.residents, self.texts = Residents(self.reference, settings), Texts()
        if not self.follows:
            self._load_at_start(settings, plan)

    @property
    def follows(self) -> bool:
        """Whether this is a rank that doesn't guide: no value model is resident here."""
        return isinstance(self.batch, FollowingBatch)

    def _load_at_start(self, settings: EngineSettings, plan: MemoryPlan | None) -> None:
        for name, path in self.config.value_models.items():
            version = self.residents.load_at_start(name, path, self.config.versions.get(name, 1))
            for warning in version.warnings:
                logger.warning(warning)
            logger.info("value cache of %s: %.2f GiB", version.label, version.engine.cache.gib)
        to_come = published(self.config)
        if not self.config.value_models:
            self.residents.hold_caches([each.geometry(settings.dtype, settings.device) for each in to_come.values()])
        if plan is not None and settings.device.type == "cuda":
            versions = VERSIONS * len(to_come) - len(self.config.value_models)
            weights = plan.value_weights // (VERSIONS * len(to_come))
            self.residents.reserve = Reserve(settings.device, plan.step_activations, weights, versions)

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
            "texts": len(self.texts),
        }

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Both; V2 passes the step's layout."""
        if len(self.batch) == 0:
            return logits
        self.guided_step = ctx
        return self.batch.guide(logits, self.v1_rows() if ctx is None else step_rows(ctx))

    def enter(self, slot: int, sampling_params: SamplingParams, *, has_tokens: bool) -> bool:
        """See :class:`TakesRequests`.

        Whatever is wrong with its guidance ends this request and no other: an unguided answer would be worse than none,
        and an exception here would end the engine.
        """
        if not asks_for_guidance(sampling_params.extra_args):
            return False
        if isinstance(self.batch, FollowingBatch):
            self.batch.put(slot)
            return True
        self.residents.reserve.begin_to_serve()
        stay = Stay(self.requests, self.batch.table, slot)
        ending_token = _ending_token(sampling_params)
        try:
            params = GuidanceParams.from_extra_args(sampling_params.extra_args)
            assert params is not None, "it was asked for"
            if self.config.behind_server and not params.trace_id:
                raise ValueError("this guidance comes from a client, past the server's checks")
            stay.guided_tokens = params.guided_tokens
            generated = self.requests.prefill(slot)[self.requests.prompt_len(slot) :]
            has_failed = self.records.failed(params.trace_id, generated.tolist()) is not None
            # Of the stays before this one: what its slot has on record is still another request's.
            spent = self._spent(params, generated.tolist(), slot)
            if self.config.behind_server:  # who else would take the records
                self.records.open(params.trace_id, stay)
            if not has_failed:
                stay.details = self._details(params)
                request = self._request(slot, params, stay, has_tokens=has_tokens)
                settings = RowSettings.of(params, sampling_params.temperature, ending_token)
                if params.kl_budget is not None:
                    self._refuse_where_it_isnt_there("kl_budget", params.kl_budget)
                    settings = settings._replace(kl_left=params.kl_budget * (1 - ROUNDING) - spent)
                self.batch.put(request, settings)
                return True
        except Exception as error:
            logger.exception("guidance can't begin, and its request ends")
            stay.fail(of_exception(error), self.requests.prefill_len(slot) - self.requests.prompt_len(slot))
        self.batch.put_failed(slot, stay, RowSettings.ending(ending_token))
        return True

    def leave(self, slot: int) -> None:
        self.batch.remove(slot)

    def _spent(self, params: GuidanceParams, generated: list[int], slot: int) -> float:
        """Of its budget, by a request that perhaps comes back to a batch."""
        steps = self.requests.prefill_len(slot) - self.requests.prompt_len(slot)
        if params.kl_budget is None or steps == 0:
            return 0.0
        return self.records.spent(params.trace_id, generated, steps)

    def _details(self, params: GuidanceParams) -> Details | None:
        """Raises ValueError for what the server should not have let through."""
        if not params.details:
            return None
        self._refuse_where_it_isnt_there("details", params.details)
        return Details(params.top_k)

    def _refuse_where_it_isnt_there(self, field: str, asked: object) -> None:
        """What needs records of all that was drawn: with drafts it isn't known, and only a server takes these."""
        if self.requests.speculates:
            raise ValueError(f"guidance.{field} is {asked}, and with speculative decoding there is no such thing")
        if not self.config.behind_server:
            raise ValueError(f"guidance.{field} is {asked}, and only behind qtilt-server there is such a thing")

    def _request(self, slot: int, params: GuidanceParams, stay: Stay, *, has_tokens: bool) -> GuidedRequest:
        """Raises ValueError for what the server should not have let through."""
        if not has_tokens:
            raise ValueError("guidance needs a prompt of tokens, this request has prompt embeddings")
        if params.top_k > self.config.max_top_k:
            raise ValueError(f"guidance.top_k is {params.top_k}, this server allows at most {self.config.max_top_k}")
        version = self.residents.get(params.value_model, params.version)
        lengths = self.requests.prompt_len(slot), self.requests.prefill_len(slot)
        return GuidedRequest(slot, params, version, stay, *lengths)


def _ending_token(sampling_params: SamplingParams) -> int | None:
    """A token at which the scheduler ends this request, before it looks at ``min_tokens``; None if there is none."""
    stop_token_ids = [sampling_params.eos_token_id, *(sampling_params.stop_token_ids or [])]
    return next((token for token in stop_token_ids if token is not None), None)


def _refuse_what_is_not_exact(vllm_config: VllmConfig, config: PluginConfig, *, is_v2: bool) -> None:
    """Raise ValueError for settings under which guidance would be wrong or missing on this runner."""
    if vllm_config.speculative_config is not None and not is_v2:
        raise ValueError(
            "guidance excludes speculative decoding on model runner V1: drop --speculative-config, or set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError("guidance needs every request on every rank: drop --enable-batch-sharded-sampling")
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.enable_adaptive_verification:
        raise ValueError("guidance excludes adaptive verification of drafts: drop it from --speculative-config")
    if vllm_config.speculative_config is not None:
        method = vllm_config.speculative_config.rejection_sample_method
        if method not in EXACT_VERIFICATION:
            raise ValueError(
                f"rejection_sample_method {method!r} accepts drafts that guidance wouldn't: drop it from "
                "--speculative-config"
            )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("guidance supports no pipeline parallelism yet: set --pipeline-parallel-size 1")
    if vllm_config.model_config.skip_tokenizer_init:
        raise ValueError("guidance compares tokenizers at start: drop --skip-tokenizer-init")
    if vllm_config.model_config.enable_sleep_mode:
        raise ValueError("value models don't survive vLLM's sleep mode: drop --enable-sleep-mode")
    if not config.behind_server:
        _refuse_what_only_the_server_can_tell(vllm_config)


def _refuse_what_only_the_server_can_tell(vllm_config: VllmConfig) -> None:
    """Raise ValueError where requests may be guided by values that aren't theirs: a processor isn't told."""
    reasons = {
        "a processor isn't told whose adapter a request is of: drop --enable-lora": vllm_config.lora_config is not None,
        "a value model reads tokens, and isn't told of prompt embeddings: drop --enable-prompt-embeds": (
            vllm_config.model_config.enable_prompt_embeds
        ),
        "a value model reads tokens, and of images and sounds has only their places: serve a model of text": (
            vllm_config.model_config.is_multimodal_model
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{reason}, or start qtilt-server, which looks at each request")


def _batch(vllm_config: VllmConfig, config: PluginConfig, requests: Requests) -> GuidedBatch | FollowingBatch:
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    ranks = Ranks(group, config.max_top_k, requests.device) if group.world_size > 1 else None
    if ranks is not None and not ranks.guides:
        return FollowingBatch(ranks)
    load_compiled_parts(requests.device)
    graphs = choose_graphs(requests.device, enforce_eager=vllm_config.model_config.enforce_eager)
    return GuidedBatch(requests, graphs, ranks)


def _reference(vllm_config: VllmConfig) -> Reference:
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config = vllm_config.model_config
    return Reference(
        tokenizer=fingerprint_tokenizer(cached_tokenizer_from_config(model_config)),
        vocab_size=model_config.get_vocab_size(),
        max_model_len=model_config.max_model_len,
    )


def _plan(vllm_config: VllmConfig, config: PluginConfig, device: torch.device) -> MemoryPlan | None:
    if not is_planned(config, device):
        if device.type == "cuda":
            logger.warning("no memory is held for value models: name what they are made of with --guidance-backbone")
        return None
    plan = plan_of(vllm_config, config, bytes_of(device))
    logger.info("memory of %s as planned:\n%s", device, plan.table())
    return plan


def _engine_settings(
    vllm_config: VllmConfig, config: PluginConfig, requests: Requests, plan: MemoryPlan | None
) -> EngineSettings:
    from qtilt.vllm_plugin.kernels import VllmKernels

    kv_fraction = config.kv_fraction
    if kv_fraction is None:
        kv_fraction = 1.0 if plan is None else plan.kv_fraction(serving_of(vllm_config, config))
    return EngineSettings(
        slots=requests.slots,
        max_length=vllm_config.model_config.max_model_len,
        dtype=value_dtype(vllm_config.model_config, config),
        device=requests.device,
        max_new_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        kv_fraction=kv_fraction,
        kernels=VllmKernels(),
        served=[vllm_config.model_config.model],
    )


def load_compiled_parts(device: torch.device) -> None:
    """On a CPU, have guidance run on its C++ parts, compiling them if that has never been done."""
    if device.type == "cpu":
        try:
            library.load()
        except RuntimeError as error:
            logger.warning("guidance runs slower than it could: %s", error)
