"""The value-model directory, format version 1: its only writer and its only reader.

::

    value_model.json      format_version, type, distribution, tokenizer (fingerprint), provenance
    backbone/             a plain transformers checkpoint (config, safetensors weights, tokenizer)
    head.safetensors      weight [A, hidden] (V-type) or [vocab·A, hidden] with row token·A + atom (Q-type);
                          A = 1 for Bernoulli; optional bias [A] or [vocab·A]

A directory appears under its name in one rename, complete and flushed to disk: a reader never sees half a model.
Nothing is unpickled and no remote code is run.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from qtilt.distributions import ReturnDistribution, distribution_from_config
from qtilt.durable import flush
from qtilt.value_model import ValueModel, ValueType, head_rows

FORMAT_VERSION = 1
MANIFEST_FILE = "value_model.json"
BACKBONE_DIRECTORY = "backbone"
HEAD_FILE = "head.safetensors"
# What transformers raises for a config or weights that make no sense; many of its checks are lookups that fail.
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


class CheckpointError(ValueError):
    """A value-model directory that can't be written or used; the message names the file and the reason."""


@dataclass(frozen=True)
class TokenizerFingerprint:
    """Which token has which id.

    ordinary_sha256, ordinary_count: over the (token, id) pairs that aren't added tokens; these must agree between
    reference and value model. added: the added (special) tokens and their ids; these may differ, with a warning.
    """

    ordinary_sha256: str
    ordinary_count: int
    added: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole_numbers = isinstance(self.added, dict) and all(
            type(number) is int for number in (self.ordinary_count, *self.added.values())
        )
        if not whole_numbers or not isinstance(self.ordinary_sha256, str):
            raise ValueError(
                "a fingerprint is a hexadecimal digest, a count, and an object of added tokens and their ids"
            )

    @property
    def token_count(self) -> int:
        """One more than the largest id in use is at least this: ordinary and added tokens together."""
        return self.ordinary_count + len(self.added)


@dataclass(frozen=True)
class Manifest:
    """What ``value_model.json`` and the backbone's config say, checked, without reading weights.

    max_positions: the longest sequence the backbone covers. vocab_size: the ids that its config says it can read.
    provenance: free JSON; ``provenance["rollouts"]`` holds the sampling parameters of the roll-outs it was fitted on.
    """

    type: ValueType
    distribution: ReturnDistribution
    tokenizer: TokenizerFingerprint
    provenance: dict[str, Any]
    max_positions: int
    vocab_size: int


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerFingerprint:
    """The fingerprint of a transformers tokenizer."""
    added = tokenizer.get_added_vocab()
    ordinary = sorted((index, token) for token, index in tokenizer.get_vocab().items() if token not in added)
    digest = hashlib.sha256(json.dumps(ordinary, ensure_ascii=True).encode()).hexdigest()
    return TokenizerFingerprint(digest, len(ordinary), dict(sorted(added.items())))


def check_same_ordinary_tokens(
    value_model: TokenizerFingerprint, reference: TokenizerFingerprint, directory: Path
) -> None:
    """Raise CheckpointError unless both tokenizers give every ordinary token the same id."""
    if value_model.ordinary_sha256 != reference.ordinary_sha256:
        raise CheckpointError(
            f"{directory / MANIFEST_FILE}: the value model's ordinary tokens ({value_model.ordinary_count}) are not "
            f"the reference model's ({reference.ordinary_count}); make the value model from a backbone that shares the "
            "reference's tokenizer"
        )


