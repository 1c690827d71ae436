"""Names and command lines are frozen: a change shows up here and in the docs, never only in somebody's script.

The HTTP schema is frozen in test_server_schema.py, the value-model directory in test_checkpoint.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"

PUBLIC_NAMES = {
    "qtilt.checkpoint": {
        "BACKBONE_DIRECTORY",
        "CheckpointError",
        "FORMAT_VERSION",
        "HEAD_FILE",
        "MANIFEST_FILE",
        "Manifest",
        "READABLE_VERSIONS",
        "TokenizerFingerprint",
        "UPDATE_FILE",
        "check_same_ordinary_tokens",
        "fingerprint_tokenizer",
        "load_tokenizer",
        "load_unmerged",
        "load_value_model",
        "remove_unfinished",
        "read_manifest",
        "save_value_model",
    },
    "qtilt.distributions": {
        "Bernoulli",
        "Categorical",
        "DISTRIBUTIONS",
        "ReturnDistribution",
        "distribution_from_config",
    },
    "qtilt.params": {
        "DEFAULT_ETA",
        "DEFAULT_TAIL",
        "DEFAULT_TOP_K",
        "EXTRA_ARGS_KEY",
        "METHODS",
        "MIN_ETA",
        "TAILS",
        "GuidanceParams",
        "asks_for_guidance",
    },
    "qtilt.tilt": {
        "Candidates",
        "Divergence",
        "Drops",
        "OFFSETS",
        "ReferenceMass",
        "TAILS",
        "TiltFunctions",
        "cd_offsets",
        "divergence",
        "drops",
        "lowest_offset",
        "likeliest",
        "offsets",
        "qsharp_offsets",
        "reference_mass",
        "tilt_",
        "top_candidates",
    },
    "qtilt.engine": {"ValueEngine"},
    "qtilt.value_model": {"ValueModel", "ValueType", "embedding_rows", "head_rows"},
}

LIGHT_MODULES = [
    "qtilt",
    "qtilt.params",
    "qtilt.vllm_plugin.config",
    "qtilt.vllm_plugin.vllm_internals",
    "qtilt_server.cli",
    "qtilt_server.launch",
    "qtilt_trainer.cli",
]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse lays its help out differently since 3.13")
@pytest.mark.parametrize("page", ["server-cli.md", "trainer-cli.md"])
def test_generated_page_is_what_the_code_says(page: str) -> None:
    assert (DOCS / page).read_text() == load_generator().PAGES[page](), f"docs/{page} has drifted: run make docs"


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_module_loads_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'transformers', 'vllm'}} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{module} loads {result.stderr}"


@pytest.mark.parametrize("module", sorted(PUBLIC_NAMES))
def test_public_names_are_these(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == PUBLIC_NAMES[module]
