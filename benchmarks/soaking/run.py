"""One soak from the models to the verdict."""

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import httpx
from transformers.utils.logging import disable_progress_bar

from real_server.models import graded, make_reference, make_value_model
from real_server.process import RunningServer, running_server
from real_server.state import worker_state
from soaking.asks import DEFAULTS, MAX_MODEL_LEN, MAX_TOP_K, Asker
from soaking.exactness import make_checker
from soaking.findings import Findings
from soaking.idle_server import check_answers, check_idle, engine_left_overs, metric
from soaking.load import ANSWER_LIMIT_S, Load
from soaking.memory import MemorySeries, processes
from soaking.versions import Published, Versions

VERSIONS_PER_NAME = 3
BLOCK_TOKENS = 32
BLOCKS_PER_SEQUENCE = 1.6
"""Sequences have about 3 blocks: they preempt each other."""
SWAP_TIMEOUT_S = 8
MEMORY_WINDOW_S = 15.0
SHORTEST_SERIES_S = 20.0
"""A window of a sixth of it holds a sample at least."""
PROGRESS_EVERY_S = 30.0
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # vLLM's development routes include the calls into the worker that show whether anything leaks there.
    "VLLM_SERVER_DEV_MODE": "1",
    # The compiled matrix products that oneDNN and torch keep, 0.7 MiB each, would be minutes of growth that hides a
    # leak. With fewer, the caches are full before the warm-up ends.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
END_LIMIT_S = 20.0


