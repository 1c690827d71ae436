"""Where a guided decoding step goes on a CPU: vLLM's own work, and guidance by kind of operation.

    python benchmarks/profile_step.py --type v --rows 32 --length 128 --top-k 20

The real vLLM runs guided requests of the mid-size pair with prompts of lengths spread around --length. Decoding steps
are first timed as they are, then run under torch.profiler, whose own cost falls mostly on Python and on small
operations: shares are those of the profiled steps, both times are printed.

The ranges are `GuidedBatch.guide`, in it the backbone's forwards, and the modules of transformers or torch that are
called. Everything else is told apart by the operators' names, the shapes they get and the range they are in.
"""

import argparse
import functools
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving_speed.shapes import PAIRS
from serving_speed.systems import system
from serving_speed.workload import random_prompts

if TYPE_CHECKING:
    from serving_speed.vllm_system import VllmSystem

STEP, GUIDE, BACKBONE = "step of vLLM", "guide", "backbone"
VLLM = "vLLM's own step"
PYTHON = "Python, packing, dispatch"
TILT = "top-k, tilt, offsets, KL"
SMALL = "small operations (norms, rotation, activation)"

# By the operator's name, first match. Products and attention are what they are wherever they occur.
ATTENTION = re.compile(r"attention")
PRODUCT = re.compile(
    r"::_?(linear|mm|addmm|bmm|baddbmm|matmul|einsum|_linear_pointwise|_mkl_linear|.*gemm.*|onednn_mm|candidate_logits)"
)
COPY = re.compile(
    r"::(index|_index_put|gather|scatter|copy_|clone|cat|stack|contiguous|_to_copy|to$|repeat|expand_as|embedding|pad|"
    r"constant_pad|tensor|masked_scatter|narrow_copy|fill_|zero_|zeros|empty|select_copy)"
)


@dataclass(frozen=True)
class Share:
    """Of one kind of operation: milliseconds and calls per step."""

    kind: str
    milliseconds: float
    calls: float


@dataclass(frozen=True)
class Operator:
    """ranges: the names of the profile's ranges it is in, innermost first. shapes: of its inputs."""

    name: str
    ranges: list[str]
    shapes: list[Any]


def kind_of(operator: Operator, vocab: int) -> str:
    """What an operator is for."""
    if GUIDE not in operator.ranges:
        return VLLM
    inside = operator.ranges[: operator.ranges.index(GUIDE)]
    in_backbone = BACKBONE in inside
    if ATTENTION.search(operator.name):
        return "attention"
    if any(isinstance(shape, list) and len(shape) >= 2 and shape[-1] == vocab for shape in operator.shapes):
        return TILT
    if PRODUCT.search(operator.name):
        return "GEMM of the backbone" if in_backbone else "head"
    if any(one.startswith("module: ") and "Embedding" in one for one in inside):
        return "embedding and rotation tables"
    if COPY.search(operator.name):
        return "gather, scatter, copies"
    return SMALL if in_backbone else TILT


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=PAIRS, default="mid")
    parser.add_argument("--type", choices=["q", "v"], default="v")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="mean tokens in a prompt")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--enforce-eager", action="store_true", help="vLLM without compilation: starts sooner, is slower"
    )
    parser.add_argument("--trace", type=Path, help="write a trace for a browser's about:tracing to this file")
    return parser.parse_args()


