"""The whole training: collect, fit, publish for each iteration, then evaluate and report.

There is no state but the files below `run_dir`: every stage looks at what is there, does what is missing and writes its
result atomically. Killed anywhere and started again, the loop goes on where it was.

    rollouts/iteration-001/           roll-outs and rewards (rollouts.py), failed_rewards.jsonl, settings.json
    rollouts/refused.jsonl            prompts that the server refused, and why
    value_models/initial              the value model before any fit; .settings.json beside it
    value_models/iteration-001        … fitted on all roll-outs up to there; .settings.json and .fit.json beside it
    published/iteration-001.json      the version the server gave it
    evaluation/iteration-002/CELL/    completions and record of one cell of the grid (evaluate/)
    evaluation/iteration-001/constant the record of the best constant answer
    results.json, results.md          all records, and as a table
    config.json                       the resolved configuration they were made with
    report.html, plots/               report
    superseded-1/                     what was made before the run grew or was graded anew
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from qtilt_trainer.atomic_file import write_json, write_text
from qtilt_trainer.client import Guidance
from qtilt_trainer.collect import Missing, missing_samples, plan_requests, sampling_of
from qtilt_trainer.config import EvaluateConfig, LoopConfig, ValueModelConfig
from qtilt_trainer.evaluate import RECORD, Record, evaluate, grid, measure_constant_answer, write_results
from qtilt_trainer.generate import generate
from qtilt_trainer.preflight import check_framing, check_lengths, check_request, check_rewards
from qtilt_trainer.publish import path_on_server, publish
from qtilt_trainer.redaction import redacted
from qtilt_trainer.refused import RefusedPrompts
from qtilt_trainer.regrade import Stored, check_regradable, regrade
from qtilt_trainer.rewards import Grader, Rules, report_rewards, ungraded_count
from qtilt_trainer.rollouts import RolloutStore, read_compactly
from qtilt_trainer.settings_file import claim, differences
from qtilt_trainer.stage_settings import StageSettings
from qtilt_trainer.steady_client import SteadyClient
from qtilt_trainer.superseded import set_aside
from qtilt_trainer.tasks import Task, make_task

logger = logging.getLogger(__name__)

RESULTS = "results.json"
SETTINGS = "settings.json"
TABLE = "results.md"


class Run:
    """One run directory and the stages that fill it. Nothing is kept in memory between stages."""

    def __init__(self, config: LoopConfig) -> None:
        """Raises ValueError for a task that can't be made or whose rewards the value model can't represent."""
        self.config = config
        self.task: Task = make_task(config.task.model_dump())
        self.store = RolloutStore(config.run_dir / "rollouts")
        self.settings = StageSettings(config, self.task)
        self._rehearsed = False
        """What can't work has been looked for: from now on a server that is away is waited for."""
        _check_range(config.value_model, self.task)

    def value_model_directory(self, iteration: int) -> Path:
        """Of the value model fitted in `iteration`; 0 is the initial one."""
        name = f"iteration-{iteration:03d}" if iteration else "initial"
        return self.config.run_dir / "value_models" / name

    def loop(self) -> list[Record]:
        """All stages of all iterations, evaluation and report; those already done are skipped. Returns the records.

        Collecting publishes the value model it rolls in with, so only the last one is left to publish. What won't do is
        found before hours of collecting; after that, the loop waits for a server that is restarted.
        """
        last = len(self.config.iterations)
        for iteration in range(1, last + 1):
            if self.store.has(iteration):
                self._claim_rollouts(iteration)
        asyncio.run(self._check_server())
        self.initialise()
        if not self.value_model_directory(1).exists():
            asyncio.run(self._rehearse_all())
        self._rehearsed = True
        for iteration in range(1, last + 1):
            self.collect(iteration)
            self.fit(iteration)
        self.publish(last)
        if self.config.evaluate is None:
            return []
        records = self.evaluate(last)
        self.report()
        return records

    def collect(self, iteration: int) -> None:
        """Makes the roll-outs of `iteration` that are missing, and grades what has no reward yet."""
        self._claim_rollouts(iteration)
        self.store.remove_unfinished()
        self._grade_stored(iteration)
        missing = missing_samples(self.task, iteration, self.store, self.config.collect_of(iteration))
        if missing:
            if self.value_model_directory(iteration).exists():  # Fitted on less: refused prompts are asked again.
                set_aside(self.config.run_dir, iteration, f"more roll-outs are collected in iteration {iteration}")
            asyncio.run(self._collect(iteration, missing))
        report_rewards(self.store, iteration)

    def retry_refused(self) -> None:
        """Prompts that the server refused are asked again."""
        RefusedPrompts(self.store.directory).forget()
        cells = sorted((self.config.run_dir / "evaluation").glob("*/*/refused.jsonl"))
        for file in cells:
            RefusedPrompts(file.parent).forget()
        if cells:  # Gains are over the reference's prompts: all cells are summed up anew from what is stored.
            for record in (self.config.run_dir / "evaluation").glob(f"*/*/{RECORD}"):
                record.unlink()

    def regrade(self, iteration: int | None) -> None:
        """Grades the stored completions of an iteration (None: of all, and of the evaluated reference) anew.

        Fits made from the old rewards, and what came of them, are moved aside.
        """
        numbers = [n for n in range(1, len(self.config.iterations) + 1) if iteration in (None, n) and self.store.has(n)]
        if not numbers:
            raise ValueError(f"there are no completions to grade in {self.store.directory}: collect first")
        stored = [self._train_completions(number) for number in numbers]
        stored += self._reference_completions() if iteration is None else []
        for each in stored:
            check_regradable(each)
        set_aside(self.config.run_dir, numbers[0], "the roll-outs are graded anew")
        for each in stored:
            (each.settings_file.parent / RECORD).unlink(missing_ok=True)
            regrade(self.task, each)

    def _train_completions(self, iteration: int) -> Stored:
        problems = self.task.problems("train", self.config.collect_of(iteration).prompts)
        file, settings = self._settings_file(iteration), self.settings.collect(iteration)
        return Stored(self.store, iteration, file, settings, problems, self._rules())

    def _reference_completions(self) -> list[Stored]:
        config = self.config.evaluate
        if config is None:
            return []
        problems, rules = self.task.problems("test", config.prompts), self._rules().for_evaluation()
        directory = self.config.run_dir / "evaluation"
        cells = {cell: directory / cell.place(0) for cell in grid(config, self.config.sampling)}
        return [
            Stored(store, 0, place / SETTINGS, self.settings.evaluate(config, cell, 0), problems, rules)
            for cell, place in cells.items()
            if cell.method is None and (store := RolloutStore(place)).has(0)
        ]

    def _settings_file(self, iteration: int) -> Path:
        return self.store.iteration_directory(iteration) / SETTINGS

    def _claim_rollouts(self, iteration: int) -> None:
        """Checks that what is stored was made with the same settings. A run may grow; fits of fewer are set aside."""
        file, settings = self._settings_file(iteration), self.settings.collect(iteration)
        begun = self.store.has(iteration)
        if begun and _has_grown(file, settings):
            set_aside(self.config.run_dir, iteration, f"more roll-outs are collected in iteration {iteration}")
            write_json(file, settings)
        claim(file, settings, begun)

    async def _rehearse_all(self) -> None:
        """With the initial value model: a server that can't load it says so now."""
        async with self._server() as client:
            await self._rehearse(client, 1, await self._publish(client, self.value_model_directory(0)))

    async def _rehearse(self, client: SteadyClient, iteration: int, value_model: str | None) -> None:
        """Finds out what would end the collecting of `iteration` later. value_model: guides the trial; None: none."""
        config, sampling = self.config.collect_of(iteration), sampling_of(self.config.sampling)
        problems = self.task.problems("train", config.prompts)
        check_framing(problems, sampling)
        await asyncio.to_thread(check_rewards, self.task, problems[0], self._rules())
        await check_lengths(client, problems, sampling, config.max_refused_share)
        strength = config.eta, config.guidance_top_k, config.method
        guidance = Guidance(value_model, *strength, tail=config.tail) if value_model is not None else None
        await check_request(client, problems, sampling, guidance)

    def _grade_stored(self, iteration: int) -> None:
        """Grades what a killed process had stored, and what couldn't be graded before."""
        problems = self.task.problems("train", self.config.collect_of(iteration).prompts)
        grader = Grader(self.task, self.store, {problem.id: problem for problem in problems}, self._rules())
        grader.grade_missing(iteration)
        grader.count_stored(iteration)
        grader.check_share(iteration)

    async def _collect(self, iteration: int, missing: Missing) -> None:
        config, sampling = self.config.collect_of(iteration), self.config.sampling
        rolls_in = self._fitted(iteration - 1) if iteration > 1 else None
        async with self._server() as client:
            value_model = await self._publish(client, rolls_in) if rolls_in is not None else None
            if not self._rehearsed:
                await self._rehearse(client, iteration, value_model)
            plan = plan_requests(missing, iteration, self.store, config, sampling, value_model)
            label = f"collect {iteration}"
            await generate(client, self.task, plan, self.store, self.config.server.concurrency, label, self._rules())

    def fit(self, iteration: int) -> None:
        """Fits the value model of `iteration` on the roll-outs of all iterations up to it, unless that is done."""
        for number in range(1, iteration + 1):
            self._claim_rollouts(number)
        directory = self.value_model_directory(iteration)
        if _made(directory, self.settings.fit(iteration)):
            return
        self._check_collected(iteration)
        from qtilt.checkpoint import remove_unfinished
        from qtilt_trainer.fit import COLUMNS, fit_value_model

        remove_unfinished(directory)
        self.initialise()
        read_compactly()
        rollouts = pa.concat_tables(self.store.table(number, COLUMNS) for number in range(1, iteration + 1))
        sampling = self.config.sampling.model_dump(mode="json")
        provenance = {"iteration": iteration, "task": self.task.name, "sampling": sampling}
        fit_value_model(self.value_model_directory(0), rollouts, directory, self.config.fit_of(iteration), provenance)

    def initialise(self) -> None:
        """Makes the value model that every fit starts from, unless it is there."""
        directory = self.value_model_directory(0)
        if _made(directory, self.settings.value_model()):
            return
        from qtilt.checkpoint import remove_unfinished
        from qtilt_trainer.initialise import initialise_value_model

        remove_unfinished(directory)
        config = self.config.value_model
        initialise_value_model(
            config.backbone,
            config.type,
            distribution_of(config),
            directory,
            config.head_std,
            layers=config.layers,
            low_rank=config.low_rank,
            adapter=config.adapter,
        )

    def publish(self, iteration: int) -> str:
        """NAME@VERSION under which the server has the value model of `iteration`; loads it if it hasn't."""
        return asyncio.run(self._publish_only(iteration))

    def evaluate(self, iteration: int) -> list[Record]:
        """Measures the value model of `iteration` over the grid; writes the results, then `config.json`."""
        from qtilt_trainer.result_table import markdown_table

        records = asyncio.run(self._evaluate(iteration))
        constant = self._measure_constant_answer()
        records = records if constant is None else [constant, *records]
        write_results(self.config.run_dir / RESULTS, records)
        write_text(self.config.run_dir / TABLE, markdown_table(records))
        write_json(self.config.run_dir / "config.json", redacted(self.config.model_dump(mode="json")))
        return records

    def report(self) -> None:
        """Writes the HTML page and the plots."""
        from qtilt_trainer.report import write_report

        write_report([self.config.run_dir], self.config.run_dir)

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[SteadyClient]:
        """A client of the server, which must serve the model that the stored roll-outs come from."""
        async with SteadyClient(self.config.server) as client:
            if self._rehearsed:
                await client.wait_until_healthy()
            serves, stored = await client.model(), self.store.models()
            if stored - {serves}:
                raise ValueError(
                    f"{self.store.directory} holds roll-outs of {', '.join(sorted(stored))}, and the server serves "
                    f"{serves}: serve the same model under the same name, or use another run_dir"
                )
            yield client

    async def _check_server(self) -> None:
        async with self._server() as client:
            path_on_server(self.value_model_directory(1), self.config.server.value_model_root, await client.status())

    def _check_collected(self, iteration: int) -> None:
        for number in range(1, iteration + 1):
            missing = missing_samples(self.task, number, self.store, self.config.collect_of(number))
            if missing:
                count = sum(len(samples) for _, samples in missing)
                raise ValueError(f"iteration {number} lacks {count} roll-outs: collect --iteration {number} first")
            ungraded = ungraded_count(self.store, number, self.config.reward.truncated)
            if ungraded:
                raise ValueError(
                    f"iteration {number} has {ungraded} completions that nobody has graded yet: collect --iteration "
                    f"{number} first"
                )

    async def _publish_only(self, iteration: int) -> str:
        directory = self._fitted(iteration)
        async with self._server() as client:
            return await self._publish(client, directory)

    def _fitted(self, iteration: int) -> Path:
        directory = self.value_model_directory(iteration)
        if not directory.exists():
            raise ValueError(f"there is no {directory}: fit iteration {iteration} first")
        _made(directory, self.settings.fit(iteration))
        return directory

    async def _publish(self, client: SteadyClient, directory: Path) -> str:
        record_file = self.config.run_dir / "published" / f"{directory.name}.json"
        name, root = self.config.value_model.name, self.config.server.value_model_root
        return await client.keep_published(lambda: publish(client, directory, name, root, record_file))

    async def _evaluate(self, iteration: int) -> list[Record]:
        config = self._evaluate_config()
        directory = self._fitted(iteration)
        async with self._server() as client:
            return await evaluate(
                client,
                self.task,
                self.config.run_dir / "evaluation",
                iteration,
                await self._publish(client, directory),
                config,
                self.config.sampling,
                self.config.server.concurrency,
                lambda cell: self.settings.evaluate(config, cell, iteration),
                self._rules(),
            )

    def _rules(self) -> Rules:
        reward, refused = self.config.reward, self.config.collect.max_refused_share
        is_binary = self.config.value_model.distribution == "bernoulli"
        return Rules(reward.truncated, reward.max_failed_share, refused, reward.timeout, is_binary)

    def _measure_constant_answer(self) -> Record | None:
        config, prompts = self._evaluate_config(), self.config.collect_of(1).prompts
        # Beside what else comes from the roll-outs of iteration 1: it is set aside with it.
        place = self.config.run_dir / "evaluation" / "iteration-001" / "constant"
        settings = self.settings.constant_answer(config)
        return measure_constant_answer(
            self.task, self.store, place, prompts, config, settings, self.config.reward.timeout
        )

    def _evaluate_config(self) -> EvaluateConfig:
        if self.config.evaluate is None:
            raise ValueError("the configuration has no [evaluate] table: add one")
        return self.config.evaluate


