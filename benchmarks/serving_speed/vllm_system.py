"""vLLM in this process, with the guidance plugin or without it."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from qtilt.params import EXTRA_ARGS_KEY, GuidanceParams
from qtilt.vllm_plugin.config import ADDITIONAL_CONFIG_KEY, PROCESSOR, WORKER_EXTENSION, PluginConfig
from serving_speed.systems import System
from serving_speed.workload import Outcome, Workload
from vllm import SamplingParams

ETA = 0.2


@dataclass(frozen=True)
class EngineSettings:
    """kv_cache_bytes: enough for every request of a run, so that nothing is preempted."""

    reference: Path
    values: dict[str, Path]
    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    max_top_k: int
    dummy_weights: bool
    enforce_eager: bool
    compilation: dict[str, Any]
    prefix_caching: bool
    gpu_memory_utilization: float | None


class VllmSystem:
    """One engine; runs workloads of the systems it can serve."""

    def __init__(self, settings: EngineSettings, plugin: bool) -> None:
        arguments: dict[str, Any] = {}
        if plugin:
            values = {type: str(path) for type, path in settings.values.items()}
            config = PluginConfig(value_models=values, max_top_k=settings.max_top_k, behind_server=True)
            arguments = {
                "logits_processors": [PROCESSOR],
                "worker_extension_cls": WORKER_EXTENSION,
                "additional_config": {ADDITIONAL_CONFIG_KEY: config.to_dict()},
            }
        if settings.gpu_memory_utilization is not None:
            arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(settings.reference),
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                kv_cache_memory_bytes=settings.kv_cache_bytes,
                enable_prefix_caching=settings.prefix_caching,
                enforce_eager=settings.enforce_eager,
                compilation_config=settings.compilation,
                load_format="dummy" if settings.dummy_weights else "auto",
                distributed_executor_backend="uni",
                seed=0,
                **arguments,
            )
        )
        self._numbers = itertools.count()

    def describe(self) -> dict[str, Any]:
        config = self.engine.vllm_config
        return {
            "threads": torch.get_num_threads(),
            "compilation_mode": str(config.compilation_config.mode),
            "compilation_backend": config.compilation_config.backend,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "block_size": config.cache_config.block_size,
        }

    def run(self, system: System, workload: Workload) -> Outcome:
        """Requests are handed over when they arrive, while fewer than the concurrency are in flight."""
        engine = self.engine
        waiting = list(enumerate(workload.requests))[::-1]
        running: dict[str, int] = {}
        token_times: list[list[float]] = [[] for _ in workload.requests]
        token_ids: list[list[int]] = [[] for _ in workload.requests]
        cpu_started, started = time.process_time(), time.perf_counter()
        while waiting or running:
            now = time.perf_counter() - started
            while waiting and waiting[-1][1].arrives <= now and len(running) < workload.concurrency:
                index, request = waiting.pop()
                running[self.add(system, request.prompt, workload.new_tokens)] = index
            if not running:
                time.sleep(max(0.0, waiting[-1][1].arrives - now))
                continue
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                index = running[output.request_id]
                token_times[index] += [now] * len(output.outputs[0].token_ids)
                token_ids[index] += output.outputs[0].token_ids
                if output.finished:
                    del running[output.request_id]
                    if system.type is not None:
                        self.take_record(output.request_id, token_ids[index])
        cpu_seconds = time.process_time() - cpu_started
        engine.step()  # lets the worker know what has finished
        return Outcome([request.arrives for request in workload.requests], token_times, cpu_seconds)

    def take_record(self, name: str, token_ids: list[int]) -> dict[str, Any]:
        """What was done to a finished request, asked for as the server does for every guided response."""
        ((record,),) = self.engine.collective_rpc("qtilt_take_records", args=(name, [token_ids]))
        return dict(record)

    def add(self, system: System, prompt: list[int], new_tokens: int) -> str:
        """Hand a request to vLLM; returns its name."""
        name = f"request-{next(self._numbers)}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, self.sampling(system, name, new_tokens))
        return name

    def sampling(self, system: System, name: str, new_tokens: int) -> SamplingParams:
        extra_args = None
        if system.type is not None:
            guidance = GuidanceParams(system.type, 1, ETA, system.top_k, trace_id=name)
            extra_args = {EXTRA_ARGS_KEY: guidance.to_extra_args()}
        return SamplingParams(
            temperature=1.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args,
        )
