"""Reading the decoder of a causal language model, whole or its first layers, in float32; and its tokenizer.

Only what is needed is read, nothing is unpickled, and no remote code is run.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# What transformers raises for files that make no sense; many of its checks are lookups that fail.
_UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists of a config with an entry for each layer."""


class BackboneError(ValueError):
    """A decoder that can't be read; one line that says why."""


def read_config(source: Path | str) -> PreTrainedConfig:
    """The config of a directory or hub id. Raises BackboneError."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(_place(source), trust_remote_code=False)
    except _UNUSABLE as error:
        raise BackboneError(one_line(error)) from error
    return config


def first_layers(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """The config of the first ``layers`` layers; None: of all. Raises BackboneError out of range."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is None:
        return config
    if not 1 <= layers <= text.num_hidden_layers:
        raise BackboneError(f"layers must be 1 to {text.num_hidden_layers}, the layers it has, got {layers}")
    text.num_hidden_layers = layers
    for name in PER_LAYER:
        if getattr(text, name, None) is not None:
            setattr(text, name, getattr(text, name)[:layers])
    return config


def read_backbone(
    source: Path | str, config: PreTrainedConfig, *, is_part: bool, local_files_only: bool = False
) -> PreTrainedModel:
    """What ``config`` describes, from a directory or hub id, in float32.

    is_part: weights that the config doesn't know, of later layers say, are left unread; else they are an error.
    Raises BackboneError, also for weights that are missing or of another shape.
    """
    try:
        # transformers sets torch's process-wide default dtype to the one it loads in, and a server loads while its
        # other thread computes. So load in float32, the default already.
        with _without_load_report():
            backbone, report = AutoModel.from_pretrained(
                _place(source),
                config=config,
                dtype=torch.float32,
                local_files_only=local_files_only,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported instead, and refused here with their names
                output_loading_info=True,
            )
    except _UNUSABLE as error:
        raise BackboneError(f"the backbone can't be loaded ({one_line(error)})") from error
    _check_weights(report, is_part)
    return backbone  # type: ignore[no-any-return]


def read_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id. Raises BackboneError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_place(source), trust_remote_code=False)
    except _UNUSABLE as error:
        raise BackboneError(f"the tokenizer can't be loaded ({one_line(error)})") from error
    return tokenizer


def _place(source: Path | str) -> Path | str:
    """A directory below ``~`` is in a different place for each user, who all can read one configuration."""
    return Path(source).expanduser() if str(source).startswith("~") else source


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Drop the table of weights that are missing or unused: here they are an error in one line, or no surprise."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_weights(report: Mapping[str, Any], is_part: bool) -> None:
    faults = {
        "missing": sorted(report["missing_keys"]),
        "of another shape than config.json says": [
            f"{name} {list(found)}, not {list(expected)}" for name, found, expected in sorted(report["mismatched_keys"])
        ],
        # A whole language model is fine: its last layer isn't used.
        "unknown to config.json": sorted(
            key for key in report["unexpected_keys"] if not is_part and not key.startswith("lm_head.")
        ),
    }
    for fault, weights in faults.items():
        if weights:
            raise BackboneError(f"weights {fault}: {', '.join(weights[:3])}")
