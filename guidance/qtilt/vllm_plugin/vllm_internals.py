"""Every thing of vLLM that the product uses beyond command-line flags, and that a new version may move or change.

Also the interfaces that vLLM documents for plugins, for their signatures. The list is held against the sources of vLLM:
at start, and by tests of versions that can't run where they do (tests/unit/test_vllm_internals.py). Not seen are what
is compiled, of which the value model's forward calls ``torch.ops._C.silu_and_mul``, and what vLLM does between its
calls: v1/requests.py and v2/requests.py say what they rest on. Imports neither torch nor vllm.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qtilt.vllm_plugin.vllm_sources import VllmSources, can_be_called, signature_of, takes_exactly

SUPPORTED = ">=0.32,<0.34"
"""The versions whose sources have been held against the list, as pyproject.toml allows them."""


class MissingInternalsError(RuntimeError):
    """The installed vLLM lacks something of the list."""


@dataclass(frozen=True, slots=True)
class Internal:
    """What is used of a module, and for what.

    has: names, and behind a class or a function which of its attributes. calls: functions, with the parameters that we
    pass. overrides: methods that vLLM calls and we write, or wrap, with all of their parameters.
    """

    module: str
    why: str
    has: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Each as ``name`` or ``Class.attribute``."""
        return [
            f"{owner}.{attribute}" if attribute else owner
            for owner, attributes in self.has.items()
            for attribute in attributes.split() or [""]
        ]


