"""The entry point that vLLM's API server loads: adds the guard and the routes, then checks that guidance is live."""

import asyncio
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY
from starlette.datastructures import State

from qtilt.checkpoint import Manifest
from qtilt.model.digest import content_digest
from qtilt.vllm_plugin.compatibility import Reference
from qtilt_server.admin import AdminAccess
from qtilt_server.admission import Admission
from qtilt_server.details import TokenTexts
from qtilt_server.errors import GuidanceRequestError, StartupError, error_response
from qtilt_server.failures import FailureWatch
from qtilt_server.flags import GuidanceFlags
from qtilt_server.guard import GuidanceGuard
from qtilt_server.metrics import GuidanceMetrics
from qtilt_server.publication import Publisher, resident_version
from qtilt_server.reference import check_value_models, reference_of
from qtilt_server.registry import ValueModelRegistry
from qtilt_server.remembered import RegistryFile, Restored, come_back
from qtilt_server.request_log import RequestLog
from qtilt_server.routes import completions, guidance, models, playground, scoring
from qtilt_server.sampling_check import RolloutSamplingCheck
from qtilt_server.scoring import Scorer
from qtilt_server.state import GuidanceState
from qtilt_server.worker import GuidanceWorker, WorkerError
from qtilt_server.worker_figures import AskWorkerBeforeScrape, WorkerFigures

logger = logging.getLogger("vllm.qtilt_server")


class GuidanceEndpoints:
    """vLLM's EndpointPlugin protocol."""

    name = "qtilt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(GuidanceGuard)
        app.add_middleware(AskWorkerBeforeScrape)
        app.add_exception_handler(GuidanceRequestError, _answer_refusal)
        app.include_router(completions.router)
        app.include_router(guidance.router)
        app.include_router(models.router)
        app.include_router(scoring.router)
        app.include_router(playground.router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Raises StartupError when guidance isn't live in the worker or a value model doesn't fit."""
        if not hasattr(args, "guidance_eta"):
            raise StartupError("the qtilt endpoints need their own launcher: start the server with qtilt-server")
        started = GuidanceFlags.from_namespace(args)
        flags = await asyncio.to_thread(come_back, started)
        reference = reference_of(engine_client.vllm_config.model_config)
        manifests = check_value_models(flags.value_models, reference)
        worker = GuidanceWorker(engine_client)
        await _check_live(worker, flags)
        metrics = GuidanceMetrics()
        registry = await asyncio.to_thread(_registry, flags, manifests, reference, metrics)
        file = None if flags.registry is None else RegistryFile(flags.registry, started.value_models)
        figures = WorkerFigures(worker, registry)
        REGISTRY.register(figures)
        state.guidance = GuidanceState(
            admin=AdminAccess(flags.admin_key),
            admission=Admission(flags, registry, engine_client.vllm_config.speculative_config is not None),
            publisher=Publisher(registry, worker, reference, metrics, flags.value_model_root, flags.swap_timeout, file),
            worker=worker,
            watch=FailureWatch(worker),
            sampling_check=RolloutSamplingCheck(),
            metrics=metrics,
            texts=TokenTexts(engine_client.renderer.get_tokenizer()),
            scorer=Scorer(worker),
            figures=figures,
            log=None if flags.log is None else RequestLog.open(flags.log),
        )
        if args.shutdown_timeout:
            # Its engine takes no calls while it drains, so the record of a guided answer can't be had any more.
            logger.warning("--shutdown-timeout lets only unguided requests finish: guided ones then end in an error")
        logger.info("guidance is live: %s", ", ".join(version.label for version in registry) or "no value model yet")


async def _check_live(worker: GuidanceWorker, flags: GuidanceFlags) -> None:
    """vLLM can swallow a plugin's failure, and the server would answer unguided."""
    try:
        described = await worker.describe()
    except WorkerError as error:
        raise StartupError(f"guidance is not live in the worker ({error}); see the log above") from error
    loaded = {entry["name"] for entry in described["value_models"]}
    missing = sorted(set(flags.value_models) - loaded)
    if missing:
        raise StartupError(f"the worker has not loaded value model(s) {', '.join(missing)}; see the log above")


def _registry(
    flags: GuidanceFlags, manifests: dict[str, Manifest], reference: Reference, metrics: GuidanceMetrics
) -> ValueModelRegistry:
    registry = ValueModelRegistry()
    for name, directory in flags.value_models.items():
        path, digest = _shown(directory, flags.value_model_root), content_digest(directory)
        restored = flags.restored.get(name) or Restored(version=1, newest=1, digest=digest)
        version = resident_version(name, restored.version, path, digest, manifests[name], reference)
        registry.restore(version, restored.newest)
        metrics.active(name, version.version)
    return registry


def _shown(directory: Path, root: Path | None) -> str:
    """As clients may name it when it is below the root, else the whole path."""
    return str(directory.relative_to(root) if root and directory.is_relative_to(root) else directory)


async def _answer_refusal(_request: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, GuidanceRequestError)
    return error_response(refusal)
