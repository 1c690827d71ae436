"""Keeps secrets out of everything that is written: settings, logs, error messages."""

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(^|[_-]|(?-i:(?<=[a-z])(?=[A-Z])))((api|access|secret|private|auth)[_-]?key|token|password|passwd|passphrase|pwd"
    r"|secret|bearer|auth|authorization|credentials?|headers?|cookies?)$",
    re.IGNORECASE,
)
"""Names of fields that are secret; `max_tokens` and `answer_key` aren't."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def redacted(value: Any, name: str = "") -> Any:
    """The same JSON-like value with secret fields, and secrets inside URLs, replaced by ***."""
    if SECRET_NAME.search(name) and value not in (None, "", {}, []):
        return dict.fromkeys(value, HIDDEN) if isinstance(value, dict) else HIDDEN
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return without_url_secrets(value) if isinstance(value, str) else value


def without_url_secrets(text: str) -> str:
    """A text with the user, the password and secret parameters of every URL in it replaced by ***."""
    return URL.sub(lambda match: _without_secrets(match.group()), text)


def _without_secrets(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # Half a URL, such as one with an unbalanced bracket.
        return HIDDEN if "@" in url else url
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{HIDDEN}@{host}" if "@" in parts.netloc else host
    query = parts.query
    if any(SECRET_NAME.search(key) for key, _ in parse_qsl(query)):
        shown = [(key, HIDDEN if SECRET_NAME.search(key) else value) for key, value in parse_qsl(query)]
        query = urlencode(shown, safe="*")
    return urlunsplit((parts.scheme, netloc, parts.path, query, parts.fragment))
