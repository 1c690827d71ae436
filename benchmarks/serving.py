"""quick version"""

import argparse
import functools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from serving_speed.process import SystemProcess
from serving_speed.shapes import PAIRS
from serving_speed.systems import System, system
from serving_speed.workload import Outcome, random_prompts, together


def make_vllm(settings: dict[str, Any], plugin: bool) -> Any:
    from serving_speed.vllm_system import EngineSettings, VllmSystem

    return VllmSystem(EngineSettings(**settings), plugin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="mid")
    parser.add_argument("--systems", default="plain,unguided,q,v20")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from serving_speed.models import write_models

    pair = PAIRS[arguments.shape]
    systems: list[System] = [system(name) for name in arguments.systems.split(",")]
    length = arguments.prompt + arguments.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        files = write_models(Path(folder), pair, {"q", "v"}, length + 64, "float32", "cpu", dummy=False)
        processes = {}
        for one in systems:
            values = {one.type: files.values[one.type]} if one.type else dict(list(files.values.items())[:1])
            settings = {
                "reference": files.reference,
                "values": values,
                "dtype": "float32",
                "max_model_len": length,
                "max_num_seqs": arguments.concurrency,
                "kv_cache_bytes": 2 * arguments.concurrency * (length + 128) * pair.reference.kv_per_token * 4,
                "max_top_k": 64,
                "dummy_weights": False,
                "enforce_eager": arguments.enforce_eager,
                "prefix_caching": False,
                "gpu_memory_utilization": None,
            }
            process = SystemProcess(one.name, functools.partial(make_vllm, settings, one.engine == "guided"))
            process.wait_until_ready()
            processes[one.name] = process
            print(one.name, process.call("describe"), flush=True)
        try:
            outcomes: dict[str, list[Outcome]] = {one.name: [] for one in systems}
            for round in range(arguments.rounds + 1):
                prompts = random_prompts(arguments.concurrency, arguments.prompt, pair.reference.vocab, seed=round)
                workload = together(prompts, arguments.new_tokens)
                for one in systems:
                    outcome = processes[one.name].call("run", one, workload).check(workload)
                    if round:
                        outcomes[one.name].append(outcome)
            plain = outcomes["plain"]
            for name, mine in outcomes.items():
                ratios = sorted(a.seconds / b.seconds for a, b in zip(mine, plain, strict=True))
                cpu = sorted(a.cpu_seconds / b.cpu_seconds for a, b in zip(mine, plain, strict=True))
                gaps = [gap for outcome in mine for gap in outcome.inter_token_seconds]
                print(
                    f"{name:<10} {statistics.median(o.tokens / o.seconds for o in mine):8.1f} tokens/s  "
                    f"itl p50 {1e3 * statistics.median(gaps):6.2f} ms  "
                    f"ttft {1e3 * statistics.median(mine[0].first_token_seconds):7.1f} ms  "
                    f"time ratio {statistics.median(ratios):.3f} [{ratios[0]:.3f}-{ratios[-1]:.3f}]  "
                    f"cpu ratio {statistics.median(cpu):.3f} [{cpu[0]:.3f}-{cpu[-1]:.3f}]  "
                    f"cpu/wall {mine[0].cpu_seconds / mine[0].seconds:.2f}",
                    flush=True,
                )
        finally:
            for process in processes.values():
                process.stop()


if __name__ == "__main__":
    main()
