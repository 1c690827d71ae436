"""``/v1/completions`` and ``/v1/chat/completions``: vLLM's handlers, watched where a request asks for guidance."""

import copy
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.api_router import chat, create_chat_completion
from vllm.entrypoints.openai.completion.api_router import completion, create_completion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from qtilt_server.best_of import keep_best
from qtilt_server.errors import GuidanceRequestError, NotFoundError
from qtilt_server.guard import SESSIONS
from qtilt_server.named_models import AnsweringAs
from qtilt_server.named_models import split as split_name
from qtilt_server.requests import GuidedChatCompletionRequest, GuidedCompletionRequest, GuidedRequest
from qtilt_server.responses import GuidedChatResponse, GuidedCompletionResponse
from qtilt_server.schema import GuidanceRequest
from qtilt_server.session import GuidedEngine, GuidedSession
from qtilt_server.state import GuidanceState
from qtilt_server.streaming import add_guidance, header_of, say_guidance

LOAD_METRICS_FORMAT_HEADER = "endpoint-load-metrics-format"

router = APIRouter(
    dependencies=[Depends(validate_json_request)],
    responses={
        HTTPStatus.BAD_REQUEST.value: {"model": ErrorResponse},
        HTTPStatus.NOT_FOUND.value: {"model": ErrorResponse},
        HTTPStatus.INTERNAL_SERVER_ERROR.value: {"model": ErrorResponse},
    },
)


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: whole, or as a stream."""
    return {HTTPStatus.OK.value: {"model": model, "content": {"text/event-stream": {}}}}


@router.post("/v1/completions", response_model=None, responses=_answers(GuidedCompletionResponse))
async def guided_completion(request: GuidedCompletionRequest, raw_request: Request) -> Any:
    """vLLM's own route unless the request asks for guidance."""
    named = _take_from_name(request, raw_request)
    if request.guidance is None:
        return await create_completion(request, raw_request)
    return await _answer(request, raw_request, completion(raw_request), "create_completion", named=named)


@router.post("/v1/chat/completions", response_model=None, responses=_answers(GuidedChatResponse))
async def guided_chat_completion(request: GuidedChatCompletionRequest, raw_request: Request) -> Any:
    """vLLM's own route unless the request asks for guidance."""
    named = _take_from_name(request, raw_request)
    if request.guidance is None:
        return await create_chat_completion(request, raw_request)
    return await _answer(request, raw_request, chat(raw_request), "create_chat_completion", named=named)


def _take_from_name(request: GuidedRequest, raw_request: Request) -> bool:
    """Whether the request's model names a value model; its model is then the one of vLLM's, guided by that.

    Raises GuidanceRequestError when its guidance names another one.
    """
    split = split_name(request.model, raw_request.app.state.openai_serving_models)
    if split is None:
        return False
    block = request.guidance or GuidanceRequest()
    if block.value_model not in (None, split[1]):
        raise GuidanceRequestError(
            f"guidance.value_model is {block.value_model!r}, and the model {request.model!r} names another: drop one",
            "guidance.value_model",
        )
    request.model, request.guidance = split[0], block.model_copy(update={"value_model": split[1]})
    return True


@with_cancellation  # type: ignore[untyped-decorator]
@load_aware_call  # type: ignore[untyped-decorator]
async def _answer(request: GuidedRequest, raw_request: Request, handler: Any, method: str, *, named: bool) -> Response:
    """What vLLM's route does, with a handler whose engine is watched, and the guidance said in the answer.

    named: the model named the value model, and the answer's is to do so too.
    """
    if handler is None:
        raise NotImplementedError(f"the model does not support {raw_request.url.path}")
    request.refuse_impossible()
    kept, best_of = request.n or 1, request.guidance.best_of if request.guidance is not None else None
    request.n = best_of or request.n
    session = _open_session(request, raw_request, named=named)
    watched = _watched(handler, session, raw_request)
    if named:
        watched.models = AnsweringAs(handler.models, request.model or "", session.version)
    result = await getattr(watched, method)(request, raw_request)
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), status_code=result.error.code)
    if not request.stream:
        content = add_guidance(result.model_dump(), session)
        if best_of is not None:
            content = await keep_best(content, session, raw_request.app.state.guidance.scorer, kept)
        load = metrics_header(raw_request.headers.get(LOAD_METRICS_FORMAT_HEADER, ""))
        return JSONResponse(content, headers={**(load or {}), **header_of(session)})
    interval = float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))
    events = with_sse_keep_alive(say_guidance(result, session), interval)
    return StreamingResponse(events, media_type="text/event-stream", headers=header_of(session))


def _open_session(request: GuidedRequest, raw_request: Request, *, named: bool) -> GuidedSession:
    """Admit the request. The guard, which sees its end whatever happens, closes the session."""
    state: GuidanceState = raw_request.app.state.guidance
    assert request.guidance is not None
    try:
        params, lease = state.admission.admit(request.guidance)
    except GuidanceRequestError as refusal:
        if named and refusal.parameter == "guidance.value_model":
            model = f"{request.model}:{request.guidance.value_model}"
            raise NotFoundError(f"the model {model!r} does not exist ({refusal})", "model") from refusal
        raise
    session = GuidedSession(
        params,
        lease,
        state.worker,
        state.watch,
        state.metrics,
        state.texts,
        choices_per_prompt=request.n or 1,
        returns_tokens=request.returns_tokens,
    )
    raw_request.scope[SESSIONS].append(session)
    if state.log is not None:
        raw_request.scope[SESSIONS].append(state.log.follow(session, raw_request))
    state.metrics.request(params.value_model, params.version, params.method)
    return session


def _watched(handler: Any, session: GuidedSession, raw_request: Request) -> Any:
    """The handler as it is, with an engine of its own for this one request."""
    state: GuidanceState = raw_request.app.state.guidance
    watched = copy.copy(handler)
    check_sampling = partial(state.sampling_check, session.version)
    watched.engine_client = GuidedEngine(handler.engine_client, session, check_sampling)
    return watched
