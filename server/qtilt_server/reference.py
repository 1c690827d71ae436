"""The reference model as the value models must fit it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qtilt.checkpoint import (
    BACKBONE_DIRECTORY,
    HEAD_FILE,
    CheckpointError,
    Manifest,
    fingerprint_tokenizer,
    read_manifest,
)
from qtilt.vllm_plugin.compatibility import Reference, check_fits_reference
from qtilt_server.errors import StartupError


def reference_of(model_config: Any) -> Reference:
    """From vLLM's ModelConfig.

    The tokenizer is read anew: to the one it caches, vLLM's API process adds tokens of its own (prompt embeddings).
    """
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(
        model_config.tokenizer,
        runner_type=model_config.runner_type,
        tokenizer_mode=model_config.tokenizer_mode,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,
    )
    return Reference(
        tokenizer=fingerprint_tokenizer(tokenizer),  # type: ignore[arg-type]
        vocab_size=model_config.get_vocab_size(),
        max_model_len=model_config.max_model_len,
    )


def check_value_models(directories: dict[str, Path], reference: Reference) -> dict[str, Manifest]:
    """Manifests by name. Raises StartupError for a value model that doesn't fit the reference.

    Differences that are allowed are warned about by the worker, once, when it loads the value model.
    """
    manifests: dict[str, Manifest] = {}
    for name, directory in directories.items():
        try:
            manifests[name] = read_manifest(directory)
            check_fits_reference(manifests[name], directory, reference)
            _check_weight_files(directory)
        except ValueError as error:
            raise StartupError(f"--value-model {name}={directory}: {error}") from error
    return manifests


def _check_weight_files(directory: Path) -> None:
    """Read their headers, which tell a truncated file: the worker's own refusal would not be one line."""
    for path in (directory / HEAD_FILE, *(directory / BACKBONE_DIRECTORY).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: can't be read ({error})") from error