def sequences(clients: int) -> int:
    """Most of one batch: fewer than clients."""
    return max(clients * 3 // 8, 4)


def blocks(clients: int) -> int:
    """One sequence of full length fits, and vLLM keeps one block for itself."""
    return max(round(BLOCKS_PER_SEQUENCE * sequences(clients)), MAX_MODEL_LEN // BLOCK_TOKENS + 2)


def server_flags(arguments: argparse.Namespace, directories: dict[str, list[Path]]) -> list[str]:
    slots = sequences(arguments.clients)
    return [
        *(f"--value-model={name}={own[0]}" for name, own in directories.items()),
        f"--guidance-eta={DEFAULTS['eta']}",
        f"--guidance-top-k={DEFAULTS['top_k']}",
        f"--guidance-max-top-k={MAX_TOP_K}",
        f"--guidance-kv-fraction={arguments.kv_fraction}",
        f"--swap-timeout={SWAP_TIMEOUT_S}",
        f"--max-num-seqs={slots}",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--max-num-batched-tokens={2 * BLOCK_TOKENS + slots}",
        f"--block-size={BLOCK_TOKENS}",
        f"--num-gpu-blocks-override={blocks(arguments.clients)}",
        "--enable-prefix-caching",
        "--logprobs-mode=processed_logprobs",
        "--max-logprobs=-1",
    ]


def write_models(directory: Path) -> dict[str, list[Path]]:
    """The reference, and what will be published: a V-type and a Q-type value model, some versions of each."""
    disable_progress_bar()
    make_reference(directory / "reference")
    root = directory / "published"
    root.mkdir()
    seeds = range(1, VERSIONS_PER_NAME + 1)
    return {
        "value": [make_value_model(root / f"value-{seed}", seed) for seed in seeds],
        "graded": [make_value_model(root / f"graded-{seed}", seed, "q", graded()) for seed in seeds],
    }


async def under_load(
    arguments: argparse.Namespace,
    server: RunningServer,
    directories: dict[str, list[Path]],
    published: Published,
    findings: Findings,
    memory: MemorySeries,
) -> None:
    """Until the time is up, or too much is wrong; then until every client has its last answer."""
    # A connection per request: when a request is cancelled, httpcore closes kept ones that have just expired, those
    # included that it has already given to another request.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    stop = asyncio.Event()
    with make_checker() as checker:
        try:
            async with httpx.AsyncClient(base_url=server.origin, timeout=ANSWER_LIMIT_S, limits=limits) as http:
                reference = Path(server.model)
                load = Load(http, published, findings, checker, reference, directories, arguments.checked, stop)
                async with asyncio.TaskGroup() as group:
                    for number in range(arguments.clients):
                        rng = random.Random(f"{arguments.seed}-{number}")
                        group.create_task(load.client(Asker(rng, server.model, published)))
                    group.create_task(load.publisher(random.Random(arguments.seed)))
                    group.create_task(memory.watch(stop))
                    group.create_task(_end(load, arguments.minutes * 60))
        except BaseException:
            checker.shutdown(wait=False, cancel_futures=True)
            raise


async def _end(load: Load, seconds: float) -> None:
    """Say how it goes, and stop the load when its time is up."""
    started = time.monotonic()
    said = started
    while load.goes_on and time.monotonic() - started < seconds:
        await asyncio.sleep(min(1.0, seconds))
        if time.monotonic() - said >= PROGRESS_EVERY_S:
            said = time.monotonic()
            counts, problems = load.findings.counts, len(load.findings.problems)
            print(
                f"{said - started:.0f} s: {counts['answered']} answered, {counts['swaps']} swaps, {problems} problems",
                file=sys.stderr,
                flush=True,
            )
    load.stop.set()


def check_what_happened(arguments: argparse.Namespace, server: RunningServer, findings: Findings) -> None:
    """A load under which nothing happens shows nothing."""
    dropped = max(version["dropped"] for version in worker_state(server)["value_models"])
    counts = findings.counts
    counts["preemptions"] = int(metric(server, "vllm:num_preemptions_total"))
    counts["prompt tokens from the prefix cache"] = int(metric(server, "vllm:prefix_cache_hits_total"))
    counts["histories dropped from value caches"] = dropped
    happened = ["answered", "swaps", "preemptions", "prompt tokens from the prefix cache", "malformed, refused"]
    happened += ["left before the answer", "left during a stream", "reset the connection"]
    if arguments.kv_fraction < 1:
        happened.append("histories dropped from value caches")
    for what in happened:
        findings.expect(counts[what] > 0, f"the load was to bring about, and didn't: {what}")
    findings.expect(bool(findings.differences), "no answer was compared with the oracle")


def check_memory(arguments: argparse.Namespace, memory: MemorySeries, findings: Findings) -> None:
    """From the end of the warm-up (a minute, or a third of a shorter load) to the end of the load."""
    duration = memory.seconds[-1]
    if duration < SHORTEST_SERIES_S:
        findings.problem(f"the load ended after {duration:.0f} s: too early to say whether memory grows")
        return
    warm_up = min(60.0, duration / 3)
    window = min(MEMORY_WINDOW_S, duration / 6)
    first, last = memory.ends(warm_up, window)
    findings.facts["resident_mib"] = {"after_warm_up": round(first, 1), "at_end": round(last, 1)}
    findings.facts["resident_mib_by_process"] = {
        name: f"{memory.samples[0].get(name, 0.0):.0f} -> {mib:.0f}" for name, mib in memory.samples[-1].items()
    }
    findings.facts["memory_series"] = [
        {"second": round(second, 1), **{name: round(mib, 1) for name, mib in sample.items()}}
        for second, sample in zip(memory.seconds, memory.samples, strict=True)
    ]
    findings.expect(
        last - first <= arguments.most_growth,
        f"resident memory grew by {last - first:.0f} MiB, allowed are {arguments.most_growth:g}",
    )


def soak(arguments: argparse.Namespace, folder: Path, findings: Findings) -> None:
    """Write models, start the server, load it, and look at what is left."""
    directories = write_models(folder)
    published = Published({name: Versions(name) for name in directories})
    for name, own in directories.items():
        published[name].started_with(own[0])
    log = folder / "server.log"
    flags = server_flags(arguments, directories)
    session = None
    try:
        with running_server(folder / "reference", folder / "published", log, *flags, environment=ENVIRONMENT) as server:
            session = server.session
            print(f"the server is ready (session {session})", file=sys.stderr, flush=True)
            memory = MemorySeries(server.session)
            asyncio.run(under_load(arguments, server, directories, published, findings, memory))
            check_memory(arguments, memory, findings)
            check_what_happened(arguments, server, findings)
            check_idle(server, sequences(arguments.clients), findings)
            asker = Asker(random.Random(arguments.seed), server.model, published)
            check_answers(server, asker, folder / "reference", findings)
            for left in engine_left_overs(server):
                findings.problem(f"after the load: {left}")
    finally:
        if arguments.out is not None and log.exists():
            shutil.copy(log, arguments.out / "server.log")
        if session is not None:
            _end_processes(session, findings)


def _end_processes(session: int, findings: Findings) -> None:
    """The server has been stopped: what it started ends too, shortly after; what doesn't is ended."""
    deadline = time.monotonic() + END_LIMIT_S
    while (left := processes(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        findings.problem(f"processes outlived the server by {END_LIMIT_S:g} s: {left}")
        os.killpg(session, signal.SIGKILL)
