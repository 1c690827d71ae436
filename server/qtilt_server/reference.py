"""The reference model as the value models must fit it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qtilt.checkpoint import Manifest, fingerprint_tokenizer, load_value_model, read_manifest
from qtilt.forwards.probe import measure_geometry
from qtilt.model.low_rank import BaseModels
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
    """Manifests by name. Raises StartupError for a value model that doesn't fit the reference; weights aren't read.

    Differences that are allowed are warned about by the worker, once, when it loads the value model.
    """
    manifests: dict[str, Manifest] = {}
    for name, directory in directories.items():
        with _refused_at_start(name, directory):
            manifests[name] = read_manifest(directory)
            check_fits_reference(manifests[name], directory, reference)
    return manifests


def try_value_models(directories: dict[str, Path], max_length: int, served: str) -> None:
    """Load each and run it on a few tokens, as the worker will later: there a refusal would not be one line.

    served: where the reference model is. Raises StartupError for weights that can't be used and backbones that the
    value engine isn't exact on.
    """
    bases = BaseModels([served])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # vLLM may fork its engine, and OpenMP hangs in the fork of a process that used its pool
    try:
        for name, directory in directories.items():
            with _refused_at_start(name, directory):
                measure_geometry(load_value_model(directory, bases=bases).backbone, max_length)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _refused_at_start(name: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise StartupError(f"--value-model {name}={directory}: {error}") from error
