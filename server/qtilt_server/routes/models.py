"""``GET /v1/models``: vLLM's, and what they are as each value model guides them."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from qtilt_server.named_models import cards
from qtilt_server.state import GuidanceState

router = APIRouter()


@router.get("/v1/models")
async def list_models(raw_request: Request) -> JSONResponse:
    """Every name that a request to a guided route may give as its ``model``; others take vLLM's own only."""
    state: GuidanceState = raw_request.app.state.guidance
    models = raw_request.app.state.openai_serving_models
    listed = await models.show_available_models()
    listed.data.extend(cards(state.admission.registry, models))
    return JSONResponse(listed.model_dump())
