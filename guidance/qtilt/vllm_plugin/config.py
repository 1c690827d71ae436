"""What the launcher tells the worker: `vllm_config.additional_config["qtilt"]`. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

ADDITIONAL_CONFIG_KEY = "qtilt"
PROCESSOR = "qtilt.vllm_plugin.processor:GuidanceProcessor"
"""What `--logits-processors` is given."""
WORKER_EXTENSION = "qtilt.vllm_plugin.worker_extension.GuidanceWorkerExtension"
"""What `worker_extension_cls` is given."""
VALUE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginConfig:
    """The worker's settings, the same for every request of a server.

    Raises ValueError for a value outside its range.
    """

    value_models: dict[str, str] = field(default_factory=dict)
    """Name -> absolute directory of the value model that the name means at start."""
    versions: dict[str, int] = field(default_factory=dict)
    """Name -> which version of it that is; 1 of all others."""
    max_top_k: int = 64
    """Most candidates a request may ask for."""
    value_dtype: str = "auto"
    """Weights and caches of the value models: one of VALUE_DTYPES; "auto" is the reference model's dtype."""
    kv_fraction: float | None = None
    """Memory of a value cache, as a fraction of what all sequences need at full length: above 0 and at most 1."""
    kv_tokens: int | str | None = None
    """How many tokens a value cache holds; "auto": as many as vLLM's own will. Without this and a fraction: "auto" on
    GPUs, else all that can be there."""
    backbone: str | None = None
    """Directory or hub id of what value models to come are made of: memory for two of them is held from the start."""
    backbone_layers: int | None = None
    """How many of its first layers they have; all if None."""
    behind_server: bool = False
    """Whether qtilt-server has checked each request, and takes what is on record of it."""

    def __post_init__(self) -> None:
        if not isinstance(self.value_models, dict):
            raise ValueError(f"value_models must map names to directories, got {self.value_models!r}")
        for name, path in self.value_models.items():
            if not isinstance(name, str) or not name or "@" in name:
                raise ValueError(f"a value model's name must be a non-empty string without '@', got {name!r}")
            if not isinstance(path, str) or not PurePath(path).is_absolute():
                raise ValueError(f"the directory of value model {name!r} must be an absolute path, got {path!r}")
        if not isinstance(self.versions, dict) or not all(map(_is_positive, self.versions.values())):
            raise ValueError(f"versions must map names to integers of at least 1, got {self.versions!r}")
        if isinstance(self.max_top_k, bool) or not isinstance(self.max_top_k, int) or self.max_top_k < 1:
            raise ValueError(f"max_top_k must be an integer of at least 1, got {self.max_top_k!r}")
        if self.value_dtype not in VALUE_DTYPES:
            raise ValueError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {self.value_dtype!r}")
        if self.kv_fraction is not None:
            if isinstance(self.kv_fraction, bool) or not isinstance(self.kv_fraction, int | float):
                raise ValueError(f"kv_fraction must be a number, got {self.kv_fraction!r}")
            if not 0 < self.kv_fraction <= 1:
                raise ValueError(f"kv_fraction must be above 0 and at most 1, got {self.kv_fraction!r}")
            if self.kv_tokens is not None:
                raise ValueError("kv_fraction and kv_tokens both say how large a value cache is: give one of them")
        if self.kv_tokens not in (None, "auto") and not _is_positive(self.kv_tokens):
            raise ValueError(f"kv_tokens must be 'auto' or an integer of at least 1, got {self.kv_tokens!r}")
        if self.backbone is not None and (not isinstance(self.backbone, str) or not self.backbone):
            raise ValueError(f"backbone must be a directory or a hub id, got {self.backbone!r}")
        if self.backbone_layers is not None and not _is_positive(self.backbone_layers):
            raise ValueError(f"backbone_layers must be an integer of at least 1, got {self.backbone_layers!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the value of `additional_config["qtilt"]`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PluginConfig:
        """Inverse of `to_dict`; ValueError names an unknown key."""
        unknown = set(config) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key(s) {sorted(unknown)} in additional_config[{ADDITIONAL_CONFIG_KEY!r}]")
        return cls(**config)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> PluginConfig:
        """The part of vLLM's `additional_config` that is ours; ValueError when it isn't there."""
        ours = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if not isinstance(ours, Mapping):
            raise ValueError(
                f"additional_config[{ADDITIONAL_CONFIG_KEY!r}] is missing: start the server with qtilt-server, "
                f"or pass PluginConfig(...).to_dict() under that key"
            )
        return cls.from_dict(ours)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
