"""The routes below ``/v1/guidance``: what is loaded, and what changes it; below /v1, so that --api-key guards them."""

import asyncio
from http import HTTPStatus

from fastapi import APIRouter, Depends, Request, Response

from qtilt_server.schema import ActivateRequest, GuidanceStatus, PublishedVersion, PublishRequest, Readiness
from qtilt_server.state import GuidanceState

router = APIRouter()


@router.get("/v1/guidance")
async def guidance_status(raw_request: Request) -> GuidanceStatus:
    """What is loaded, the versions and the defaults."""
    return _state(raw_request).admission.status()


@router.get("/v1/guidance/ready", responses={HTTPStatus.SERVICE_UNAVAILABLE.value: {"model": Readiness}})
async def readiness(raw_request: Request, response: Response) -> Readiness:
    """Whether requests can be guided, for those who send them here."""
    registry = _state(raw_request).admission.registry
    active = [version.label for version in registry if registry.is_active(version) and not version.draining]
    is_ready = bool(active) and not raw_request.app.state.engine_client.errored
    if not is_ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return Readiness(ready=is_ready, active=active)


def _by_admin(raw_request: Request) -> None:
    _state(raw_request).admin.check(raw_request)


@router.post("/v1/guidance/value_models", dependencies=[Depends(_by_admin)])
async def publish_value_model(request: PublishRequest, raw_request: Request) -> PublishedVersion:
    """Load a directory as the next version of a name while requests run."""
    # Shielded: a client that goes away must not leave a swap half done.
    return await asyncio.shield(asyncio.ensure_future(_state(raw_request).publisher.publish(request)))


@router.post("/v1/guidance/value_models/{name}/activate", dependencies=[Depends(_by_admin)])
async def activate_version(name: str, request: ActivateRequest, raw_request: Request) -> GuidanceStatus:
    """Have the name mean a version that is loaded, the one before say."""
    state = _state(raw_request)
    await state.publisher.activate(name, request.version)
    return state.admission.status()


@router.delete("/v1/guidance/value_models/{name}/{version}", dependencies=[Depends(_by_admin)])
async def unload_version(name: str, version: int, raw_request: Request) -> GuidanceStatus:
    """Drop a version once no request uses it."""
    state = _state(raw_request)
    await asyncio.shield(asyncio.ensure_future(state.publisher.unload(name, version)))
    return state.admission.status()


def _state(raw_request: Request) -> GuidanceState:
    state: GuidanceState = raw_request.app.state.guidance
    return state
