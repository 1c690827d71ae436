"""The reference model as the value models must fit it."""

from pathlib import Path
from typing import Any

from qtilt.checkpoint import Manifest, fingerprint_tokenizer, read_manifest
from qtilt.vllm_plugin.compatibility import Reference, check_fits_reference
from qtilt_server.errors import StartupError


def reference_of(model_config: Any, tokenizer: Any) -> Reference:
    """From vLLM's ModelConfig and its tokenizer. Raises StartupError when there is no tokenizer to compare."""
    if tokenizer is None:
        raise StartupError("guidance compares tokenizers and needs one: start without --skip-tokenizer-init")
    return Reference(
        tokenizer=fingerprint_tokenizer(tokenizer),
        vocab_size=model_config.get_vocab_size(),
        max_model_len=model_config.max_model_len,
    )


def check_value_models(directories: dict[str, Path], reference: Reference) -> tuple[dict[str, Manifest], list[str]]:
    """Manifests by name, and warnings. Raises StartupError for a value model that doesn't fit the reference."""
    manifests: dict[str, Manifest] = {}
    warnings: list[str] = []
    for name, directory in directories.items():
        try:
            manifests[name] = read_manifest(directory)
            warnings += check_fits_reference(manifests[name], directory, reference)
        except ValueError as error:
            raise StartupError(f"--value-model {name}={directory}: {error}") from error
    return manifests, warnings
