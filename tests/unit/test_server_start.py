"""Flags, the environment, and what vLLM is told: all that can be refused before vLLM is imported."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralModel

from qtilt.checkpoint import save_value_model
from qtilt.distributions import Bernoulli
from qtilt.params import DEFAULT_TAIL, TAILS
from qtilt.value_model import ValueModel
from qtilt.vllm_plugin.config import PROCESSOR, WORKER_EXTENSION
from qtilt_server.errors import StartupError
from qtilt_server.flags import GuidanceFlags, parse_own_flags
from qtilt_server.launch import COMPILED_PRODUCTS, add_guidance, prepare_environment, refuse_unsupported
from qtilt_server.reference import try_value_models
from real_server.models import VOCAB, make_tokenizer, make_value_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_value_models_keep_their_order(directory: Path) -> None:
    argv = [
        "model-id",
        "--value-model",
        f"b={directory}",
        "--port",
        "1",
        f"--value-model=a={directory}",
        "--swap-timeout=0",
    ]
    flags = parse_own_flags(argv)
    assert list(flags.value_models) == ["b", "a"]
    assert flags.value_models["a"] == directory
    assert (flags.eta, flags.top_k, flags.max_top_k, flags.swap_timeout) == (0.1, 20, 64, 0.0)
    assert flags.tail == DEFAULT_TAIL


def test_the_tail_is_floor_or_mean() -> None:
    for tail in TAILS:
        assert parse_own_flags([f"--guidance-tail={tail}"]).tail == tail
    with pytest.raises(StartupError, match=r"argument --guidance-tail: invalid choice: 'average'.*floor.*mean"):
        parse_own_flags(["--guidance-tail=average"])


BAD_FLAGS = {
    "--value-model=value": "expected NAME=DIR",
    "--value-model=value=": "expected NAME=DIR",
    "--value-model=value=/no/such/place": "no such directory",
    "--value-model=a@1=/": "a name is",
    "--value-model==/": "a name is",
    "--value-model-root=/no/such/place": "create it first",
    "--guidance-eta=0": "1e-09 or more",
    "--guidance-eta=inf": "finite",
    "--guidance-eta=nan": "finite",
    "--guidance-eta=x": "invalid float value",
    "--guidance-top-k=0": "1 to 64",
    "--guidance-top-k=65": "1 to 64",
    "--guidance-max-top-k=0": "at least 1",
    "--swap-timeout=-1": "seconds",
    "--swap-timeout=inf": "seconds",
    "--value-dtype=int8": "invalid choice",
    "--guidance-kv-fraction=0": "above 0 and at most 1",
    "--guidance-kv-tokens=0": "expected auto or a number of at least 1, got '0'",
    "--guidance-kv-tokens=many": "expected auto or a number",
    "--guidance-backbone-layers=4": "give that too",
    "--guidance-backbone=": "--guidance-backbone is empty",
    "--guidance-plan=0": "above 0",
    "--guidance-plan=80": "give --value-model or --guidance-backbone",
}


@pytest.mark.parametrize(("flag", "reason"), BAD_FLAGS.items())
def test_bad_flags_are_refused_saying_why(flag: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        parse_own_flags(["model-id", flag])


def test_value_models_of_the_start_leave_nothing_to_reserve(directory: Path) -> None:
    with pytest.raises(StartupError, match="--guidance-backbone is for a start without --value-model"):
        parse_own_flags(["model-id", f"--value-model=a={directory}", "--guidance-backbone=some/hub-id"])
    with pytest.raises(StartupError, match="--guidance-backbone-layers must be at least 1, got 0"):
        parse_own_flags(["model-id", "--guidance-backbone=some/hub-id", "--guidance-backbone-layers=0"])


def test_a_name_given_twice_is_refused(directory: Path) -> None:
    with pytest.raises(StartupError, match="twice"):
        parse_own_flags([f"--value-model=a={directory}", f"--value-model=a={directory}"])


def test_a_refusal_is_one_line_on_stderr_and_code_2() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qtilt_server.cli", "model-id", "--value-model", "value=/no/such/place"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "qtilt-server: --value-model value=/no/such/place: no such directory\n"


def test_vllm_keeps_its_other_plugins() -> None:
    environ: dict[str, str] = {}
    prepare_environment(environ)
    plugins = environ["VLLM_PLUGINS"].split(",")
    assert {"lora_filesystem_resolver", "lora_hf_hub_resolver", "qtilt"} <= set(plugins)


@pytest.mark.parametrize(("given", "expected"), [("a,b", "a,b,qtilt"), ("qtilt", "qtilt"), ("", ",qtilt")])
def test_a_list_of_plugins_is_extended(given: str, expected: str) -> None:
    environ = {"VLLM_PLUGINS": given}
    prepare_environment(environ)
    assert environ["VLLM_PLUGINS"] == expected


def test_how_many_compiled_products_are_kept_is_the_users_choice() -> None:
    environ = {"LRU_CACHE_CAPACITY": "7"}
    prepare_environment(environ)
    assert {name: environ[name] for name in COMPILED_PRODUCTS} == {**COMPILED_PRODUCTS, "LRU_CACHE_CAPACITY": "7"}


# A 4 x 256 model's products of 1 to 700 rows, and by how many MiB the process grew; "prepared": as the server runs.
PRODUCTS_OF_ALL_SIZES = """
import os, sys
if sys.argv[1:] == ["prepared"]:
    from qtilt_server.launch import prepare_environment
    prepare_environment(os.environ)
