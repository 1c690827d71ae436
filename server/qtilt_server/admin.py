"""Who may change what the server serves: who has the admin key, or without one whoever is on the server's machine."""

import hashlib
import ipaddress
import os
import secrets
from argparse import Namespace
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from starlette.requests import Request

from qtilt_server.errors import ForbiddenError
from qtilt_server.flags import ADMIN_KEY_VARIABLE
from vllm import envs


@dataclass(frozen=True)
class AdminAccess:
    """key: None if there is none."""

    key: str | None = field(repr=False)

    def check(self, request: Request) -> None:
        """Raises ForbiddenError for a request that may not change anything."""
        if self.key is None:
            if not _is_of_this_machine(request):
                raise ForbiddenError(
                    f"{request.url.path} changes what is served: without an admin key (--admin-key) it answers to the "
                    "server's own machine only"
                )
        elif not _is_bearer_of(self.key, request.headers.get("authorization", "")):
            raise ForbiddenError(f"{request.url.path} changes what is served, and needs the admin key as bearer token")


def hide_admin_key(args: Namespace, key: str | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep the key where vLLM logs no settings. Whoever has it may do all that others may: it is an API key, too."""
    args.admin_key = None
    if key is None:
        return
    environ[ADMIN_KEY_VARIABLE] = key
    keys = [each for each in (args.api_key or [envs.VLLM_API_KEY]) if each]
    if keys:
        args.api_key = [*keys, key]


def _is_of_this_machine(request: Request) -> bool:
    """Also over a Unix socket, where clients have no address."""
    if request.client is None:
        return True
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def _is_bearer_of(key: str, authorization: str) -> bool:
    """Without telling by its time how much of a key is right."""
    scheme, _, given = authorization.partition(" ")
    given_hash, wanted_hash = (hashlib.sha256(text.encode()).digest() for text in (given, key))
    return scheme.lower() == "bearer" and secrets.compare_digest(given_hash, wanted_hash)
