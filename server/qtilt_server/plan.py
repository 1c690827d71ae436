"""``--guidance-plan``: how a GPU's memory would be shared out, from the models' configs alone."""

import argparse
from typing import Any

from qtilt.vllm_plugin.config import PluginConfig
from qtilt.vllm_plugin.plan import GIB, Serving
from qtilt_server.errors import StartupError

DEFAULTS = ((160, 1024, 16384), (70, 1024, 8192), (0, 256, 2048))
"""vLLM 0.32's --max-num-seqs and --max-num-batched-tokens for GPUs from so many GiB on (EngineArgs; A100s aside)."""


def print_plan(args: argparse.Namespace, config: PluginConfig, device_gib: float) -> None:
    """Print the table. Raises StartupError when it can't fit, or a config can't be read."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from qtilt.vllm_plugin.sizing import plan_for

    try:
        model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
        serving = _serving(args, model_config, config, device_gib)
        blocks = args.num_gpu_blocks_override
        plan = plan_for(
            model_config,
            config,
            serving,
            int(device_gib * GIB * args.gpu_memory_utilization),
            ranks=args.tensor_parallel_size,
            cache_bytes=args.kv_cache_memory_bytes,
            cache_tokens=blocks and blocks * (args.block_size or 16),
        )
    except (OSError, ValueError) as error:
        raise StartupError(str(error)) from error
    print(f"{args.model} with {serving.slots} requests of up to {serving.max_length} tokens:")  # noqa: T201 - asked for
    print(plan.table())  # noqa: T201


def _serving(args: argparse.Namespace, model_config: Any, config: PluginConfig, device_gib: float) -> Serving:
    slots, tokens = next((slots, tokens) for gib, slots, tokens in DEFAULTS if device_gib >= gib)
    return Serving(
        args.max_num_seqs or slots,
        model_config.max_model_len,
        args.max_num_batched_tokens or tokens,
        config.max_top_k,
    )
