"""What each stage's output depends on: what settings files hold."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

from qtilt_trainer.config import EvaluateConfig, LoopConfig
from qtilt_trainer.digests import code_digests, data_digests
from qtilt_trainer.evaluate import Cell
from qtilt_trainer.redaction import redacted
from qtilt_trainer.tasks import Task

SIZE = {"prompts", "samples_per_prompt"}
"""Of `[collect]`: they may grow."""


class StageSettings:
    """JSON-able settings of the stages of one run; secrets are hidden in them."""

    def __init__(self, config: LoopConfig, task: Task) -> None:
        self._config, self._task = config, task

    def collect(self, iteration: int) -> dict[str, Any]:
        """Of the roll-outs of one iteration."""
        collect = self._config.collect_of(iteration)
        return {
            **self._grader,
            "sampling": self._sampling,
            "collect": collect.model_dump(mode="json", exclude={*SIZE, "max_refused_share"}),
            "size": collect.model_dump(mode="json", include=SIZE),
        }

    def fit(self, iteration: int) -> dict[str, Any]:
        """Of the value model of one iteration."""
        return {
            "value_model": self.value_model(),
            "fit": self._config.fit_of(iteration).model_dump(mode="json", exclude={"threads"}),
            "rollouts": [self.collect(number) for number in range(1, iteration + 1)],
        }

    def value_model(self) -> dict[str, Any]:
        """Of the value model before any fit."""
        return self._config.value_model.model_dump(mode="json", exclude={"name"})

    def evaluate(self, config: EvaluateConfig, cell: Cell, iteration: int) -> dict[str, Any]:
        """Of one cell of the grid."""
        settings = {
            **self._grader,
            "sampling": self._sampling,
            "evaluate": config.model_dump(mode="json", include={"prompts", "samples", "k", "guidance_top_k", "seed"}),
            "cell": asdict(cell),
        }
        return settings if cell.method is None else {**settings, "fitted": self.fit(iteration)}

    def constant_answer(self, config: EvaluateConfig) -> dict[str, Any]:
        """Of the best constant answer."""
        return {
            "evaluate": config.model_dump(mode="json", include={"prompts", "constant_candidates", "seed"}),
            "rollouts": self.collect(1),
        }

    @cached_property
    def _grader(self) -> dict[str, Any]:
        fields = self._config.task.model_dump()
        return {
            "task": redacted(self._config.task.model_dump(mode="json")),
            "data": data_digests(self._task, fields),
            "code": code_digests(self._task, fields),
            "reward": self._config.reward.model_dump(mode="json", include={"truncated"}),
        }

    @property
    def _sampling(self) -> dict[str, Any]:
        return self._config.sampling.model_dump(mode="json")
