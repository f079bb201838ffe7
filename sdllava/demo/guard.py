"""Rejects requests that name files by URL, because Gradio would download them."""

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON = 2**20
"""Bytes of a JSON body."""


def contains_url_file(value: Any) -> bool:
    """Whether a JSON value contains a file (`{"path": ...}`) that is a URL instead of an upload."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(contains_url_file(entry) for entry in value.values())
    return isinstance(value, list) and any(contains_url_file(entry) for entry in value)


class RejectURLFiles:
    """ASGI middleware: HTTP 400 for JSON that names a file by URL, HTTP 413 for JSON of more than `MAX_JSON` bytes.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    @classmethod
    def middleware(cls) -> Middleware:
        """The middleware for Starlette's list."""
        return Middleware(cls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or reject it."""
        headers = dict(scope.get("headers") or [])
        is_upload = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT") or is_upload:
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_JSON:
                detail = f"The request is larger than {MAX_JSON} bytes. Upload images as files."
                await JSONResponse({"detail": detail}, 413)(scope, receive, send)
                return
        if _names_url(body):
            detail = "Files are not fetched from URLs. Upload the file."
            await JSONResponse({"detail": detail}, 400)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)


def _names_url(body: bytes) -> bool:
    try:
        return contains_url_file(json.loads(body)) if body else False
    except ValueError:
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, which was read already, then whatever follows."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