def start_engine(arguments: argparse.Namespace, folder: Path) -> "VllmSystem":
    """vLLM with the value model of the wanted type."""
    from serving_speed.models import write_models
    from serving_speed.vllm_system import EngineSettings, VllmSystem

    pair = PAIRS[arguments.shape]
    longest = 3 * arguments.length // 2 + 2 * arguments.steps + 16
    files = write_models(folder, pair, {arguments.type}, longest + 1, "float32", "cpu", dummy=False)
    blocks = arguments.rows * (longest // 128 + 2)
    return VllmSystem(
        EngineSettings(
            reference=files.reference,
            values=files.values,
            dtype="float32",
            max_model_len=longest,
            max_num_seqs=arguments.rows,
            kv_cache_bytes=blocks * 128 * pair.reference.kv_per_token * 4,
            max_top_k=arguments.top_k,
            dummy_weights=False,
            enforce_eager=arguments.enforce_eager,
            compilation={},
            prefix_caching=False,
            gpu_memory_utilization=None,
        ),
        plugin=True,
    )


def fill(served: "VllmSystem", arguments: argparse.Namespace) -> None:
    """All rows prefilled and a few steps further."""
    lengths = [
        arguments.length // 2 + arguments.length * row // max(1, arguments.rows - 1) for row in range(arguments.rows)
    ]
    if arguments.rows == 1:
        lengths = [arguments.length]
    vocab = PAIRS[arguments.shape].reference.vocab
    prompts = [random_prompts(1, length, vocab, seed=row)[0] for row, length in enumerate(lengths)]
    guided = system(f"{arguments.type}{arguments.top_k}")
    produced: dict[str, int] = {served.add(guided, prompt, 2 * arguments.steps + 16): 0 for prompt in prompts}
    while min(produced.values()) < 3:
        for output in served.engine.step():
            produced[output.request_id] += 1


@contextmanager
def ranges_of_modules() -> Iterator[None]:
    """Every module of transformers or torch called inside is a range of the profile."""
    from torch.autograd.profiler import record_function
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    open_ranges: list[Any] = []

    def enter(module: Any, _: Any) -> None:
        open_ranges.append(record_function(f"module: {type(module).__name__}"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class Guide:
    """Wraps `GuidedBatch.guide`: a range of the profile, and the seconds spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.profiled = False

    def install(self) -> None:
        from torch.autograd.profiler import record_function

        from qtilt.forwards.compiled.llama_forward import CompiledForward
        from qtilt.forwards.fused import FusedForward
        from qtilt.forwards.modules import ModulesForward
        from qtilt.vllm_plugin.guided import GuidedBatch

        guide = GuidedBatch.guide

        @functools.wraps(guide)
        def measured(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            if self.profiled:
                with record_function(GUIDE), ranges_of_modules():
                    result = guide(*arguments, **keywords)
            else:
                result = guide(*arguments, **keywords)
            self.seconds += time.perf_counter() - started
            return result

        GuidedBatch.guide = measured
        for forward in (CompiledForward, FusedForward, ModulesForward):
            forward.__call__ = record_function(BACKBONE)(forward.__call__)


def run_steps(served: "VllmSystem", steps: int) -> float:
    """Milliseconds a step."""
    from torch.autograd.profiler import record_function

    started = time.perf_counter()
    for _ in range(steps):
        with record_function(STEP):
            served.engine.step()
    return 1e3 * (time.perf_counter() - started) / steps


def shares(events: Iterable[Any], steps: int, vocab: int) -> list[Share]:
    """Self times by kind, largest first."""
    microseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        ranges, parent = [], event.cpu_parent
        while parent is not None:
            ranges.append(parent.name)
            parent = parent.cpu_parent
        if STEP not in [event.name, *ranges]:
            continue
        if event.name == GUIDE or event.name == BACKBONE or event.name.startswith("module: "):
            kind = PYTHON
        else:
            kind = kind_of(Operator(event.name, ranges, event.input_shapes or []), vocab)
            calls[kind] += 1
        microseconds[kind] += event.self_cpu_time_total
    found = [Share(kind, time / 1e3 / steps, calls[kind] / steps) for kind, time in microseconds.items()]
    return sorted(found, key=lambda share: -share.milliseconds)


def print_table(found: list[Share]) -> None:
    total = sum(share.milliseconds for share in found)
    guidance = sum(share.milliseconds for share in found if share.kind != VLLM)
    print(f"{'kind':<48}{'ms a step':>10}{'of step':>9}{'of guidance':>13}{'operators':>11}")
    for share in found:
        of_guidance = "" if share.kind == VLLM else f"{share.milliseconds / guidance:.1%}"
        calls = "" if share.kind == VLLM else f"{share.calls:.0f}"
        print(
            f"{share.kind:<48}{share.milliseconds:>10.2f}{share.milliseconds / total:>9.1%}{of_guidance:>13}{calls:>11}"
        )


def main() -> None:
    arguments = parse_arguments()
    os.environ |= {
        "OMP_NUM_THREADS": str(arguments.threads),
        "MKL_NUM_THREADS": str(arguments.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory(prefix="qtilt-profile-") as folder:
        served = start_engine(arguments, Path(folder))
    guide = Guide()
    guide.install()
    fill(served, arguments)
    guide.seconds = 0.0
    plain_step = run_steps(served, arguments.steps)
    plain_guide = 1e3 * guide.seconds / arguments.steps
    guide.profiled, guide.seconds = True, 0.0
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        profiled_step = run_steps(served, arguments.steps)
    profiled_guide = 1e3 * guide.seconds / arguments.steps
    found = shares(profiler.events(), arguments.steps, PAIRS[arguments.shape].reference.vocab)
    print(
        f"\n{arguments.type.upper()}-type, {arguments.rows} rows, prompts of {arguments.length} tokens on average, "
        f"top-k {arguments.top_k}, {arguments.threads} thread(s), float32\n"
        f"as it is: {plain_step:.2f} ms a step, {plain_guide:.2f} ms of it guidance; "
        f"under the profiler: {profiled_step:.2f} and {profiled_guide:.2f} ms\n"
    )
    print_table(found)
    if arguments.trace is not None:
        profiler.export_chrome_trace(str(arguments.trace))


if __name__ == "__main__":
    main()
