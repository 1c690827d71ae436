"""What the server refuses, and how it says so.

StartupError              the launcher prints it as one line and exits with code 2
GuidanceRequestError      HTTP 400: the request, or the directory it names, can't be used
├─ ForbiddenError         HTTP 403: it changes what is served, and whoever sent it may not
├─ NotFoundError          HTTP 404: its model, or its path, names a value model that isn't there
├─ ConflictError          HTTP 409: what is served now doesn't allow it
│  └─ SwapTimeoutError    the version that has to go still guides running requests
└─ UnavailableError       HTTP 503: the worker can't do it now

What fails while it runs is GuidanceFailedError, HTTP 500, in failures.py: an error of vLLM's, answered by vLLM.
"""

from http import HTTPStatus

from fastapi.responses import JSONResponse


class StartupError(Exception):
    """The server must not start; the message says what is wrong and what to do."""


class GuidanceRequestError(ValueError):
    """The client can put it right; ``parameter`` names the field concerned."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class ForbiddenError(GuidanceRequestError):
    """A request that changes what is served, of somebody who may not."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(GuidanceRequestError):
    """A ``model``, or a path, that names no value model of this server."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(GuidanceRequestError):
    """What is served now doesn't allow it; the message says what has to be done before."""

    status = HTTPStatus.CONFLICT


class SwapTimeoutError(ConflictError):
    """The version that has to go didn't drain in time; trying again later is right."""


class UnavailableError(GuidanceRequestError):
    """Nothing is wrong with the request; the message is the worker's."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


def error_response(refusal: GuidanceRequestError) -> JSONResponse:
    """The answer in the OpenAI error shape."""
    error = {
        "message": str(refusal),
        "type": refusal.status.phrase,
        "param": refusal.parameter,
        "code": refusal.status.value,
    }
    return JSONResponse({"error": error}, status_code=refusal.status)
