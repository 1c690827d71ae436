"""``GET /playground``: a page in which people try what guidance does; it asks the same routes as everyone.

Not below /v1, so no key is needed to load it: a browser that opens an address sends none. The page is the same for
all and holds no secret; what it shows it asks for with the key that is typed into it.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse, Response

import qtilt_server
from qtilt_server.errors import NotFoundError

DIRECTORY = Path(qtilt_server.__file__).parent / "playground"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Nothing but these files and this server's routes; no markup that a script makes of a text; no form that is sent by
    # the browser itself, with the key in the address.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The files of one version belong together.
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/playground")
async def page() -> Response:
    """The page itself. Its addresses are relative, so it works below a prefix that a proxy takes away."""
    return _answer(DIRECTORY / "index.html")


@router.get("/playground/")
async def page_with_a_slash() -> Response:
    """Relative too, unlike the redirect that there would be otherwise."""
    return RedirectResponse("../playground")


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    """A file of the page. Raises NotFoundError for all names but theirs, whatever those may mean as paths."""
    files = {file.name: file for file in DIRECTORY.iterdir() if file.suffix in MEDIA_TYPES}
    if name not in files:
        raise NotFoundError(f"the playground has no file {name!r}")
    return _answer(files[name])


def _answer(file: Path) -> Response:
    return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)