WORKER = (
    Internal(
        "vllm.v1.sample.logits_processor",
        "the documented interface of V1's logits processors",
        has={
            "BatchUpdate": "removed added moved",
            "MoveDirectionality": "SWAP",
        },
        overrides=(
            "LogitsProcessor.__init__(self, vllm_config, device, is_pin_memory)",
            "LogitsProcessor.validate_params(cls, sampling_params)",
            "LogitsProcessor.is_argmax_invariant(self)",
            "LogitsProcessor.update_state(self, batch_update)",
            "LogitsProcessor.apply(self, logits)",
        ),
    ),
    Internal(
        "vllm.v1.worker.gpu_model_runner",
        "V1 passes processors nothing but logits: how long each history is in a step, and what was fed last",
        has={
            "GPUModelRunner": "input_batch optimistic_seq_lens_cpu query_start_loc input_ids discard_request_mask",
        },
        overrides=("GPUModelRunner._sample(self, logits, spec_decode_metadata)",),
    ),
    Internal(
        "vllm.v1.worker.gpu_input_batch",
        "which requests V1 runs in a step, and where our processor is among its own",
        has={
            "InputBatch": "num_reqs logitsprocs generators thinking_budget_state_holder",
        },
    ),
    Internal(
        "vllm.v1.sample.logits_processor.state",
        "where our processor is among V1's own",
        has={
            "LogitsProcessors": "all",
        },
    ),
    Internal(
        "vllm.v1.utils",
        "V1's lengths and tokens, on host and device",
        has={
            "CpuGpuBuffer": "gpu np",
        },
    ),
    Internal(
        "vllm.v1.sample.thinking_budget_state",
        "V1 forces tokens after all processors, and those aren't guided",
        overrides=("ThinkingBudgetStateHolder.apply_to_logits(self, logits, predict_bonus_token, spec_token_ids)",),
    ),
    Internal(
        "vllm.v1.worker.cpu_model_runner",
        "seeds that V1 loses on CPUs while a prompt is prefilled in chunks",
        overrides=("CPUModelRunner.sample_tokens(self, grammar_output)",),
    ),
    Internal(
        "vllm.v1.worker.gpu.sample.logits_processor",
        "the documented interface of V2's logits processors",
        has={
            "LogitsContext": "idx_mapping_np expanded_idx_mapping input_ids pos seq_lens_upper_bound_np",
            "LogitsProcRequestState": "device max_num_reqs all_token_ids prompt_len prefill_len total_len",
        },
        overrides=(
            "LogitsProcessor.__init__(self, vllm_config, req_states)",
            "LogitsProcessor.validate_params(cls, sampling_params)",
            "LogitsProcessor.add_request(self, req_idx, sampling_params)",
            "LogitsProcessor.apply_staged_writes(self)",
            "LogitsProcessor.apply(self, logits, ctx)",
        ),
    ),
    Internal(
        "vllm.v1.worker.gpu.buffer_utils",
        "the tokens of a request that has just come, which V2 has staged and not written to the device yet",
        has={
            "StagedWriteTensor": "gpu _staged_write_indices _staged_write_contents",
            "UvaBackedTensor": "np",
        },
    ),
    Internal(
        "vllm.v1.worker.gpu.sample.thinking_budget",
        "V2 forces tokens after all processors, and those aren't guided",
        has={
            "ThinkingBudgetState": "enabled use_thinking_budget",
        },
        overrides=("ThinkingBudgetState.apply(self, logits, ctx)",),
    ),
    Internal(
        "vllm.v1.worker.worker_base",
        "the worker that the extension is mixed into",
        has={
            "WorkerBase": "model_runner",
        },
    ),
    Internal(
        "vllm.v1.worker.gpu.model_runner",
        "where our processor is, and which requests still run",
        has={
            "GPUModelRunner": "sampler req_states",
        },
    ),
    Internal(
        "vllm.v1.worker.gpu.sample.sampler",
        "where our processor is",
        has={
            "Sampler": "logits_processors",
        },
    ),
    Internal(
        "vllm.v1.worker.gpu.states",
        "which requests still run",
        has={
            "RequestState": "index_to_req_id",
        },
    ),
    Internal(
        "vllm.distributed",
        "one rank guides, and tells the others",
        calls=("get_tp_group()",),
    ),
    Internal(
        "vllm.distributed.parallel_state",
        "one rank guides, and tells the others",
        has={
            "GroupCoordinator": "world_size rank_in_group",
        },
        calls=("GroupCoordinator.broadcast(self, input_)",),
    ),
    Internal(
        "vllm.tokenizers",
        "the reference's tokens are compared with a value model's",
        calls=(
            "cached_tokenizer_from_config(model_config)",
            "get_tokenizer(tokenizer_name, *, runner_type, tokenizer_mode, revision, trust_remote_code)",
        ),
    ),
    Internal(
        "vllm._custom_ops",
        "fused kernels of the value model's forward",
        calls=(
            "rms_norm(out, input, weight, epsilon)",
            "fused_add_rms_norm(input, residual, weight, epsilon)",
            "rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)",
        ),
    ),
    Internal(
        "vllm.vllm_flash_attn",
        "attention over pages in place",
        calls=(
            "is_fa_version_supported(fa_version)",
            (
                "flash_attn_varlen_func(q, k, v, *, out, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, "
                "block_table, softmax_scale, causal, num_splits, return_softmax_lse, fa_version)"
            ),
        ),
    ),
    Internal(
        "vllm.config",
        "what is served, and how large it may become",
        has={
            "VllmConfig": (
                "additional_config cache_config device_config lora_config model_config parallel_config "
                "scheduler_config speculative_config use_v2_model_runner"
            ),
            "CacheConfig": "block_size gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override",
            "DeviceConfig": "device_type",
            "ModelConfig": (
                "dtype enable_prompt_embeds enable_sleep_mode enforce_eager get_vocab_size hf_config "
                "is_multimodal_model max_model_len model quantization runner_type skip_tokenizer_init tokenizer "
                "tokenizer_mode tokenizer_revision trust_remote_code use_mla"
            ),
            "ParallelConfig": "enable_batch_sharded_sampling pipeline_parallel_size tensor_parallel_size",
            "SchedulerConfig": "max_num_batched_tokens max_num_seqs",
            "SpeculativeConfig": "enable_adaptive_verification num_speculative_tokens rejection_sample_method",
        },
    ),
    Internal(
        "vllm.sampling_params",
        "what a request asks for, and where it would end",
        has={
            "SamplingParams": "extra_args temperature eos_token_id stop_token_ids",
        },
    ),
)
"""What guidance uses inside the worker."""