import torch
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
torch.set_num_threads(1)
weights = [torch.randn(out_size, in_size) for in_size, out_size in [(256, 256), (256, 688), (688, 256)]]
rows = {in_size: torch.randn(700, in_size) for in_size in (256, 688)}
before = resident_mib()
with torch.inference_mode():
    for count in range(1, 701):
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(rows[weight.shape[1]][:count], weight, None, "none", [], "")
print(resident_mib() - before)
"""


def test_products_of_many_sizes_leave_little_memory_behind() -> None:
    """210 MiB of 750 have been seen with one CPU's kernels, 310 to 360 of 930 with another's."""
    as_they_are, prepared = (
        float(
            subprocess.run([sys.executable, "-c", PRODUCTS_OF_ALL_SIZES, *how], check=True, capture_output=True).stdout
        )
        for how in ([], ["prepared"])
    )
    assert 0 < prepared < as_they_are / 2


def test_an_environment_that_excludes_guidance_is_refused() -> None:
    with pytest.raises(StartupError, match="VLLM_USE_RUST_FRONTEND"):
        prepare_environment({"VLLM_USE_RUST_FRONTEND": "1"})


VLLM_DEFAULTS: dict[str, Any] = {
    "api_server_count": None,
    "data_parallel_size": 1,
    "data_parallel_rank": None,
    "pipeline_parallel_size": 1,
    "headless": False,
    "grpc": False,
    "skip_tokenizer_init": False,
    "enable_sleep_mode": False,
    "worker_extension_cls": "",
    "additional_config": {},
    "logits_processors": None,
}


@pytest.mark.parametrize(
    "given",
    [
        {"api_server_count": 2},
        {"data_parallel_size": 2},
        {"data_parallel_rank": 0},
        {"pipeline_parallel_size": 2},
        {"headless": True},
        {"grpc": True},
        {"skip_tokenizer_init": True},
        {"enable_sleep_mode": True},
        {"worker_extension_cls": "mine.Extension"},
        {"additional_config": {"qtilt": {}}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_guidance_cannot_work_with_is_refused(given: dict[str, Any]) -> None:
    refuse_unsupported(argparse.Namespace(**VLLM_DEFAULTS))
    with pytest.raises(StartupError, match="remove"):
        refuse_unsupported(argparse.Namespace(**{**VLLM_DEFAULTS, **given}))


def test_a_server_that_checks_no_models_names_is_refused() -> None:
    with pytest.raises(StartupError, match="unset VLLM_SKIP_MODEL_NAME_VALIDATION"):
        prepare_environment({"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"})
    prepare_environment({"VLLM_SKIP_MODEL_NAME_VALIDATION": "0"})


def test_the_users_own_settings_are_kept(directory: Path) -> None:
    args = argparse.Namespace(
        **{**VLLM_DEFAULTS, "logits_processors": ["mine:Processor"], "additional_config": {"mine": 1}}
    )
    add_guidance(args, GuidanceFlags(value_models={"value": directory}, max_top_k=32))
    assert args.logits_processors == ["mine:Processor", PROCESSOR]
    assert args.worker_extension_cls == WORKER_EXTENSION
    assert args.additional_config == {
        "mine": 1,
        "qtilt": {
            "value_models": {"value": str(directory)},
            "versions": {},
            "max_top_k": 32,
            "value_dtype": "auto",
            "kv_fraction": None,
            "kv_tokens": None,
            "backbone": None,
            "backbone_layers": None,
            "behind_server": True,
        },
    }


@pytest.mark.parametrize("file", ["head.safetensors", "backbone/model.safetensors"])
def test_damaged_weights_are_refused_before_the_worker_would(tmp_path: Path, file: str) -> None:
    model = make_value_model(tmp_path / "model", seed=0)
    try_value_models({"value": model}, max_length=64, served="none")
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(StartupError, match=f"--value-model value=.*{file.partition('/')[0]}: .*can't be"):
        try_value_models({"value": model}, max_length=64, served="none")


def test_a_backbone_the_value_engine_is_not_exact_on_is_refused_before_the_worker_would(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 32}
    config = MistralConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, **heads)
    model = ValueModel.from_backbone(MistralModel(config), "v", Bernoulli())
    save_value_model(model, tmp_path / "windowed", make_tokenizer())
    try_value_models({"value": tmp_path / "windowed"}, max_length=32, served="none")
    with pytest.raises(StartupError, match=r"--value-model value=.*windowed: .*sliding.window.*32"):
        try_value_models({"value": tmp_path / "windowed"}, max_length=64, served="none")
