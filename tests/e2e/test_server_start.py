"""Starts that are refused: one line on stderr that says what to do, exit code 2, and before the engine if possible."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from real_server.models import ALPHABET, POSITIONS, make_tokenizer, make_value_model
from real_server.process import COMMAND, QUICK_START, running_server

LIMIT_S = 120


def refused(*command: str | Path) -> str:
    """The line on stderr."""
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("qtilt-server: ")]
    assert (ended.returncode, len(lines)) == (2, 1), ended.stderr[-3000:]
    assert ended.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in ended.stderr
    assert "EngineCore" not in ended.stdout, "the engine was started"
    return lines[0]


def test_a_value_model_with_too_few_positions(models: Path, tmp_path: Path) -> None:
    """The maximum length is the reference's own here: no flag names it."""
    short = make_value_model(tmp_path / "short", seed=1, positions=64)
    line = refused(COMMAND, models / "reference", "--value-model", f"value={short}", *QUICK_START)
    assert f"covers 64 positions, max_model_len is {POSITIONS}: lower --max-model-len" in line


def test_a_value_model_of_another_vocabulary(models: Path, tmp_path: Path) -> None:
    other = make_value_model(tmp_path / "other", seed=1, tokenizer=make_tokenizer(ALPHABET[::-1]))
    line = refused(COMMAND, models / "reference", "--value-model", f"value={other}", *QUICK_START)
    assert "ordinary tokens" in line
    assert "shares the reference's tokenizer" in line


def test_a_plan_of_memory_is_printed_in_place_of_serving(models: Path) -> None:
    """Of a GPU that isn't here, with value models that aren't there yet."""
    backbone = f"--guidance-backbone={models / 'published' / 'start' / 'backbone'}"
    ended = subprocess.run(
        [COMMAND, models / "reference", backbone, "--guidance-plan=80", "--max-num-seqs=100", "--max-model-len=200"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    table = ended.stdout[ended.stdout.index(f"{models / 'reference'} with 100 requests of up to 200 tokens:") :]
    assert "what vLLM may use" in table
    assert "73.600 GiB" in table
    assert f"guidance: value pages, {100 * 7 * 32:,} tokens" in table, "more pages than these requests can't have"


def test_value_models_to_come_that_cannot_be_planned_for(models: Path, tmp_path: Path) -> None:
    line = refused(COMMAND, models / "reference", "--guidance-backbone=/no/such/place", *QUICK_START)
    assert "/no/such/place" in line
    start = f"--value-model=value={models / 'published' / 'start'}"
    short = f"--guidance-backbone={make_value_model(tmp_path / 'short', seed=1, positions=64) / 'backbone'}"
    line = refused(COMMAND, models / "reference", short, "--guidance-plan=80", "--max-model-len=65")
    assert "has 64 positions, fewer than the 65 tokens of the longest request" in line
    line = refused(COMMAND, models / "reference", start, "--guidance-plan=0.1", "--max-num-seqs=1024")
    assert "of the 0.1 GiB that vLLM may use" in line
    assert "--max-num-seqs" in line


@pytest.mark.slow
def test_speculative_decoding_on_model_runner_v1(models: Path) -> None:
    speculative = '--speculative-config={"method": "ngram", "num_speculative_tokens": 2}'
    line = refused(COMMAND, models / "reference", f"--value-model=value={models / 'published' / 'start'}", speculative)
    assert "remove --speculative-config" in line


@pytest.mark.slow
def test_a_bad_flag_of_vllm(models: Path) -> None:
    line = refused(COMMAND, models / "reference", "--enable-auto-tool-choice")
    assert "requires --tool-call-parser" in line


@pytest.mark.slow
def test_other_added_tokens_are_one_warning(models: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(special=("<end>", "<pad>", "<user>", "<helper>"))
    value_model = make_value_model(tmp_path / "value", seed=1, tokenizer=tokenizer)
    flag = f"--value-model=value={value_model}"
    with running_server(models / "reference", models / "published", tmp_path / "log", flag) as server:
        answer = server.post("/v1/completions", {"model": server.model, "prompt": "a", "guidance": {}})
        assert answer.json()["guidance"]["value_model"] == "value@1"
        assert server.log.read_text().count("added tokens differ") == 1


@pytest.mark.slow
def test_a_processor_that_is_not_live_in_the_worker(models: Path) -> None:
    """vLLM is told about everything but the processor: the server must find out, not answer unguided."""
    without_processor = (
        "import qtilt_server.launch as launch, qtilt_server.cli as cli\n"
        "launch.PROCESSOR = 'vllm.v1.sample.logits_processor:MinPLogitsProcessor'\n"
        "cli.main()\n"
    )
    flags = ["--value-model", f"value={models / 'published' / 'start'}", "--port=0", *QUICK_START]
    ended = subprocess.run(
        [sys.executable, "-c", without_processor, models / "reference", *flags],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr[-3000:]
    lines = [line for line in ended.stderr.splitlines() if line.startswith("qtilt-server: ")]
    assert len(lines) == 1
    assert "guidance is not live in the worker" in lines[0]


@pytest.mark.slow
def test_without_a_value_model_the_server_waits_for_one(models: Path, tmp_path: Path) -> None:
    with running_server(models / "reference", models / "published", tmp_path / "log") as server:
        ask = {"model": server.model, "prompt": "a", "guidance": {}}
        refusal = server.post("/v1/completions", ask)
        assert refusal.status_code == 400
        assert "no value model is loaded" in refusal.json()["error"]["message"]
        unready = server.get("/v1/guidance/ready")
        assert (unready.status_code, unready.json()) == (503, {"ready": False, "active": []})
        assert server.post("/v1/completions", {**ask, "guidance": None}).status_code == 200
        assert server.post("/v1/guidance/value_models", {"name": "first", "path": "start"}).json()["version"] == 1
        assert server.post("/v1/completions", ask).json()["guidance"]["value_model"] == "first@1"
        ready = server.get("/v1/guidance/ready")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "active": ["first@1"]})
