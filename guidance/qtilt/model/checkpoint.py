"""The value-model directory, format version 2: its only writer and its only reader.

::

    value_model.json      format_version, type, distribution, tokenizer (fingerprint), provenance; perhaps adapter
    backbone/             a plain transformers checkpoint (config, safetensors weights, tokenizer)
    head.safetensors      weight [A, hidden] (V-type) or [vocab·A, hidden] with row token·A + atom (Q-type);
                          A = 1 for Bernoulli; optional bias [A] or [vocab·A]

A low-rank value model is an update of another model's first layers, its base (low_rank.py)::

    value_model.json      also base (name, layers, sha256) and low_rank, the rank R
    backbone/             config.json only
    update.safetensors    for each projection NAME.A [R, inputs] and NAME.B [outputs, R], float32
    head.safetensors      as above

Version 1 had no low-rank value models; its directories are read too. A directory appears under its name in one rename,
complete and flushed to disk: a reader never sees half a model. Nothing is unpickled and no remote code is run.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtilt.method.distributions import ReturnDistribution, distribution_from_config
from qtilt.model.backbone import BackboneError, one_line, read_backbone, read_config, read_tokenizer
from qtilt.model.durable import flush
from qtilt.model.low_rank import Base, BaseModelError, BaseModels, LowRank, factor_shapes, projections
from qtilt.model.value_model import ValueModel, ValueType, embedding_rows, head_rows

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST_FILE = "value_model.json"
BACKBONE_DIRECTORY = "backbone"
UPDATE_FILE = "update.safetensors"
HEAD_FILE = "head.safetensors"


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
    base, rank: of a low-rank value model, else None. adapter: the LoRA adapter of the reference whose roll-outs it was
    fitted on, as the server names it; None for the reference itself.
    """

    type: ValueType
    distribution: ReturnDistribution
    tokenizer: TokenizerFingerprint
    provenance: dict[str, Any]
    max_positions: int
    vocab_size: int
    base: Base | None = None
    rank: int | None = None
    adapter: str | None = None


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
    if replace(value_model, added={}) != replace(reference, added={}):
        raise CheckpointError(
            f"{directory / MANIFEST_FILE}: the value model's ordinary tokens ({value_model.ordinary_count}) are not "
            f"the reference model's ({reference.ordinary_count}); make the value model from a backbone that shares the "
            "reference's tokenizer"
        )


def remove_unfinished(directory: Path) -> None:
    """Delete what a process that was killed while it saved ``directory`` has left beside it."""
    for left in directory.parent.glob(f"{_unfinished(directory)}*"):
        shutil.rmtree(left)


def save_value_model(
    model: ValueModel,
    directory: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Mapping[str, Any] | None = None,
    low_rank: LowRank | None = None,
    adapter: str | None = None,
) -> None:
    """Write ``model`` as the new directory ``directory``, atomically.

    low_rank: what to write in place of the backbone's weights and the tokenizer. adapter: see :class:`Manifest`.
    Raises CheckpointError when ``directory`` exists already: a published model is never rewritten.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory}: already exists; a value-model directory is written once")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_unfinished(directory), dir=directory.parent))
    try:
        if low_rank is None:
            model.backbone.save_pretrained(staging / BACKBONE_DIRECTORY)
            tokenizer.save_pretrained(staging / BACKBONE_DIRECTORY)
        else:
            model.backbone.config.save_pretrained(staging / BACKBONE_DIRECTORY)
            _save_tensors(_update_tensors(low_rank), staging / UPDATE_FILE)
        _save_tensors(model.head.state_dict(), staging / HEAD_FILE)
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "type": model.type,
            "distribution": model.distribution.to_config(),
            "tokenizer": asdict(fingerprint_tokenizer(tokenizer)),
            "provenance": dict(provenance or {}),
        }
        if low_rank is not None:
            manifest |= {"base": asdict(low_rank.base), "low_rank": low_rank.rank}
        if adapter is not None:
            manifest["adapter"] = adapter
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)
        _flush_tree(staging)
        _publish(staging, directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)


def _update_tensors(low_rank: LowRank) -> dict[str, Tensor]:
    return {
        f"{name}.{letter}": factor.float()
        for name, factors in low_rank.factors.items()
        for letter, factor in zip("AB", factors, strict=True)
    }


def _unfinished(directory: Path) -> str:
    """How the names of what is not yet ``directory`` begin."""
    return f".{directory.name}."


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
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this release reads {' and '.join(map(str, READABLE_VERSIONS))}"
        )
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
    adapter = entries.get("adapter")
    if not (adapter is None or (isinstance(adapter, str) and adapter)):
        raise CheckpointError(f"{path}: adapter is {adapter!r}, expected the name of a LoRA adapter")
    base, rank = _read_base(entries, path)
    config = _read_backbone_config(directory)
    if base is not None and base.layers != config.get_text_config().num_hidden_layers:
        raise CheckpointError(
            f"{path}: base.layers is {base.layers}, and {BACKBONE_DIRECTORY}/config.json has "
            f"{config.get_text_config().num_hidden_layers} layers"
        )
    return Manifest(
        type=entries["type"],
        distribution=distribution,
        tokenizer=tokenizer,
        provenance=provenance,
        max_positions=int(config.get_text_config().max_position_embeddings),
        vocab_size=int(config.get_text_config().vocab_size),
        base=base,
        rank=rank,
        adapter=adapter,
    )


def _read_base(entries: Mapping[str, Any], path: Path) -> tuple[Base | None, int | None]:
    base, rank = entries.get("base"), entries.get("low_rank")
    if base is None and rank is None:
        return None, None
    try:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"low_rank is {rank!r}, expected a whole number of at least 1")
        if not isinstance(base, dict):
            raise TypeError(f"base is a {type(base).__name__}, expected an object")
        return Base(**base), rank
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: base or low_rank is wrong ({error})") from error


def load_value_model(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bases: BaseModels | None = None,
) -> ValueModel:
    """Read the whole model, in evaluation mode; a low-rank one is merged with its base.

    bases: where bases are found and shared between versions; None: each where its manifest says, unshared.
    Raises CheckpointError naming the file and the reason.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.base is None:
        model = _value_model(directory, manifest, _load_whole_backbone(directory, manifest, dtype), dtype)
    else:
        with _names_manifest(directory):
            base = (bases or BaseModels()).get(manifest.base, _read_backbone_config(directory), dtype, device)
        low_rank = _load_update(directory / UPDATE_FILE, manifest, base.backbone)
        model = _value_model(directory, manifest, base.merged(low_rank), dtype)
        model.base = base
    shared = () if model.base is None else model.base.shared  # checked when the base was read
    for name, parameter in model.named_parameters():
        if name.removeprefix("backbone.") not in shared and not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{directory}: parameter {name} holds values that are not finite")
    return model.to(device).eval().requires_grad_(False)


