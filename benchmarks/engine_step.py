"""What a step of the value engine costs, as a ratio to one plain Hugging Face decoding step of the same backbone.

The plain step is the backbone's own: one new token for each of B rows of equal length on a static cache, the most
favourable case there is. The engine's rows have lengths spread around the same mean. Ratios, medians of interleaved
repetitions, because machines differ and drift.

    python benchmarks/engine_step.py --layers 4 --hidden 256 --rows 32 --length 256
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from qtilt.distributions import Bernoulli
from qtilt.engine import ValueEngine
from qtilt.forwards.compiled import library
from qtilt.forwards.fused import Kernels
from qtilt.forwards.packing import LastTokens
from qtilt.value_model import ValueModel


def parse_arguments() -> argparse.Namespace:
    """Sizes of the backbone and of a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="mean tokens in a history")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--forward",
        choices=["transformers", "fused", "compiled"],
        default="transformers",
        help="what runs the backbone; fused is on vLLM's kernels. The server takes the last one that it can",
    )
    return parser.parse_args()


def make_backbone(arguments: argparse.Namespace) -> LlamaModel:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocab,
        max_position_embeddings=2 * arguments.length + arguments.repeat + 8,
    )
    return LlamaModel(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()


def plain_step(backbone: LlamaModel, arguments: argparse.Namespace) -> Callable[[], object]:
    """One token for each row on the backbone's own cache, cropped back after it."""
    cache = DynamicCache(config=backbone.config)
    ids_BT = torch.randint(arguments.vocab, (arguments.rows, arguments.length), device=arguments.device)
    token_B1 = ids_BT[:, :1]
    with torch.inference_mode():
        backbone(input_ids=ids_BT, past_key_values=cache)

    def step() -> None:
        with torch.inference_mode():
            backbone(input_ids=token_B1, past_key_values=cache)
            cache.crop(-1)

    return step


def guided_step(backbone: LlamaModel, type: str, columns: int, arguments: argparse.Namespace) -> Callable[[], object]:
    """One new token and ``columns`` candidates for each row on the engine."""
    model = ValueModel.from_backbone(backbone, type, Bernoulli(), head_std=0.1)
    settings = {"fused": lambda: {"kernels": vllm_kernels()}, "compiled": compiled, "transformers": dict}
    engine = ValueEngine(model, arguments.rows, model.max_positions - 1, **settings[arguments.forward]())
    assert engine.forward.name == arguments.forward, f"it is {engine.forward.name} that runs this backbone here"
    lengths = torch.linspace(arguments.length / 2, 3 * arguments.length / 2, arguments.rows).long()
    tokens_SP = torch.randint(arguments.vocab, (arguments.rows, engine.cache.max_length)).to(arguments.device)
    candidates_BK: Tensor = torch.randint(arguments.vocab, (arguments.rows, columns), device=arguments.device)
    slots_B = torch.arange(arguments.rows)
    for slot in range(arguments.rows):
        engine.acquire(slot)

    def step() -> None:
        lengths.add_(1)
        spans = engine.feed(slots_B.numpy(), lengths.numpy(), tokens_SP)
        last = [slots_B, lengths - 1, torch.ones_like(slots_B)]
        engine.score(
            LastTokens(*(each.to(arguments.device) for each in last), int(lengths.max())), candidates_BK, spans
        )

    step()
    return step


def compiled() -> dict[str, object]:
    """Compiles, unless that was done before."""
    library.load()
    return {}


def vllm_kernels() -> Kernels:
    """Loads vLLM."""
    from vllm.platforms import current_platform

    from qtilt.vllm_plugin.kernels import VllmKernels

    current_platform.import_kernels()
    return VllmKernels()


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall-clock time of one step, the device's work included."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    backbone = make_backbone(arguments)
    steps = {
        "plain forward": plain_step(backbone, arguments),
        "Q-type": guided_step(backbone, "q", arguments.candidates, arguments),
        f"V-type, {arguments.candidates} candidates": guided_step(backbone, "v", arguments.candidates, arguments),
    }
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeat):
        for name, step in steps.items():
            measured[name].append(seconds(step, arguments.device))
    plain = statistics.median(measured["plain forward"])
    print(f"{'step':<24}{'ms':>9}{'ratio':>8}   {arguments.rows} rows, {arguments.length} tokens, {arguments.device}")
    for name, times in measured.items():
        median = statistics.median(times)
        print(f"{name:<24}{1e3 * median:>9.2f}{median / plain:>8.2f}")


if __name__ == "__main__":
    main()
