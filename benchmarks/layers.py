"""What a value model of the reference's first layers costs and gives, by how many they are.

    python benchmarks/layers.py --url URL --root ROOT --config CONFIG --run-dir RUN_DIR --layers 2 6 12 --out FILE

Fits one value model for each number of layers to the roll-outs of iteration 1 in RUN_DIR, all with the settings of
CONFIG, publishes them into a running `qtilt-server --value-model-root ROOT`, and measures Q♯ at one 1/η, sampled and
greedy. FILE gets the rows as JSON. Nothing else may run meanwhile: seconds are compared.
"""

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtilt_trainer.client import GuidedClient
from qtilt_trainer.config import EvaluateConfig, LoopConfig, ServerConfig, read_config
from qtilt_trainer.evaluate import Record, evaluate
from qtilt_trainer.fit import COLUMNS, fit_value_model
from qtilt_trainer.initialise import initialise_value_model
from qtilt_trainer.loop import distribution_of
from qtilt_trainer.rewards import Rules
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.tasks import make_task

SIZE_FILES = "*.safetensors"


@dataclass(frozen=True)
class Row:
    """One number of layers; 0: the reference, unguided."""

    layers: int
    fit_seconds: float
    megabytes: float
    held_out_loss: float | None
    auc: float | None
    sampled: tuple[float, float, float]
    """Accuracy and its 95 % interval."""
    greedy: tuple[float, float, float]
    kl_candidates: float | None
    """Nats a sampled response."""
    tokens_per_second: float
    """Of sampling and greedy decoding together."""


def main() -> None:
    """Fits, publishes and measures one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--root", type=Path, required=True, help="the server's; a folder is made in it")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True, help="where its roll-outs are")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6, 12])
    parser.add_argument("--inv-eta", type=float, default=10.0)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = read_config(options.config, {"server.url": options.url})
    assert config.evaluate is not None, "the configuration has an [evaluate] table"
    wanted = {"prompts": options.prompts, "inv_eta": (options.inv_eta,)}
    grid = config.evaluate.model_copy(update=wanted)
    work = (options.root / "layers").resolve()
    fits = {layers: fit(config, options.run_dir, work, layers) for layers in options.layers}
    rows = asyncio.run(measure(config, grid, work, fits))
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def fit(config: LoopConfig, run_dir: Path, work: Path, layers: int) -> tuple[float, Any]:
    """Seconds, and the last point of the fit."""
    initial, value_model = work / f"initial-{layers}", config.value_model
    distribution = distribution_of(value_model)
    initialise_value_model(
        value_model.backbone, value_model.type, distribution, initial, layers=layers, low_rank=value_model.low_rank
    )
    rollouts = RolloutStore(run_dir / "rollouts").table(1, COLUMNS)
    began = time.monotonic()
    result = fit_value_model(initial, rollouts, work / f"fitted-{layers}", config.fit)
    return time.monotonic() - began, result.history[-1]


async def measure(
    config: LoopConfig, grid: EvaluateConfig, work: Path, fits: dict[int, tuple[float, Any]]
) -> list[Row]:
    """The reference's row and one for each fit."""
    task, rules = make_task(config.task.model_dump()), Rules(config.reward.truncated)

    async def cells(number: int, version: str, methods: tuple[str, ...]) -> tuple[float, list[Record]]:
        wanted, began = grid.model_copy(update={"methods": methods}), time.monotonic()
        place, concurrency = work / "evaluation", config.server.concurrency
        records = await evaluate(
            client, task, place, number, version, wanted, config.sampling, concurrency, lambda cell: {}, rules
        )
        records = [record for record in records if (record.method == "reference") != bool(methods)]
        tokens = sum(record.tokens * record.n for record in records if record.tokens is not None)
        return tokens / (time.monotonic() - began), records

    async with GuidedClient(ServerConfig(url=config.server.url)) as client:
        speed, records = await cells(0, "", ())
        rows = [row(0, 0.0, 0.0, None, speed, records)]
        for layers, (seconds, point) in fits.items():
            directory = work / f"fitted-{layers}"
            loaded = await client.publish(f"layers-{layers}", f"{work.name}/{directory.name}")
            speed, records = await cells(layers, f"{loaded.name}@{loaded.version}", ("qsharp",))
            size = sum(file.stat().st_size for file in directory.glob(SIZE_FILES)) / 1e6
            rows.append(row(layers, seconds, size, point, speed, records))
            print(rows[-1], flush=True)
    return rows


def row(layers: int, seconds: float, size: float, point: Any, speed: float, records: list[Record]) -> Row:
    """The figures of one number of layers, in the regime that guidance is compared in."""
    sampled = next(record for record in records if record.temperature and record.top_k)
    greedy = next(record for record in records if record.temperature == 0)
    return Row(
        layers,
        seconds,
        size,
        point and point.held_out_loss,
        point and point.auc,
        (sampled.accuracy, sampled.low, sampled.high),
        (greedy.accuracy, greedy.low, greedy.high),
        sampled.kl_candidates,
        speed,
    )


if __name__ == "__main__":
    main()