def load_unmerged(directory: Path | str) -> tuple[ValueModel, LowRank]:
    """A low-rank value model as its base with its head, in float32, and the update that isn't merged: for a fit.

    Raises CheckpointError naming the file and the reason.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.base is None:
        raise CheckpointError(f"{directory / MANIFEST_FILE}: has no base, it isn't a low-rank value model")
    with _names_manifest(directory):
        backbone = BaseModels().read(manifest.base, _read_backbone_config(directory))
    low_rank = _load_update(directory / UPDATE_FILE, manifest, backbone)
    return _value_model(directory, manifest, backbone, torch.float32), low_rank


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a value model, a low-rank one's from where its base is. Raises CheckpointError."""
    directory = Path(directory)
    base = read_manifest(directory).base
    source = directory / BACKBONE_DIRECTORY if base is None else base.name
    try:
        return read_tokenizer(source)
    except BackboneError as error:
        raise CheckpointError(f"{directory / MANIFEST_FILE}: {source}: {error}") from error


@contextmanager
def _names_manifest(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseModelError as error:
        raise CheckpointError(f"{directory / MANIFEST_FILE}: {error}") from error


def _value_model(directory: Path, manifest: Manifest, backbone: PreTrainedModel, dtype: torch.dtype) -> ValueModel:
    hidden_size = backbone.config.get_text_config().hidden_size
    head = _load_head(directory / HEAD_FILE, manifest, hidden_size, dtype)
    return ValueModel(backbone, manifest.type, manifest.distribution, head)


def _load_whole_backbone(directory: Path, manifest: Manifest, dtype: torch.dtype) -> PreTrainedModel:
    folder = directory / BACKBONE_DIRECTORY
    try:
        backbone = read_backbone(folder, _read_backbone_config(directory), is_part=False, local_files_only=True)
    except BackboneError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if embedding_rows(backbone) != manifest.vocab_size:
        raise CheckpointError(f"{folder}: embedding rows differ from vocab_size in config.json")
    # Parameters only: buffers such as rotary frequencies stay in float32, as from_pretrained leaves them.
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    return backbone


def _load_update(path: Path, manifest: Manifest, backbone: PreTrainedModel) -> LowRank:
    assert manifest.base is not None, "only low-rank value models have an update"
    assert manifest.rank is not None, "and a rank"
    tensors = _load_tensors(path)
    expected = {
        f"{name}.{letter}": shape
        for name, layer in projections(backbone).items()
        for letter, shape in zip("AB", factor_shapes(layer, manifest.rank), strict=True)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        name = min(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"{path}: {name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')} for "
            f"rank {manifest.rank} and {manifest.base.layers} layers"
        )
    names = projections(backbone)
    factors = {name: (tensors[f"{name}.A"].float(), tensors[f"{name}.B"].float()) for name in names}
    return LowRank(manifest.base, manifest.rank, factors)


def _load_head(path: Path, manifest: Manifest, hidden_size: int, dtype: torch.dtype) -> nn.Linear:
    tensors = _load_tensors(path)
    rows = head_rows(manifest.type, manifest.distribution, manifest.vocab_size)
    expected = {"weight": (rows, hidden_size), "bias": (rows,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "weight" not in shapes or any(expected.get(name) != shape for name, shape in shapes.items()):
        raise CheckpointError(
            f"{path}: holds {shapes}, expected weight {expected['weight']} and perhaps bias {expected['bias']} for a "
            f"{manifest.type.upper()}-type {manifest.distribution.name} head over {manifest.vocab_size} tokens"
        )
    # Initial weights of its own would be drawn from the generator that a server samples with. A copy: what is read is
    # the file itself, and changes when that does.
    head = nn.Linear(hidden_size, rows, bias="bias" in tensors, device="meta")
    head.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
    return head


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read ({one_line(error)})") from error


def _read_backbone_config(directory: Path) -> PreTrainedConfig:
    path = directory / BACKBONE_DIRECTORY / "config.json"
    _read_json_object(path)
    try:
        config = read_config(path.parent)
    except BackboneError as error:
        raise CheckpointError(f"{path}: not a transformers config ({error})") from error
    for name in ("max_position_embeddings", "vocab_size", "hidden_size"):
        if not isinstance(getattr(config.get_text_config(), name, None), int):
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


def _flush_tree(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        flush(path)
    flush(root)
