"""The benchmarks' own arithmetic, their Hugging Face baseline against plain forwards, the commands at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import candidate_mass
from guided_vllm.oracle import ValueOracle
from guided_vllm.tiny_models import make_value_model
from profile_step import COPY, GUIDE, STEP, TILT, VLLM, Operator, kind_of
from qtilt.checkpoint import load_value_model
from qtilt.distributions import Bernoulli
from qtilt.value_model import ValueType
from serving import grid, parse_arguments
from serving_speed.bounds import Cost, Run, ratio_bounds, reference_cost, value_cost
from serving_speed.comparison import make_row, percentile, ratios_per_round
from serving_speed.hf_system import INV_ETA, ValueGuidance
from serving_speed.shapes import PAIRS, DecoderShape, Pair
from serving_speed.systems import system
from serving_speed.workload import Outcome, Request, Workload, random_prompts, staggered

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# qkv 2 × 6, output 2 × 2, gate and up 2 × 6, down 3 × 2: 34 parameters; 4 cache entries a token.
SMALL = DecoderShape(layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, head_size=2, vocab=5)
# Two prompt tokens and two new ones: three are run, the second sampling sees all three.
RUN = Run(sequences=2, prompt=2, new_tokens=2, number_bytes=4)


def test_reference_cost_by_hand() -> None:
    matrices, attention, head = 2 * 34 * 3, 4 * 2 * (1 + 2 + 3), 2 * 5 * 2 * 2
    caches = 4 * (3 + 2 + 3)  # three tokens written, two and then three read
    assert reference_cost(SMALL, RUN) == Cost(2 * (matrices + attention + head), 4 * ((34 + 10) * 2 + 2 * caches))


def test_q_type_cost_by_hand() -> None:
    matrices, attention, head = 2 * 34 * 3, 4 * 2 * (1 + 2 + 3), 2 * 3 * 2 * 2
    head_rows = 3 * 2 * 2 * 2
    expected = Cost(2 * (matrices + attention + head), 4 * (34 * 2 + 2 * 32 + head_rows))
    assert value_cost(SMALL, "q", 3, RUN) == expected


def test_v_type_cost_by_hand() -> None:
    # Three candidates in each of two steps, which see 2 and then 3 tokens of history, and themselves.
    matrices, attention, head = 2 * 34 * (3 + 6), 4 * 2 * (6 + 3 * (3 + 4)), 2 * 3 * 2 * 2
    expected = Cost(2 * (matrices + attention + head), 4 * (34 * 2 + 2 * 32 + 2 * 2))
    assert value_cost(SMALL, "v", 3, RUN) == expected


def test_bound_of_the_ratio_is_one_plus_value_over_reference() -> None:
    bounds = ratio_bounds(Pair(SMALL, SMALL), "q", 3, RUN)
    assert bounds.flops == pytest.approx(1 + 552 / 584)
    assert bounds.bytes == pytest.approx(1 + 624 / 608)
    assert ratio_bounds(Pair(SMALL, SMALL), None, 3, RUN).flops == 1.0


def test_the_mid_pair_is_one_to_eight() -> None:
    assert PAIRS["mid"].reference.parameters == 8 * PAIRS["mid"].value.parameters


def test_the_llama_pair_has_the_published_sizes() -> None:
    reference, value = PAIRS["llama-3.1-8b+1b"].reference, PAIRS["llama-3.1-8b+1b"].value
    # With embeddings, the head of the larger model and norms; the smaller one's head is its embedding.
    assert reference.parameters + 2 * reference.vocab * 4096 + 65 * 4096 == 8_030_261_248
    assert value.parameters + value.vocab * 2048 + 33 * 2048 == 1_235_814_400


def test_ratios_are_taken_within_rounds() -> None:
    spread = ratios_per_round([3.0, 2.0, 8.0], [1.0, 2.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="longer"):
        ratios_per_round([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (99, 10), (100, 10), (10, 1), (11, 2)])
def test_percentile_is_a_measured_value(percent: float, expected: int) -> None:
    assert percentile(range(10, 0, -1), percent) == expected


def test_a_row_counts_waiting_and_gaps() -> None:
    plain = Outcome([0.0, 1.0], [[1.0, 2.0, 3.0], [2.0, 4.0, 5.0]], cpu_seconds=4.0)
    mine = Outcome([0.0, 1.0], [[2.0, 4.0, 6.0], [4.0, 8.0, 10.0]], cpu_seconds=12.0)
    row = make_row("q", [mine], [plain], None, products_seconds=1.0)
    assert row.tokens_per_second.median == 6 / 10
    assert row.first_token == 2.5
    assert (row.inter_token_p50, row.inter_token_p99) == (2.0, 4.0)
    assert (row.ratio.median, row.cpu_ratio.median, row.products_ratio) == (2.0, 3.0, 1.2)
    assert row.over_products == pytest.approx(2.0 / 1.2)
    assert row.over_flops is None


def test_an_outcome_that_lacks_tokens_is_refused() -> None:
    workload = Workload([Request([1]), Request([2])], new_tokens=2, concurrency=2)
    with pytest.raises(RuntimeError, match=r"got \[1, 2\] tokens, expected 2"):
        Outcome([0.0, 0.0], [[1.0, 2.0], [1.0]], 1.0).check(workload)


def test_staggered_arrivals_keep_plain_vllm_just_busy() -> None:
    prompts = random_prompts(4000, 3, vocab=10, seed=1)
    workload = staggered(prompts, new_tokens=100, concurrency=20, step_seconds=0.01, load=2.0, seed=1)
    times = [request.arrives for request in workload.requests]
    assert times == sorted(times)
    assert times[0] == 0.0
    # 20 requests in flight for 100 steps of 10 ms each are 20 requests a second, here twice as many.
    assert 4000 / times[-1] == pytest.approx(40, rel=0.05)
    assert workload == staggered(prompts, 100, 20, 0.01, 2.0, seed=1)
    assert all(token < 8 for request in workload.requests for token in request.prompt)


def test_system_names() -> None:
    assert (system("v5").engine, system("v5").type, system("v5").top_k) == ("guided", "v", 5)
    assert (system("hf-q").engine, system("hf-q").type, system("hf-q").top_k) == ("hf", "q", 20)
    for name in ("v0", "v20t"):
        with pytest.raises(ValueError, match="expected one of plain"):
            system(name)


def test_plain_is_always_measured() -> None:
    arguments = parse_arguments(["--systems", "q,v5", "--concurrency", "1,8", "--prompt", "32,512"])
    assert [one.name for one in arguments.systems] == ["plain", "q", "v5"]
    assert [(setting.concurrency, setting.prompt) for setting in grid(arguments)] == [
        (1, 32),
        (8, 32),
        (1, 512),
        (8, 512),
    ]


@pytest.mark.parametrize("type", ["q", "v"])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 7, 5)], ids=["equal", "padded"])
def test_hf_baseline_equals_plain_forwards(tmp_path: Path, type: ValueType, lengths: tuple[int, ...]) -> None:
    """Over a prefill and three steps, prompts of one length or padded on the left."""
    directory = make_value_model(tmp_path / "value", type, Bernoulli(), "llama", seed=1)
    oracle, k = ValueOracle(directory), 4
    histories = [random_prompts(1, length, vocab=88, seed=length)[0] for length in lengths]
    padding = [max(lengths) - length for length in lengths]
    mask = torch.tensor([[0] * pad + [1] * len(history) for pad, history in zip(padding, histories, strict=True)])
    guidance = ValueGuidance(load_value_model(directory), k, mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.tensor([[89] * pad + history for pad, history in zip(padding, histories, strict=True)])
        scores = torch.randn(len(histories), 90, generator=generator)
        added = guidance(ids, scores) - scores
        for row, history in enumerate(histories):
            candidates = scores[row].topk(k).indices.tolist()
            expected, _ = oracle.offsets(history, candidates, 1 / INV_ETA, "qsharp")
            expected += INV_ETA  # the oracle's are less v_max/η
            torch.testing.assert_close(added[row, candidates].double(), expected, rtol=1e-4, atol=1e-4)
            assert int((added[row] != 0).sum()) <= k
            history.append(candidates[1])


def test_operators_are_told_apart_by_name_shape_and_range() -> None:
    def kind(name: str, inside: list[str], *shapes: list[int]) -> str:
        return kind_of(Operator(name, [*inside, STEP], list(shapes)), vocab=100)

    backbone = ["module: Linear", "backbone", GUIDE]
    assert kind("aten::addmm", []) == VLLM
    assert kind("aten::addmm", backbone, [32, 16], [16, 16]) == "GEMM of the backbone"
    assert kind("mkldnn::_linear_pointwise", [GUIDE], [32, 16], [1, 16]) == "head"
    assert kind("aten::_scaled_dot_product_flash_attention_for_cpu", backbone) == "attention"
    assert kind("aten::topk", [GUIDE], [32, 100]) == TILT
    assert kind("aten::index", [GUIDE], [32, 100]) == TILT
    assert kind("aten::index", ["backbone", GUIDE], [32, 16]) == "gather, scatter, copies"
    assert kind("aten::mul", ["module: LlamaRMSNorm", "backbone", GUIDE], [32, 16]).startswith("small operations")
    assert COPY.search("aten::index_select")
    assert not COPY.search("aten::topk")


def run_benchmark(*command: str) -> str:
    """Standard output; the environment's thread count and settings of vLLM are the command's own affair."""
    done = subprocess.run([sys.executable, *command], env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_serving_runs_plain_and_q_type(tmp_path: Path) -> None:
    options = "--shape tiny --systems plain,q --concurrency 1,3 --prompt 6 --new-tokens 5 --rounds 2 --enforce-eager"
    printed = run_benchmark(str(BENCHMARKS / "serving.py"), *options.split(), "--out", str(tmp_path))
    report = json.loads((tmp_path / "serving.json").read_text())
    assert [cell["setting"]["concurrency"] for cell in report["cells"]] == [1, 3]
    assert report["engines"]["q"]["threads"] == 1
    for cell in report["cells"]:
        assert f"concurrency {cell['setting']['concurrency']}, prompt 6, 5 new tokens" in printed
        plain, guided = cell["rows"]
        assert (plain["system"], guided["system"]) == ("plain", "q")
        assert plain["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert 1 < guided["bounds"]["flops"] < 2
        for outcomes in cell["rounds"].values():
            assert len(outcomes) == 2
            for outcome in outcomes:
                assert [len(times) for times in outcome["token_times"]] == [5] * cell["setting"]["concurrency"]
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_serving_gives_every_system_the_same_staggered_arrivals(tmp_path: Path) -> None:
    options = (
        "--shape tiny --systems plain,v5,hf-v5 --concurrency 2 --prompt 6 --new-tokens 5 --rounds 1 --enforce-eager"
    )
    command = [*options.split(), "--arrivals", "staggered", "--requests", "5", "--out", str(tmp_path)]
    run_benchmark(str(BENCHMARKS / "serving.py"), *command)
    (cell,) = json.loads((tmp_path / "serving.json").read_text())["cells"]
    arrived = [outcome["arrived"] for outcomes in cell["rounds"].values() for outcome in outcomes]
    assert len(arrived) == 3
    assert arrived[0] == arrived[1] == arrived[2] == sorted(arrived[0])
    for (outcome,) in cell["rounds"].values():
        assert all(
            times[0] > arrives for times, arrives in zip(outcome["token_times"], outcome["arrived"], strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("type", ["q", "v"])
def test_profile_accounts_for_a_step(type: str) -> None:
    command = ["--shape", "tiny", "--type", type, "--rows", "3", "--length", "8", "--steps", "4", "--enforce-eager"]
    printed = run_benchmark(str(BENCHMARKS / "profile_step.py"), *command)
    shares = dict(
        line.rsplit("%", 1)[0].split("%")[0].rsplit(None, 2)[::2] for line in printed.splitlines() if "%" in line
    )
    assert {VLLM, TILT, "attention", "GEMM of the backbone", "head"} <= {name.strip() for name in shares}
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.6)


def test_rewards_are_paired_by_prompt_and_times_by_batch() -> None:
    assert candidate_mass.difference([0.5, 1.0, 0.0], [0.5, 0.5, 0.5]) == "+0.000 ± 0.566"
    assert candidate_mass.spread([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == "3.00 [2.00, 4.00]"
