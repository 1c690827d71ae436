"""What can go wrong with a server, told apart by what is to be done about it.

ServerError               can't be reached, refuses, or isn't a guided server
├─ PromptRefusedError     the prompt is left out
├─ VersionGoneError       the value model is published again
├─ ServerBusyError        later it will do
└─ ServerAwayError        the loop waits until the server is back
   └─ RequestFailedError  … unless it is there: then the prompt is left out
"""

from http import HTTPStatus

import openai

from qtilt_trainer.config import ServerConfig
from qtilt_trainer.redaction import without_url_secrets

GOES_ON = "what is stored is kept, the same command goes on from there"


class ServerError(RuntimeError):
    """The server can't be reached, refuses, or isn't a guided server. The message says what to do."""


class PromptRefusedError(ServerError):
    """HTTP 400: this prompt is too long, or can't be asked for another reason of its own."""


class VersionGoneError(ServerError):
    """HTTP 400: the server doesn't hold the value-model version that was asked for."""


class ServerBusyError(ServerError):
    """HTTP 409: an older version still guides running requests; later it will do."""


class ServerAwayError(ServerError):
    """No connection, a 5xx or a completion broken off: the server may have been restarted."""


class RequestFailedError(ServerAwayError):
    """HTTP 500: the server went down with this request, or the request itself has something that can't be computed."""


def server_error(error: openai.APIError, config: ServerConfig) -> ServerError:
    """What the openai client raised, in our words."""
    url, tries = without_url_secrets(config.url), config.retries + 1
    match error:
        case openai.APITimeoutError():
            return ServerError(
                f"{url} did not answer within {config.timeout:g} s, {tries} times: raise server.timeout or lower "
                f"server.concurrency; {GOES_ON}"
            )
        case openai.APIConnectionError():
            reason = error.__cause__ or error
            return ServerAwayError(
                f"no server answers at {url} ({tries} tries, {reason}): start qtilt-server there; {GOES_ON}"
            )
        case openai.NotFoundError():
            return ServerError(f"{url} answered 404: is it a qtilt-server, and is server.model right? {error}")
        case openai.APIStatusError():
            kind = _kind(error.status_code, str(error.param or ""))
            return kind(f"{url} answered {error.status_code}: {_said(error)}")
        case _:
            return ServerError(f"what answers at {url} is no qtilt-server ({error}): start one there")


def _kind(status: int, parameter: str) -> type[ServerError]:
    if status == HTTPStatus.BAD_REQUEST:
        if parameter == "guidance.value_model":
            return VersionGoneError
        # Our other fields are the same in every request: nothing a prompt can help.
        return ServerError if parameter.startswith("guidance") else PromptRefusedError
    if status == HTTPStatus.CONFLICT:
        return ServerBusyError
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return RequestFailedError
    return ServerAwayError if status > HTTPStatus.INTERNAL_SERVER_ERROR else ServerError


def _said(error: openai.APIStatusError) -> str:
    """What the server says is wrong, without the client's own words around it."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return str(said or error.message)