def save_value_model(
    model: ValueModel,
    directory: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model`` as the new directory ``directory``, atomically.

    Raises CheckpointError when ``directory`` exists already: a published model is never rewritten.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory}: already exists; a value-model directory is written once")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        model.backbone.save_pretrained(staging / BACKBONE_DIRECTORY)
        tokenizer.save_pretrained(staging / BACKBONE_DIRECTORY)
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in model.head.state_dict().items()},
            staging / HEAD_FILE,
        )
        manifest = {
            "format_version": FORMAT_VERSION,
            "type": model.type,
            "distribution": model.distribution.to_config(),
            "tokenizer": asdict(fingerprint_tokenizer(tokenizer)),
            "provenance": dict(provenance or {}),
        }
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)
        _flush_tree(staging)
        _publish(staging, directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish(staging: Path, directory: Path) -> None:
    try:
        staging.rename(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: can't be put in place, perhaps another writer was faster ({error.strerror})"
        ) from error


def read_manifest(directory: Path | str) -> Manifest:
    """Read and check everything but the weights. Raises CheckpointError naming the file and the reason."""
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    entries = _read_json_object(path)
    version = entries.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}")
    if entries.get("type") not in get_args(ValueType):
        raise CheckpointError(f"{path}: type is {entries.get('type')!r}, allowed: {', '.join(get_args(ValueType))}")
    try:
        distribution = distribution_from_config(entries["distribution"])
        tokenizer = TokenizerFingerprint(**entries["tokenizer"])
        provenance = entries["provenance"]
        if not isinstance(provenance, dict):
            raise TypeError(f"provenance is a {type(provenance).__name__}, expected an object")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: distribution, tokenizer or provenance is wrong ({error})") from error
    config = _read_backbone_config(directory)
    return Manifest(
        type=entries["type"],
        distribution=distribution,
        tokenizer=tokenizer,
        provenance=provenance,
        max_positions=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
    )


def load_value_model(
    directory: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ValueModel:
    """Read the whole model, in evaluation mode. Raises CheckpointError naming the file and the reason."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    backbone = _load_backbone(directory / BACKBONE_DIRECTORY, dtype)
    if backbone.get_input_embeddings().weight.shape[0] != manifest.vocab_size:
        raise CheckpointError(f"{directory / BACKBONE_DIRECTORY}: embedding rows differ from vocab_size in config.json")
    head = _load_head(directory / HEAD_FILE, manifest, backbone.config.get_text_config().hidden_size, dtype)
    model = ValueModel(backbone, manifest.type, manifest.distribution, head)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{directory}: parameter {name} holds values that are not finite")
    return model.to(device).eval().requires_grad_(False)


def _load_backbone(directory: Path, dtype: torch.dtype) -> Any:
    try:
        # transformers sets torch's process-wide default dtype to the one it loads in, and a server loads while its
        # other thread computes. So load in float32, the default already, and cast the parameters; buffers such as
        # rotary frequencies stay in float32, as from_pretrained leaves them.
        backbone, report = AutoModel.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported instead, and refused here with their names
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise CheckpointError(f"{directory}: the backbone can't be loaded ({_one_line(error)})") from error
    _check_all_weights_used(directory, report)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    return backbone


def _check_all_weights_used(directory: Path, report: Mapping[str, Any]) -> None:
    faults = {
        "missing": sorted(report["missing_keys"]),
        "of another shape than config.json says": [
            f"{name} {list(found)}, not {list(expected)}" for name, found, expected in sorted(report["mismatched_keys"])
        ],
        # A whole language model is fine: its last layer isn't used.
        "unknown to config.json": sorted(key for key in report["unexpected_keys"] if not key.startswith("lm_head.")),
    }
    for fault, weights in faults.items():
        if weights:
            raise CheckpointError(f"{directory}: weights {fault}: {', '.join(weights[:3])}")


def _load_head(path: Path, manifest: Manifest, hidden_size: int, dtype: torch.dtype) -> nn.Linear:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read ({_one_line(error)})") from error
    rows = head_rows(manifest.type, manifest.distribution, manifest.vocab_size)
    expected = {"weight": (rows, hidden_size), "bias": (rows,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "weight" not in shapes or any(expected.get(name) != shape for name, shape in shapes.items()):
        raise CheckpointError(
            f"{path}: holds {shapes}, expected weight {expected['weight']} and perhaps bias {expected['bias']} for a "
            f"{manifest.type.upper()}-type {manifest.distribution.name} head over {manifest.vocab_size} tokens"
        )
    head = nn.Linear(hidden_size, rows, bias="bias" in tensors, dtype=dtype)
    head.load_state_dict(tensors)
    return head


def _read_backbone_config(directory: Path) -> PreTrainedConfig:
    path = directory / BACKBONE_DIRECTORY / "config.json"
    _read_json_object(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        ).get_text_config()
    except _UNUSABLE as error:
        raise CheckpointError(f"{path}: not a transformers config ({_one_line(error)})") from error
    for name in ("max_position_embeddings", "vocab_size", "hidden_size"):
        if not isinstance(getattr(config, name, None), int):
            raise CheckpointError(f"{path}: {name} is missing, the backbone must be a decoder-only language model")
    return config


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: holds a {type(entries).__name__}, expected an object")
    return entries


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _flush_tree(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        flush(path)
    flush(root)