SERVER = (
    Internal(
        "vllm.entrypoints.cli.serve",
        "the flags of `vllm serve`, its checks and its start",
        has={
            "ServeSubcommand": "name",
        },
        calls=(
            "ServeSubcommand.subparser_init(self, subparsers)",
            "ServeSubcommand.validate(self, args)",
            "ServeSubcommand.cmd(args)",
        ),
    ),
    Internal(
        "vllm.utils.argparse_utils",
        "the flags of `vllm serve`",
        has={
            "FlexibleArgumentParser": "",
        },
    ),
    Internal(
        "vllm.logger",
        "the server's log",
        calls=("configure_logging_from_args(args)",),
    ),
    Internal(
        "vllm.engine.arg_utils",
        "what is served, before the engine starts",
        calls=(
            "AsyncEngineArgs.from_cli_args(cls, args)",
            "AsyncEngineArgs.create_model_config(self)",
            "AsyncEngineArgs.create_engine_config(self)",
        ),
    ),
    Internal(
        "vllm.platforms",
        "the memory that is shared out",
        has={
            "current_platform": "",
            "Platform": "device_type",
        },
        calls=(
            "Platform.is_cpu(self)",
            "Platform.get_device_total_memory(cls)",
        ),
    ),
    Internal(
        "vllm.entrypoints.launchers.launcher",
        "how long answers may still be sent after the engine has stopped",
        calls=("serve_http(app, sock, *, timeout_graceful_shutdown)",),
    ),
    Internal(
        "vllm.entrypoints.launchers.api_server.entry",
        "serve_http, which is replaced where it is called",
        has={
            "serve_http": "",
            "build_and_serve": "",
        },
    ),
    Internal(
        "vllm.entrypoints.launchers.api_server.app_state",
        "the handlers of vLLM's routes, and what they share",
        has={
            "init_app_state": "engine_client args openai_serving_models serving_tokenization",
        },
    ),
    Internal(
        "vllm.plugins.endpoint_plugins.interface",
        "the documented interface of endpoint plugins",
        has={
            "EndpointPlugin": "name required_tasks",
        },
        overrides=(
            "EndpointPlugin.attach_router(self, app)",
            "EndpointPlugin.init_state(self, engine_client, state, args)",
        ),
    ),
    Internal(
        "vllm.entrypoints.openai.completion.api_router",
        "vLLM's own answer to unguided requests, and its handler for guided ones",
        calls=(
            "completion(request)",
            "create_completion(request, raw_request)",
        ),
    ),
    Internal(
        "vllm.entrypoints.openai.chat_completion.api_router",
        "vLLM's own answer to unguided requests, and its handler for guided ones",
        calls=(
            "chat(request)",
            "create_chat_completion(request, raw_request)",
        ),
    ),
    Internal(
        "vllm.entrypoints.openai.completion.serving",
        "a handler is copied with a watched engine",
        has={
            "OpenAIServingCompletion": "engine_client models",
        },
        calls=("OpenAIServingCompletion.create_completion(self, request, raw_request)",),
    ),
    Internal(
        "vllm.entrypoints.openai.chat_completion.serving",
        "a handler is copied with a watched engine",
        has={
            "OpenAIServingChat": "engine_client models",
        },
        calls=("OpenAIServingChat.create_chat_completion(self, request, raw_request)",),
    ),
    Internal(
        "vllm.entrypoints.openai.completion.protocol",
        "requests, with a guidance block, and answers that tell of it",
        has={
            "CompletionRequest": "model n stream echo max_tokens prompt_embeds use_beam_search",
            "CompletionResponse": "choices",
            "CompletionResponseChoice": "",
        },
    ),
    Internal(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "requests, with a guidance block, and answers that tell of it",
        has={
            "ChatCompletionRequest": "model n stream use_beam_search",
            "ChatCompletionResponse": "choices",
            "ChatCompletionResponseChoice": "",
        },
    ),
    Internal(
        "vllm.entrypoints.serve.utils.api_utils",
        "what vLLM's routes are wrapped in",
        calls=(
            "load_aware_call(func)",
            "with_cancellation(handler_func)",
            "validate_json_request(raw_request)",
        ),
    ),
    Internal(
        "vllm.entrypoints.serve.utils.orca_metrics",
        "a header of answers",
        calls=("metrics_header(metrics_format)",),
    ),
    Internal(
        "vllm.entrypoints.serve.utils.sse_keep_alive",
        "streams that proxies keep open",
        calls=("with_sse_keep_alive(generator, interval)",),
    ),
    Internal(
        "vllm.entrypoints.openai.models.serving",
        "value models are models",
        has={
            "OpenAIServingModels": "base_model_paths lora_requests model_config",
        },
        calls=("OpenAIServingModels.show_available_models(self)",),
        overrides=("OpenAIServingModels.model_name(self, lora_request)",),
    ),
    Internal(
        "vllm.entrypoints.serve.engine.protocol",
        "value models are models, and errors have vLLM's shape",
        has={
            "ModelCard": "id owned_by root parent max_model_len permission",
            "ModelPermission": "",
            "ErrorResponse": "error",
        },
    ),
    Internal(
        "vllm.entrypoints.serve.tokenize.protocol",
        "texts that are scored are tokenized as those that are completed",
        has={
            "TokenizeCompletionRequest": "prompt add_special_tokens",
            "TokenizeChatRequest": "messages",
            "TokenizeResponse": "tokens",
        },
    ),
    Internal(
        "vllm.entrypoints.serve.tokenize.serving",
        "texts that are scored are tokenized as those that are completed",
        calls=("ServingTokenization.create_tokenize(self, request, raw_request)",),
    ),
    Internal(
        "vllm.tokenizers.protocol",
        "what single tokens are in text",
        calls=("TokenizerLike.decode(self, ids)",),
    ),
    Internal(
        "vllm.renderers.base",
        "the tokenizer that prompts are read with",
        calls=("BaseRenderer.get_tokenizer(self)",),
    ),
    Internal(
        "vllm.exceptions",
        "refusals and failures that vLLM answers",
        has={
            "GenerationError": "",
            "GracefulHTTPError": "",
            "VLLMClientError": "",
        },
        calls=("VLLMValidationError(self, message, *, parameter)",),
    ),
    Internal(
        "vllm.outputs",
        "the tokens of each choice, as they come out of the engine",
        has={
            "CompletionOutput": "index token_ids finish_reason",
            "RequestOutput": "outputs finished",
        },
        calls=("CompletionOutput.finished(self)",),
    ),
    Internal(
        "vllm.sampling_params",
        "whether outputs are deltas",
        has={
            "RequestOutputKind": "DELTA",
            "SamplingParams": "output_kind",
        },
    ),
    Internal(
        "vllm.lora.request",
        "whose adapter a request asks for",
        has={
            "LoRARequest": "lora_name",
        },
    ),
    Internal(
        "vllm.envs",
        "whoever has the admin key may do what others may",
        has={
            "VLLM_API_KEY": "",
        },
    ),
    Internal(
        "vllm.v1.engine.async_llm",
        "requests are followed, and the worker is asked",
        has={
            "AsyncLLM": "errored vllm_config renderer",
        },
        calls=(
            "AsyncLLM.generate(self, prompt, sampling_params, request_id)",
            "AsyncLLM.abort(self, request_id)",
            "AsyncLLM.collective_rpc(self, method, *, args)",
        ),
    ),
)
"""What the server uses beside that."""


