"""The application: the table of routes, the page and its files, and what a stranger path gets.

Nothing answers a page of another site unless `cors` names it, and the page loads nothing from
elsewhere: its policy forbids it.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as At
from starlette.types import ASGIApp, Receive, Scope, Send

from pylora.web import wire
from pylora.web.house import House
from pylora.web.problem import Problem
from pylora.web.routes import ROUTES, guarded

_KINDS = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".html": "text/html",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_WHOLE = re.compile(r"https?://[^/?#]+(/.*)?", re.I | re.S)
_SAFE = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Targets:
    """What a request is about. A whole address, as proxies send it, is the path in it: RFC 9112 has
    every server take that. `OPTIONS *` is about the server; what else is no path is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, answer = scope["path"], self.app
        whole = _WHOLE.fullmatch(path)
        if whole is not None:
            rest = whole[1] or "/"
            scope = {**scope, "path": rest, "raw_path": quote(rest).encode()}
        elif path == "*" and scope["method"] == "OPTIONS":
            answer = Response(status_code=204, headers={"Allow": "GET, HEAD, POST"})
        elif not path.startswith("/"):
            said = f"the target of a request is a path that begins with '/', got {path[:200]!r}"
            answer = wire.refused(Problem(400, said, code="bad_http"))
        await answer(scope, receive, send)


def application(house: House, cors: Sequence[str] = (), page: bool = True) -> Starlette:
    """The ASGI application of a server. `cors`: origins whose pages may ask, ("*",) for all."""
    paths: dict[str, list[At]] = {}
    for route in ROUTES:
        methods = [route.method]
        made = At(route.path, guarded(house, route), methods=methods)
        paths.setdefault(route.path, []).append(made)
    routes: list[At] = [at for some in paths.values() for at in some]
    if page:
        routes += [At(path, _file(name)) for path, name in page_files().items()]
    middleware = [Middleware(_Targets)]
    if cors:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )

    async def nothing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        path = request.url.path[:200]
        known = sorted({r.method for r in ROUTES if r.path == request.url.path})
        if "GET" in known:
            known.insert(1, "HEAD")
        if status == 405:
            allowed = ", ".join(known) or "GET, HEAD"
            said = f"{path} is asked by {allowed}, not by {request.method[:20]}"
            return wire.refused(
                Problem(405, said, code="method_not_allowed", headers={"Allow": allowed})
            )
        said = f"there is no {path!r} here; /openapi.json lists what there is"
        return wire.refused(Problem(404, said, code="not_found"))

    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={404: nothing, 405: nothing}
    )


def page_files() -> dict[str, str]:
    """Path -> the name of the page's file."""
    folder = files("pylora.web").joinpath("page")
    names = sorted(f.name for f in folder.iterdir() if f.is_file())
    return {"/": "index.html"} | {f"/page/{name}": name for name in names}


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    data = files("pylora.web").joinpath("page").joinpath(name).read_bytes()
    suffix = name[name.rfind(".") :]
    kind = _KINDS.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"

    async def endpoint(request: Request) -> Response:
        return Response(data, media_type=kind, headers=_SAFE)

    return endpoint
