"""How fast guided decoding is next to plain vLLM and next to guided decoding on Hugging Face `generate`.

    python benchmarks/serving.py                                    # CPU, the mid-size pair, concurrency 32
    python benchmarks/serving.py --concurrency 1,8,32,64 --prompt 32,512 --systems plain,unguided,q,v20,v5,hf-q,hf-v20
    python benchmarks/serving.py --arrivals staggered --systems plain,q,v20,hf-q,hf-v20
    python benchmarks/serving.py --device cuda --shape llama-3.1-8b+1b --dummy-weights --concurrency 1,16,64,256

Models have random weights and are made on the spot. Systems: `plain` is vLLM without the plugin, `unguided` vLLM with
the plugin and requests without guidance, `q` and `v20` guided requests (Q-type with 20 candidates, V-type with 20),
`hf-q`, `hf-v20` and `hf-plain` the baselines of serving_speed/hf_system.py. What a candidate_mass saves is a matter of
trained models: candidate_mass.py.

Each system runs in a process of its own, idle while another runs, with --threads threads for everything. A round runs
every system once on the same prompts, after a short one that isn't counted. A ratio to plain is taken within a round.
Everything is sampled at temperature 1, nothing ends early, vLLM's prefix cache is off unless asked for, and its own
compilation is on as by default unless --enforce-eager. Guided requests keep KL records and have them read, as the
server does.

--arrivals together: as many requests as the concurrency, all at once. --arrivals staggered: --requests of them, a
Poisson process whose rate would keep plain vLLM just busy at --load 1 (serving_speed/workload.py); every system gets
the same arrival times, in seconds. Time is then from the first arrival to the last token.

The bounds of the ratio are derived in serving_speed/bounds.py: with W parameters in the layers of a model, S tokens
run and N sampled, guidance adds 2·W·S FLOPs (Q-type) or 2·W·(S + k·N) (V-type: k + 1 rows a sequence and step) to the
reference's 2·W·S + 2·V·H·N, attention besides; and one read of its weights and caches a step.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving_speed.bounds import Run, ratio_bounds
from serving_speed.comparison import make_row
from serving_speed.process import SystemProcess
from serving_speed.report import LEGEND, Cell, Setting, draw, provenance, table, write_json
from serving_speed.shapes import PAIRS, Pair
from serving_speed.systems import System, system
from serving_speed.workload import Outcome, Workload, random_prompts, staggered, together

if TYPE_CHECKING:
    # Not before the environment is set: torch reads it.
    from serving_speed.models import ModelFiles

PLAIN = system("plain")
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 128
WARM_UP_TOKENS = 8


def integers(text: str) -> list[int]:
    """``1,8,32``."""
    return [int(part) for part in text.split(",")]


def systems(text: str) -> list[System]:
    """``plain,q,v20``; plain is always there, and first."""
    named = [system(name) for name in text.split(",")]
    return [PLAIN, *(one for one in named if one != PLAIN)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=PAIRS, default="mid")
    parser.add_argument("--dummy-weights", action="store_true", help="the reference is never written, loaders draw it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=NUMBER_BYTES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", type=systems, default=systems("plain,unguided,q,v20"))
    parser.add_argument("--concurrency", type=integers, default=[32])
    parser.add_argument("--prompt", type=integers, default=[32], help="tokens in a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arrivals", choices=["together", "staggered"], default="together")
    parser.add_argument("--requests", type=int, help="of a staggered run; default 4 × concurrency")
    parser.add_argument("--load", type=float, default=1.0, help="of a staggered run, 1 keeps plain vLLM just busy")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="vLLM without compilation: starts sooner, is slower"
    )
    parser.add_argument("--compilation", type=json.loads, default={}, help="vLLM's compilation_config, as JSON")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--one-guided-engine", action="store_true", help="one process for all systems with the plugin")
    parser.add_argument("--gpu-memory-utilization", type=float, help="of each vLLM; default 0.9 / processes")
    parser.add_argument("--models", type=Path, help="where to write the models; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="folder for serving.json and serving.png")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1:
        parser.error(f"--rounds is {parsed.rounds}, expected at least 1")
    parsed.dtype = parsed.dtype or ("float32" if parsed.device == "cpu" else "bfloat16")
    return parsed


def set_environment(arguments: argparse.Namespace) -> None:
    """For this process and those it starts; before torch is imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(arguments.threads),
        "MKL_NUM_THREADS": str(arguments.threads),
        # On CPUs vLLM runs in the process it is started in: nothing then binds threads to cores or sets their number
        # again. On GPUs in one of its own, as it is served: what the host does with requests overlaps with the steps.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if arguments.device == "cpu" else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def make_vllm(settings: dict[str, Any], plugin: bool) -> Any:
    """In the process of the system."""
    from serving_speed.vllm_system import EngineSettings, VllmSystem

    return VllmSystem(EngineSettings(**settings), plugin)


