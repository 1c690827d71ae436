"""Value models as models: clients that can choose nothing but a model reach guidance by its name.

``REFERENCE:NAME`` is the reference, or the LoRA adapter, as the active version of value model NAME guides it with the
server's defaults; ``REFERENCE:NAME@VERSION`` as that version does.
"""

from collections.abc import Iterator
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.lora.request import LoRARequest

from qtilt_server.registry import ResidentVersion, ValueModelRegistry

OWNER = "qtilt"
"""Who owns such a model, as its card says."""


def split(model: str | None, models: OpenAIServingModels) -> tuple[str, str] | None:
    """The model of vLLM's that a name begins with and the value model that it goes on with; None: it names none."""
    served = [*(base.name for base in models.base_model_paths), *models.lora_requests]
    if model is None or model in served:
        return None
    begins = [name for name in served if model.startswith(f"{name}:")]
    name = max(begins, key=len, default=None)
    return None if name is None else (name, model[len(name) + 1 :])


def cards(registry: ValueModelRegistry, models: OpenAIServingModels) -> Iterator[ModelCard]:
    """Of each value model, and of each of its versions that takes requests."""
    for status in registry.describe():
        for version in status.versions:
            policy = version.adapter if version.adapter is not None else models.base_model_paths[0].name
            if version.state == "draining" or (version.adapter is not None and policy not in models.lora_requests):
                continue
            names = [f"{status.name}@{version.version}"]
            if version.state == "active":
                names.insert(0, status.name)
            for name in names:
                yield ModelCard(
                    id=f"{policy}:{name}",
                    owned_by=OWNER,
                    root=version.path,
                    parent=policy,
                    max_model_len=models.model_config.max_model_len,
                    permission=[ModelPermission()],
                )


class AnsweringAs:
    """vLLM's models for one request whose answer is to name ``model`` and the version that guides it."""

    def __init__(self, models: OpenAIServingModels, model: str, version: ResidentVersion) -> None:
        self._models = models
        self._name = f"{model}:{version.label}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """What the answer calls the model."""
        return self._name
