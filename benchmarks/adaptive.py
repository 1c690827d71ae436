"""What a tolerance saves on trained models: the toys' references and value models, the toys' prompts.

    python examples/toys/run.py                      # once: trains the value models, into runs/toys
    python benchmarks/adaptive.py --run runs/toys

Three systems answer the same test prompts, at most --concurrency at a time, sampled with the toys' temperature and
ended by the toys' end token: vLLM without the plugin; Q♯ with 20 candidates; the same with a tolerance. Each engine
has a process of its own with one thread, idle while the other runs; a round runs every system once, after one that
isn't counted. Printed are the candidates a guided step scores in the mean, and processor time a token next to plain
vLLM and to tolerance 0. With one thread that is the elapsed time of an idle machine, and hardly depends on what else
runs; it is of a token because answers sampled from different distributions differ in length. Ratios are taken within a
round: medians, and the lowest and highest round.

The toys' models are so small that what a forward costs hardly depends on its tokens. --shape mid pads them with zeros
to the sizes of serving.py's pair: they sample the same, and cost as much as models of that size.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving_speed.process import SystemProcess
from serving_speed.shapes import PAIRS
from serving_speed.systems import DEFAULT_TOP_K, System, system
from serving_speed.workload import Outcome, Request, Workload

REFERENCES = Path(__file__).resolve().parents[1] / "examples" / "toys" / "references"
MAX_LENGTH = 256
"""Tokens of a prompt and its answer; the toys' are shorter."""
KV_CACHE_BYTES = 2**30
PLAIN = system("plain")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/toys"), help="of the toys, default: %(default)s")
    parser.add_argument("--shape", choices=PAIRS, help="pad the models to these sizes")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--eta", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def make_answering(settings: dict[str, Any], plugin: bool, temperature: float, eta: float) -> Any:
    """In the process of the system."""
    from serving_speed.answering import Answering
    from serving_speed.vllm_system import EngineSettings

    return Answering(EngineSettings(**settings), plugin, temperature, eta)


def model_files(task: Path, shape: str | None, folder: Path) -> tuple[Path, Path]:
    """Reference and value model, the run's latest; padded ones are written to ``folder``."""
    reference = REFERENCES / task.name
    value = max(path.parent for path in task.glob("value_models/*/value_model.json"))
    if shape is None:
        return reference, value
    from serving_speed.widening import widen_reference, widen_value_model

    widen_reference(reference, folder / "reference", PAIRS[shape].reference)
    widen_value_model(value, folder / "value", reference, PAIRS[shape].value)
    return folder / "reference", folder / "value"


def engine_settings(reference: Path, value: Path, concurrency: int) -> dict[str, Any]:
    """For :class:`serving_speed.vllm_system.EngineSettings`."""
    return {
        "reference": reference,
        "values": {"v": value},
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": concurrency,
        "kv_cache_bytes": KV_CACHE_BYTES,
        "max_top_k": DEFAULT_TOP_K,
        "dummy_weights": False,
        "enforce_eager": True,
        "prefix_caching": False,
        "gpu_memory_utilization": None,
    }


def prompts_of(config: dict[str, Any], reference: Path, count: int) -> list[list[int]]:
    """Token ids, as vLLM makes them of a text or of chat messages."""
    from transformers import AutoTokenizer

    from qtilt_trainer.tasks import make_task

    tokenizer = AutoTokenizer.from_pretrained(reference)
    texts = []
    for problem in make_task(config["task"]).problems("test", count):
        is_text = isinstance(problem.prompt, str)
        texts.append(
            problem.prompt
            if is_text
            else tokenizer.apply_chat_template(problem.prompt, tokenize=False, add_generation_prompt=True)
        )
    return [list(ids) for ids in tokenizer(texts)["input_ids"]]


def measure(task: Path, arguments: argparse.Namespace, folder: Path) -> str:
    """A table of one task."""
    config = json.loads((task / "config.json").read_text())
    settings = engine_settings(*model_files(task, arguments.shape, folder), arguments.concurrency)
    prompts = prompts_of(config, settings["reference"], arguments.prompts)
    work = Workload([Request(ids) for ids in prompts], config["sampling"]["max_tokens"], arguments.concurrency)
    guided = [System(f"tolerance {one:g}", "guided", "v", DEFAULT_TOP_K, one) for one in (0.0, *arguments.tolerance)]
    make = functools.partial(make_answering, settings, temperature=config["sampling"]["temperature"], eta=arguments.eta)
    processes: dict[str, SystemProcess] = {}
    outcomes: dict[str, list[Outcome]] = {one.name: [] for one in (PLAIN, *guided)}
    try:
        for engine in ("vllm", "guided"):
            processes[engine] = SystemProcess(engine, functools.partial(make, plugin=engine == "guided"))
            processes[engine].wait_until_ready()
        for number in range(-1, arguments.rounds):
            for one in (PLAIN, *guided):
                outcome = processes[one.engine].call("answer", one, work, number)
                if number >= 0:
                    outcomes[one.name].append(outcome)
        candidates = processes["guided"].call("mean_candidates")
    finally:
        for process in processes.values():
            process.stop()
    return table(task.name, outcomes, candidates, guided[0].name)


def table(task: str, outcomes: dict[str, list[Outcome]], candidates: dict[str, float], full: str) -> str:
    """One line a system."""
    cost = {name: [one.cpu_seconds / one.tokens for one in rounds] for name, rounds in outcomes.items()}
    lines = [f"{task:<18}{'candidates':>12}{'µs/token':>10}{'time / plain':>22}{'time / tolerance 0':>22}"]
    for name, costs in cost.items():
        count = f"{candidates[name]:.2f}" if name in candidates else ""
        to_plain, to_full = (spread(costs, cost[other]) for other in (PLAIN.name, full))
        lines.append(f"{name:<18}{count:>12}{1e6 * statistics.median(costs):>10.0f}{to_plain:>22}{to_full:>22}")
    return "\n".join(lines)


def spread(costs: list[float], others: list[float]) -> str:
    """Median, lowest and highest of the rounds' ratios."""
    ratios = [mine / other for mine, other in zip(costs, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> None:
    arguments = parse_arguments()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    tasks = [path.parent for path in sorted(arguments.run.glob("*/config.json"))]
    if not tasks:
        sys.exit(f"{arguments.run} has no finished task of the toys: run examples/toys/run.py first")
    for task in tasks:
        with tempfile.TemporaryDirectory(prefix="qtilt-adaptive-") as folder:
            print(measure(task, arguments, Path(folder)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
