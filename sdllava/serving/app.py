"""The HTTP application: an OpenAI-compatible `POST /v1/chat/completions`, `/v1/models`, `/health` and `/metrics`."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .answering import ModelWorker
from .chat import ChatRequest, check_model, read_chat_request
from .jobs import Answer, Job, timeout_error
from .limits import Limits, RequestError
from .media import decode, fetch, read_data_url
from .metrics import Metrics

logger = logging.getLogger(__name__)

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
_INTERNAL = "The server failed. Its log has the cause."


def error_body(error: RequestError) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.status}}


class ChatApp:
    """Answers requests.

    Images are fetched in the event loop. Two threads decode them and make the model's inputs, so that at most two
    requests hold decoded images. The model has a thread of its own.

    Args:
        worker: Runs the model.
        names: The names of the model in requests. The first is listed.
        limits: What one request may cost.
        media_domains: Domains whose image URLs are fetched.
        api_key: The bearer token that requests need; None lets every client in.
    """

    def __init__(
        self,
        worker: ModelWorker,
        names: Sequence[str],
        limits: Limits,
        media_domains: Sequence[str] = (),
        api_key: str | None = None,
    ):
        self.worker, self.names, self.limits = worker, names, limits
        self.media_domains, self.api_key = media_domains, api_key
        self.metrics = Metrics()
        self.preparers = ThreadPoolExecutor(2, "prepare")

    def starlette(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
        ]
        handlers: dict[Any, Any] = {RequestError: lambda _, error: JSONResponse(error_body(error), error.status)}
        handlers |= {404: self._http_error, 405: self._http_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _http_error(self, request: Request, error: Any) -> Response:
        found = RequestError(f"{request.method} {request.url.path[:80]!r}: {error.detail}.", error.status_code)
        return JSONResponse(error_body(found), error.status_code, headers=error.headers)

    def _check_token(self, request: Request) -> None:
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise RequestError("The bearer token is missing or wrong. Send the API key of this server.", 401)

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 while the server runs. Needs no token."""
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters for Prometheus."""
        self._check_token(request)
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the served model."""
        self._check_token(request)
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`: the served model by one of its names, which may contain slashes."""
        self._check_token(request)
        check_model(request.path_params["name"], self.names)
        return JSONResponse(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        return {"id": self.names[0], "object": "model", "created": 0, "owned_by": "sdllava"}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self._check_token(request)
        start = time.monotonic()
        if self.metrics.in_flight >= self.limits.max_queue:
            self.metrics.count(429, 0.0)
            raise RequestError("Too many requests are waiting. Try again later.", 429)
        self.metrics.in_flight += 1
        response: Response | None = None
        status = 500
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                job = await self._prepare(request, start)
                if job.request.stream:
                    pieces = self._first_piece(job)
                    first = await anext(pieces)
                    response = _Stream(self, job, first, pieces, start)
                    return response
                answer = await self._answer(job, request)
            status = 200
            return JSONResponse(self._body(job.request, answer))
        except RequestError as error:
            status = error.status
            raise
        except TimeoutError:
            status = 504
            raise timeout_error() from None
        except ClientDisconnect:
            status = 499
            return Response(status_code=400)
        except Exception:
            logger.exception("A request failed.")
            raise RequestError(_INTERNAL, 500) from None
        finally:
            if response is None:  # a stream ends later
                self.finish(status, start)

    def finish(self, status: int, start: float) -> None:
        """Count a request that ended."""
        self.metrics.in_flight -= 1
        self.metrics.count(status, time.monotonic() - start)

    async def _prepare(self, request: Request, start: float) -> Job:
        body = await self._read_body(request)
        loop = asyncio.get_running_loop()
        chat = await loop.run_in_executor(self.preparers, read_chat_request, body, self.names, self.limits)
        files = [await self._fetched(url) for url in chat.image_urls]
        end = start + self.limits.request_seconds
        return await loop.run_in_executor(self.preparers, self._decode_and_prepare, chat, files, end)

    def _decode_and_prepare(self, chat: ChatRequest, files: Sequence[str | bytes], end: float) -> Job:
        images = []
        for file in files:
            if time.monotonic() > end:
                raise timeout_error()
            data = file if isinstance(file, bytes) else read_data_url(file, self.limits.max_image_bytes)
            images.append(decode(data, self.limits))
        return self.worker.prepare(chat, images, end)

    async def _read_body(self, request: Request) -> bytes:
        too_large = RequestError(f"The body has more than {self.limits.max_body_bytes} bytes. Send less.", 413)
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.max_body_bytes:
                raise too_large
        return bytes(body)

    async def _fetched(self, url: str) -> str | bytes:
        """The bytes of an image's URL, or the data URL itself."""
        is_remote = url.startswith(("http://", "https://"))
        return await fetch(url, self.media_domains, self.limits) if is_remote else url

    async def _answer(self, job: Job, request: Request) -> Answer:
        """Wait for the answer, or for the client to leave."""
        answering = asyncio.wrap_future(self.worker.submit(job))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            both: list[asyncio.Future[Any]] = [answering, leaving]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            return self._counted(answering.result())
        finally:
            job.cancelled.set()
            answering.cancel()  # leaves the queue, if it has not started
            leaving.cancel()

    def _counted(self, answer: Answer) -> Answer:
        self.metrics.tokens["prompt"] += answer.prompt_tokens
        self.metrics.tokens["answer"] += answer.completion_tokens
        return answer

    async def _first_piece(self, job: Job) -> AsyncIterator[str | Answer]:
        """Yield the pieces of the answer, then the answer. Errors before the first piece have an HTTP status."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        job.send = lambda text: _call(loop, pieces, text)
        answering = asyncio.wrap_future(self.worker.submit(job))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield self._counted(await answering)
        finally:
            job.cancelled.set()
            answering.cancel()

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that all answers have."""
        created = int(time.time())
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": created, "model": self.names[0]}

    def _body(self, request: ChatRequest, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return {**self.head("chat.completion"), "choices": [choice], "usage": _usage(answer)}


class _Stream(StreamingResponse):
    """Server-sent events: the pieces, the reason of the end, on request the numbers of tokens."""

    def __init__(self, app: ChatApp, job: Job, first: str | Answer, pieces: AsyncIterator[str | Answer], start: float):
        self.app, self.job, self.start = app, job, start
        self.outcome = 499  # unless the end is reached, the client has left
        super().__init__(self.events(first, pieces), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancelled.set()
            self.app.finish(self.outcome, self.start)

    async def events(self, piece: str | Answer, pieces: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
        """Yield the events of an answer, or of an error after the first piece."""
        shared = self.app.head("chat.completion.chunk")

        def event(delta: dict[str, str], reason: str | None = None) -> str:
            return _event({**shared, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

        try:
            yield event({"role": "assistant", "content": ""})
            while isinstance(piece, str):
                yield event({"content": piece})
                async with asyncio.timeout(self.job.end - time.monotonic()):
                    piece = await anext(pieces)
            yield event({}, piece.finish_reason)
            if self.job.request.include_usage:
                yield _event({**shared, "choices": [], "usage": _usage(piece)})
            yield "data: [DONE]\n\n"
            self.outcome = 200
        except (RequestError, TimeoutError) as error:
            found = error if isinstance(error, RequestError) else timeout_error()
            self.outcome = found.status
            yield _event(error_body(found))
        except Exception:
            self.outcome = 500
            logger.exception("A request failed while it was streamed.")
            yield _event(error_body(RequestError(_INTERNAL, 500)))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _call(loop: asyncio.AbstractEventLoop, pieces: "asyncio.Queue[str | None]", text: str) -> None:
    loop.call_soon_threadsafe(pieces.put_nowait, text)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