def make_hf(settings: dict[str, Any]) -> Any:
    """In the process of the system."""
    from serving_speed.hf_system import HfSettings, HfSystem

    return HfSystem(HfSettings(**settings))


def make_products(pair: Pair, dtype: str, device: str) -> Any:
    """In a process of its own."""
    from serving_speed.matrix_products import MatrixProducts

    return MatrixProducts(pair, dtype, device)


def longest(arguments: argparse.Namespace) -> int:
    """Tokens of a whole sequence."""
    return max(arguments.prompt) + max(arguments.new_tokens, WARM_UP_TOKENS)


def engine_settings(
    arguments: argparse.Namespace, files: "ModelFiles", types: set[str], processes: int
) -> dict[str, Any]:
    """Of one vLLM, for :class:`serving_speed.vllm_system.EngineSettings`."""
    pair, most = PAIRS[arguments.shape], max(arguments.concurrency)
    blocks = most * (longest(arguments) // BLOCK + 2)
    share = arguments.gpu_memory_utilization or 0.9 / processes
    return {
        "reference": files.reference,
        "values": {type: path for type, path in files.values.items() if type in types},
        "dtype": arguments.dtype,
        "max_model_len": longest(arguments),
        "max_num_seqs": most,
        "kv_cache_bytes": blocks * BLOCK * pair.reference.kv_per_token * NUMBER_BYTES[arguments.dtype],
        "max_top_k": max(one.top_k for one in arguments.systems),
        "dummy_weights": arguments.dummy_weights,
        "enforce_eager": arguments.enforce_eager,
        "compilation": arguments.compilation,
        "prefix_caching": arguments.prefix_caching,
        "gpu_memory_utilization": None if arguments.device == "cpu" else share,
    }


def start(name: str, make: Callable[[], Any], running: contextlib.ExitStack) -> SystemProcess:
    """Whatever fails later, ``running`` stops it: a process that nobody stops is waited for at the end, for ever."""
    process = SystemProcess(name, make)
    running.callback(process.stop)
    process.wait_until_ready()
    return process


def start_systems(
    arguments: argparse.Namespace, files: "ModelFiles", running: contextlib.ExitStack
) -> dict[str, SystemProcess]:
    """By system name; systems that share an engine have the same process. ``running`` stops them."""
    guided = [one for one in arguments.systems if one.engine == "guided"]
    # `unguided` has a value model resident as well: one that is asked for, else Q-type.
    all_types = {one.type for one in guided if one.type} or {"q"}
    shared = arguments.one_guided_engine
    count = len(arguments.systems) - (len(guided) - 1 if shared and guided else 0)
    processes: dict[str, SystemProcess] = {}
    for one in arguments.systems:
        if one.engine == "hf":
            value = files.values[one.type] if one.type else None
            settings = {"reference": files.reference, "value": value, "dtype": arguments.dtype}
            settings |= {"device": arguments.device, "dummy_weights": arguments.dummy_weights}
            make = functools.partial(make_hf, settings)
        elif shared and one in guided and one != guided[0]:
            processes[one.name] = processes[guided[0].name]
            continue
        else:
            types = all_types if shared else {one.type or min(all_types)}
            make = functools.partial(
                make_vllm, engine_settings(arguments, files, types, count), plugin=one.engine == "guided"
            )
        started = time.perf_counter()
        processes[one.name] = start(one.name, make, running)
        print(f"{one.name} is ready after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return processes


def workload(arguments: argparse.Namespace, setting: Setting, seed: int, step_seconds: float) -> Workload:
    """The same for every system, another in every round."""
    vocab = PAIRS[arguments.shape].reference.vocab
    prompts = random_prompts(setting.requests, setting.prompt, vocab, seed=seed)
    if setting.arrivals == "together":
        return together(prompts, setting.new_tokens)
    return staggered(prompts, setting.new_tokens, setting.concurrency, step_seconds, arguments.load, seed=seed)


def plain_step_seconds(arguments: argparse.Namespace, setting: Setting, plain: SystemProcess) -> float:
    """One step of plain vLLM at full concurrency: the unit of staggered arrivals."""
    full = dataclasses.replace(setting, arrivals="together", requests=setting.concurrency)
    outcome: Outcome = plain.call("run", PLAIN, workload(arguments, full, -1, 0.0))
    return statistics.median(outcome.inter_token_seconds)


def products_seconds(process: SystemProcess, setting: Setting, one: System) -> float:
    """The value model's matrix products over the whole run: one prefill and the steps after it."""
    sequences, candidates = setting.concurrency, one.top_k if one.type == "v" else 0
    first = process.call("seconds", sequences * (setting.prompt + candidates), sequences)
    later = process.call("seconds", sequences * (1 + candidates), sequences)
    return float(first + (setting.new_tokens - 1) * later)


def warm_up(arguments: argparse.Namespace, setting: Setting, processes: dict[str, SystemProcess]) -> None:
    short = dataclasses.replace(setting, arrivals="together", requests=setting.concurrency, new_tokens=WARM_UP_TOKENS)
    for one in arguments.systems:
        processes[one.name].call("run", one, workload(arguments, short, -2, 0.0))


def measure(
    arguments: argparse.Namespace, setting: Setting, processes: dict[str, SystemProcess], products: SystemProcess
) -> Cell:
    """Rounds of every system in turn, after a short one that compiles what is compiled late and isn't counted."""
    warm_up(arguments, setting, processes)
    step_seconds = (
        plain_step_seconds(arguments, setting, processes["plain"]) if setting.arrivals == "staggered" else 0.0
    )
    outcomes: dict[str, list[Outcome]] = {one.name: [] for one in arguments.systems}
    floors: dict[str, list[float]] = {one.name: [] for one in arguments.systems if one.type is not None}
    for number in range(arguments.rounds):
        work = workload(arguments, setting, number, step_seconds)
        for one in arguments.systems:
            outcomes[one.name].append(processes[one.name].call("run", one, work).check(work))
            if one.name in floors and setting.arrivals == "together":
                floors[one.name].append(products_seconds(products, setting, one))
    pair = PAIRS[arguments.shape]
    run = Run(setting.concurrency, setting.prompt, setting.new_tokens, NUMBER_BYTES[arguments.dtype])
    rows = []
    for one in arguments.systems:
        # Of staggered requests nobody knows beforehand which share a step.
        bounds = ratio_bounds(pair, one.type, one.top_k, run) if setting.arrivals == "together" else None
        floor = statistics.median(floors[one.name]) if floors.get(one.name) else None
        rows.append(make_row(one.name, outcomes[one.name], outcomes["plain"], bounds, floor))
    return Cell(setting, outcomes, rows, floors)


def grid(arguments: argparse.Namespace) -> list[Setting]:
    settings = []
    for prompt in arguments.prompt:
        for concurrency in arguments.concurrency:
            requests = concurrency
            if arguments.arrivals == "staggered":
                requests = arguments.requests or 4 * concurrency
            settings.append(Setting(concurrency, prompt, arguments.new_tokens, requests, arguments.arrivals))
    return settings


def run(arguments: argparse.Namespace, folder: Path) -> list[Cell]:
    """Make the models, start the systems, measure, and report."""
    import qtilt
    from serving_speed.models import write_models

    pair = PAIRS[arguments.shape]
    types = {one.type for one in arguments.systems if one.type} or {"q"}
    positions = longest(arguments) + 1  # the last candidates come after the last token but one
    files = write_models(
        folder, pair, types, positions, arguments.dtype, arguments.device, dummy=arguments.dummy_weights
    )
    with contextlib.ExitStack() as running:
        make = functools.partial(make_products, pair, arguments.dtype, arguments.device)
        products = start("products", make, running)
        processes = start_systems(arguments, files, running)
        engines = {name: process.call("describe") for name, process in processes.items()}
        cells = []
        for setting in grid(arguments):
            cells.append(measure(arguments, setting, processes, products))
            print(f"\n{table(cells[-1])}", flush=True)
            report(arguments, engines, cells, Path(qtilt.__file__).parent)
    print(f"\n{LEGEND}")
    return cells


def report(arguments: argparse.Namespace, engines: dict[str, Any], cells: Sequence[Cell], package: Path) -> None:
    """After every setting, so that a run that is broken off leaves what it has."""
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = provenance(package) | {"arguments": vars(arguments), "pair": dataclasses.asdict(PAIRS[arguments.shape])}
    write_json(arguments.out / "serving.json", settings, engines, cells)
    title = (
        f"{arguments.shape}, {arguments.dtype}, {arguments.threads} thread(s), {arguments.device}, {arguments.arrivals}"
    )
    draw(arguments.out / "serving.png", cells, title)


def main() -> None:
    arguments = parse_arguments()
    set_environment(arguments)
    if arguments.models is not None:
        run(arguments, arguments.models)
        return
    with tempfile.TemporaryDirectory(prefix="qtilt-serving-") as folder:
        run(arguments, Path(folder))


if __name__ == "__main__":
    main()
