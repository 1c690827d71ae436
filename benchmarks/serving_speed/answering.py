"""vLLM that answers real prompts: sampled with seeds, ended by the end token, and counted candidate by candidate."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from qtilt.params import EXTRA_ARGS_KEY, GuidanceParams
from serving_speed.systems import System
from serving_speed.vllm_system import EngineSettings, VllmSystem
from serving_speed.workload import Outcome, Workload
from vllm import SamplingParams


class Answering(VllmSystem):
    """temperature: of all sampling. eta: of all guidance."""

    def __init__(self, settings: EngineSettings, plugin: bool, temperature: float, eta: float) -> None:
        super().__init__(settings, plugin)
        self._temperature, self._eta = temperature, eta
        self._system, self._seed = "", 0
        self._records: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def answer(self, system: System, workload: Workload, round_number: int) -> Outcome:
        """The same seeds for every system; the requests of another round have others."""
        self._system, self._seed = system.name, round_number * len(workload.requests) + 1_000_000
        return self.run(system, workload)

    def mean_candidates(self) -> dict[str, float]:
        """Of a guided step, by the name of the system, over all that was answered."""
        return {
            name: sum(record["candidates"] * record["guided_tokens"] for record in records)
            / sum(record["guided_tokens"] for record in records)
            for name, records in self._records.items()
        }

    def take_record(self, name: str, token_ids: list[int]) -> dict[str, Any]:
        record = super().take_record(name, token_ids)
        self._records[self._system].append(record)
        return record

    def sampling(self, system: System, name: str, new_tokens: int) -> SamplingParams:
        params = super().sampling(system, name, new_tokens)
        self._seed += 1
        params.seed, params.temperature, params.ignore_eos = self._seed, self._temperature, False
        if params.extra_args is not None:
            guidance = GuidanceParams.from_extra_args(params.extra_args)
            assert guidance is not None
            params.extra_args = {EXTRA_ARGS_KEY: replace(guidance, eta=self._eta).to_extra_args()}
        return params
