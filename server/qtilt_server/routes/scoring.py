"""``/v1/guidance/score``: what a value model says of completions that are there already."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from qtilt_server.errors import GuidanceRequestError
from qtilt_server.schema import ScoredCompletion, ScoreRequest, ScoreResponse, ScoreUsage
from qtilt_server.state import GuidanceState

if TYPE_CHECKING:
    from qtilt.vllm_plugin.scoring import TextValues

MOST_TOKENS = 2**16
"""Of a request's completions: so many distributions can be answered."""

router = APIRouter(dependencies=[Depends(validate_json_request)])


class _RefusedByVllmError(Exception):
    def __init__(self, answer: ErrorResponse) -> None:
        self.answer = answer


@router.post(
    "/v1/guidance/score",
    response_model=ScoreResponse,
    responses={HTTPStatus.BAD_REQUEST.value: {"model": ErrorResponse}},
)
@with_cancellation  # type: ignore[untyped-decorator]
async def score(request: ScoreRequest, raw_request: Request) -> Any:
    """The return distributions of completions' tokens, by the value model that is asked for."""
    try:
        prompt, completions = await _tokens(request, raw_request)
    except _RefusedByVllmError as refused:
        return JSONResponse(refused.answer.model_dump(), status_code=refused.answer.error.code)
    state: GuidanceState = raw_request.app.state.guidance
    _check(prompt, completions, raw_request.app.state.openai_serving_models.model_config)
    lease = state.admission.registry.lease(request.value_model, "value_model")
    try:
        scored = await state.scorer.score(lease.version, prompt, completions, wants_all=request.distributions)
    finally:
        lease.release()
    return ScoreResponse(
        value_model=lease.version.label,
        support=scored[0]["support"],
        choices=[
            _choice(index, completion, values, with_distributions=request.distributions)
            for index, (completion, values) in enumerate(zip(completions, scored, strict=True))
        ],
        usage=ScoreUsage.of(len(prompt), sum(map(len, completions))),
    )


async def _tokens(request: ScoreRequest, raw_request: Request) -> tuple[list[int], list[list[int]]]:
    """Of the prompt, and of each completion: as vLLM's own routes would take them."""
    if request.messages is not None:
        messages: list[Any] = request.messages  # vLLM checks them
        prompt = await _tokenize(TokenizeChatRequest(messages=messages), raw_request)
    elif isinstance(request.prompt, str):
        prompt = await _tokenize(TokenizeCompletionRequest(prompt=request.prompt), raw_request)
    else:
        prompt = list(request.prompt or [])
    return prompt, [
        await _tokenize(TokenizeCompletionRequest(prompt=each, add_special_tokens=False), raw_request)
        if isinstance(each, str)
        else list(each)
        for each in request.completions
    ]


async def _tokenize(request: TokenizeChatRequest | TokenizeCompletionRequest, raw_request: Request) -> list[int]:
    answer = await raw_request.app.state.serving_tokenization.create_tokenize(request, raw_request)
    if isinstance(answer, ErrorResponse):
        raise _RefusedByVllmError(answer)
    return list(answer.tokens)


def _check(prompt: Sequence[int], completions: Sequence[Sequence[int]], model_config: Any) -> None:
    """Raises GuidanceRequestError for what can't be scored."""
    vocabulary, longest = model_config.get_vocab_size(), model_config.max_model_len
    total = sum(map(len, completions))
    if total > MOST_TOKENS:
        raise GuidanceRequestError(
            f"completions have {total} tokens together, allowed: {MOST_TOKENS} in one request", "completions"
        )
    texts = {"prompt": prompt} | {f"completions[{index}]": each for index, each in enumerate(completions)}
    for field, token_ids in texts.items():
        if not token_ids:
            raise GuidanceRequestError(f"{field} has no token, allowed: 1 at least", field)
        unknown = next((token for token in token_ids if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise GuidanceRequestError(f"{field} has the token id {unknown}, allowed: 0 to {vocabulary - 1}", field)
        length = len(token_ids) + (len(prompt) if field != "prompt" else 0)
        if length > longest:
            raise GuidanceRequestError(
                f"{field} ends at token {length}, allowed: {longest} tokens with the prompt (--max-model-len)", field
            )


def _choice(index: int, token_ids: list[int], scored: "TextValues", *, with_distributions: bool) -> ScoredCompletion:
    return ScoredCompletion(
        index=index,
        token_ids=token_ids,
        values=scored["values"],
        distributions=scored["distributions"] if with_distributions else None,
        value=scored["values"][-1],
        distribution=scored["distributions"][-1],
    )
