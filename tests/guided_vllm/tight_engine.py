"""An engine in which everything vLLM does to a batch happens, with few and short requests.

Prompts longer than 32 tokens are prefilled in chunks; 11 blocks of 32 tokens hold a third of what 8 requests may need,
so long requests preempt each other; the prefix cache is on. Tests assert that what they are about really happened.
"""

from pathlib import Path
from typing import Any

from vllm.config.reasoning import ReasoningConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.llm_engine import LLMEngine

from guided_vllm.tiny_models import MAX_MODEL_LEN

MAX_SEQS = 8
THOUGHT_BEGINS, THOUGHT_ENDS = "w1", "w2 w3"
"""For requests with a thinking budget, which is used up between these."""


def start(reference: Path, **more: Any) -> LLMEngine:
    """more: further engine arguments."""
    arguments: dict[str, Any] = {
        "model": str(reference),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": 32,
        "block_size": 32,
        "num_gpu_blocks_override": 11,
        "kv_cache_memory_bytes": 1 << 24,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "disable_log_stats": False,
        "seed": 0,
        "reasoning_config": ReasoningConfig(reasoning_start_str=THOUGHT_BEGINS, reasoning_end_str=THOUGHT_ENDS),
    }
    return LLMEngine.from_engine_args(EngineArgs(**(arguments | more)))


def schedules_asynchronously(engine: LLMEngine) -> bool:
    return isinstance(engine.engine_core.engine_core.scheduler, AsyncScheduler)


def worker(engine: LLMEngine) -> Any:
    return engine.engine_core.engine_core.model_executor.driver_worker.worker
