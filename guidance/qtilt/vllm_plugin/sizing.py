"""From vLLM's configuration and ours to a plan of memory: in the worker before it loads anything, and for a dry run."""

import logging
import math
import os
from collections.abc import Mapping

import torch
from vllm.config import ModelConfig, VllmConfig

from qtilt.forwards.memory import PAGE_TOKENS
from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.plan import (
    MemoryPlan,
    ModelSize,
    PlanError,
    Published,
    Serving,
    all_of,
    plan_memory,
    reference_size,
)

logger = logging.getLogger("vllm.qtilt.sizing")  # vLLM configures the loggers below its own name only


def value_dtype(model_config: ModelConfig, config: PluginConfig) -> torch.dtype:
    """Of the value models' weights and caches."""
    dtype = model_config.dtype if config.value_dtype == "auto" else getattr(torch, config.value_dtype)
    assert isinstance(dtype, torch.dtype), "vLLM resolves its dtype before it builds a worker"
    return dtype


def published(config: PluginConfig) -> Mapping[str, Published]:
    """What will be held at once, by name: the value models of the start, else what is to come."""
    if config.value_models or config.backbone is None:
        return {name: Published(path) for name, path in config.value_models.items()}
    return {config.backbone: Published(config.backbone, config.backbone_layers)}


def is_planned(config: PluginConfig, device: torch.device) -> bool:
    """Whether memory is shared out by a plan: on GPUs, or if it was asked for."""
    wanted = config.kv_tokens is not None or config.backbone is not None or device.type == "cuda"
    return wanted and bool(published(config))


def plan_of(vllm_config: VllmConfig, config: PluginConfig, device_bytes: int) -> MemoryPlan:
    """device_bytes: of the whole device. Raises ValueError when it can't fit, or a config can't be read."""
    cache = vllm_config.cache_config
    return plan_for(
        vllm_config.model_config,
        config,
        serving_of(vllm_config, config),
        device_bytes,
        cache.gpu_memory_utilization,
        ranks=vllm_config.parallel_config.tensor_parallel_size,
        cache_bytes=cache.kv_cache_memory_bytes,
        cache_tokens=cache.num_gpu_blocks_override and cache.num_gpu_blocks_override * cache.block_size,
    )


def plan_for(
    model_config: ModelConfig,
    config: PluginConfig,
    serving: Serving,
    device_bytes: int,
    utilization: float,
    *,
    ranks: int,
    cache_bytes: int | None,
    cache_tokens: int | None,
) -> MemoryPlan:
    """utilization: what part of the device vLLM may use, if the user hasn't said how large its key-value cache is
    (``cache_bytes``, ``cache_tokens``).

    Raises ValueError when it can't fit, or a config can't be read.
    """
    assert isinstance(model_config.dtype, torch.dtype), "vLLM resolves its dtype before"
    values = list(published(config).values())
    for value in values:
        if value.max_positions < serving.max_length:
            raise PlanError(
                f"{value.source} has {value.max_positions} positions, fewer than the {serving.max_length} tokens of "
                "the longest request: lower --max-model-len, or take a backbone with more"
            )
    reference = _reference_size(model_config, model_config.dtype, ranks)
    dtype = value_dtype(model_config, config)
    return plan_memory(
        int(device_bytes * (utilization if cache_bytes is None else 1)),
        reference,
        all_of(values, dtype),
        serving,
        _value_tokens(config, serving),
        cache_bytes if cache_tokens is None else (cache_tokens * reference.token or None),
    )


def _reference_size(model_config: ModelConfig, dtype: torch.dtype, ranks: int) -> ModelSize:
    """Nothing of one that is quantised, of latent attention, or unknown to transformers: vLLM will measure it."""
    if not (model_config.quantization or model_config.use_mla):
        try:
            return reference_size(model_config.hf_config, dtype, ranks)
        except (ValueError, AttributeError) as error:
            logger.warning("the size of %s can't be told from its config: %s", model_config.model, error)
    return ModelSize(weights=0, token=0, activations=0, vocabulary=model_config.get_vocab_size())


def _value_tokens(config: PluginConfig, serving: Serving) -> int | None:
    """What the user has said of value caches; None: as many as vLLM's own."""
    if config.kv_fraction is not None:
        return math.ceil(config.kv_fraction * serving.all_pages) * PAGE_TOKENS
    return config.kv_tokens if isinstance(config.kv_tokens, int) else None


def serving_of(vllm_config: VllmConfig, config: PluginConfig) -> Serving:
    """What is served at most."""
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    return Serving(
        scheduler.max_num_seqs,
        vllm_config.model_config.max_model_len,
        scheduler.max_num_batched_tokens,
        config.max_top_k,
        drafts=speculative.num_speculative_tokens if speculative is not None else 0,
        on_gpu=vllm_config.device_config.device_type == "cuda",
    )


def bytes_of(device: torch.device) -> int:
    """All of its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
