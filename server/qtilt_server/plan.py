"""How a device's memory would be shared out, from the models' configs alone: asked before anything is loaded."""

import argparse
from typing import Any

import torch

from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.plan import GIB, MemoryPlan, Serving
from qtilt_server.errors import StartupError

DEFAULTS = ((160, 1024, 16384), (70, 1024, 8192), (0, 256, 2048))
"""vLLM's --max-num-seqs and --max-num-batched-tokens for GPUs from so many GiB on.

Copied from EngineArgs of 0.32, where A100s are an exception; in 0.33 so is the GB10.
"""
BLOCK_TOKENS = 16
"""vLLM's --block-size on GPUs."""


def print_plan(args: argparse.Namespace, config: PluginConfig, device_gib: float) -> None:
    """``--guidance-plan``. Raises StartupError when it can't fit, or a config can't be read."""
    serving, plan = _plan(args, config, int(device_gib * GIB), on_gpu=True)
    print(f"{args.model} with {serving.slots} requests of up to {serving.max_length} tokens:")  # noqa: T201 - asked for
    print(plan.table())  # noqa: T201


def check_plan(args: argparse.Namespace, config: PluginConfig) -> None:
    """Raise StartupError when guidance can't fit on this machine's device beside the reference.

    The worker plans again, with what vLLM has settled on.
    """
    from vllm.platforms import current_platform

    from qtilt.vllm_plugin.sizing import bytes_of, is_planned

    if is_planned(config, torch.device(current_platform.device_type)):
        on_cpu = current_platform.is_cpu()
        device_bytes = bytes_of(torch.device("cpu")) if on_cpu else current_platform.get_device_total_memory()
        _plan(args, config, device_bytes, on_gpu=not on_cpu)


def _plan(
    args: argparse.Namespace, config: PluginConfig, device_bytes: int, *, on_gpu: bool
) -> tuple[Serving, MemoryPlan]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from qtilt.vllm_plugin.sizing import plan_for

    blocks = args.num_gpu_blocks_override
    try:
        model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
        serving = _serving(args, model_config, config, device_bytes, on_gpu=on_gpu)
        plan = plan_for(
            model_config,
            config,
            serving,
            device_bytes,
            args.gpu_memory_utilization,
            ranks=args.tensor_parallel_size,
            cache_bytes=args.kv_cache_memory_bytes,
            cache_tokens=blocks and blocks * (args.block_size or BLOCK_TOKENS),
        )
    except (OSError, ValueError) as error:
        raise StartupError(str(error)) from error
    return serving, plan


def _serving(
    args: argparse.Namespace, model_config: Any, config: PluginConfig, device_bytes: int, *, on_gpu: bool
) -> Serving:
    slots, tokens = next((slots, tokens) for gib, slots, tokens in DEFAULTS if device_bytes >= gib * GIB)
    return Serving(
        args.max_num_seqs or slots,
        model_config.max_model_len,
        args.max_num_batched_tokens or tokens,
        config.max_top_k,
        on_gpu=on_gpu,
    )