def _made(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the value model `directory` is there; if so it must have been made with `settings`."""
    made = directory.exists()
    claim(directory.with_name(f"{directory.name}.settings.json"), settings, begun=made)
    return made


def _has_grown(file: Path, settings: dict[str, Any]) -> bool:
    """Whether more prompts or samples are wanted than before, all else being equal. Raises ValueError for fewer."""
    differing = differences(file, settings)
    if not differing or not all(line.startswith("size") for line in differing):
        return False
    before, now = json.loads(file.read_text(encoding="utf-8"))["size"], settings["size"]
    for name, count in before.items():
        if now[name] < count:
            raise ValueError(
                f"{file}: collect.{name} was {count} and is {now[name]}: a run only grows; put it back, or use another "
                "run_dir"
            )
    return True


def distribution_of(config: ValueModelConfig) -> dict[str, Any]:
    """The distribution's own description, as value-model directories have it."""
    if config.distribution == "bernoulli":
        return {"name": "bernoulli"}
    return {"name": "categorical", "low": config.low, "high": config.high, "atoms": config.atoms}


def _check_range(config: ValueModelConfig, task: Task) -> None:
    if task.low < config.low or task.high > config.high:
        raise ValueError(
            f"task {task.name} gives rewards in [{task.low:g}, {task.high:g}], and value_model covers "
            f"[{config.low:g}, {config.high:g}]: set value_model.distribution = 'categorical' with that low and high"
        )