def missing(sources: VllmSources, internals: Iterable[Internal]) -> Iterator[str]:
    """Each thing that isn't there or has other parameters, and what it is for."""
    for internal in internals:
        for name in internal.names:
            if sources.find(internal.module, name) is None:
                yield f"{internal.module} has no {name} ({internal.why})"
        signatures = {
            **dict.fromkeys(internal.calls, can_be_called),
            **dict.fromkeys(internal.overrides, takes_exactly),
        }
        for signature, fits in signatures.items():
            name, expected = signature_of(signature)
            found = sources.parameters(internal.module, name)
            if found is None:
                yield f"{internal.module} has no {name} ({internal.why})"
            elif not fits(found, expected):
                yield f"{internal.module} has {name} with other parameters than {signature} ({internal.why})"


def require_internals(internals: Iterable[Internal]) -> None:
    """Raise MissingInternalsError, one for everything that the installed vLLM lacks."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingInternalsError(f"vLLM isn't installed: guidance needs {SUPPORTED}")
    sources = VllmSources(Path(spec.submodule_search_locations[0]))
    if lacks := list(missing(sources, internals)):
        raise MissingInternalsError(
            f"this is vLLM {sources.version}, and guidance is made for {SUPPORTED}: {'; '.join(lacks)}"
        )
