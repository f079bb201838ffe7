"""An OpenAI-compatible endpoint through transformers' own server (`transformers serve`).

The stock command cannot serve this package's models, because it never imports it. What vLLM's Transformers backend
asks of a model is there as well: one row an image for every processor output, `get_image_features` with
`pooler_output`, `language_model`, `get_encoder("image")`, `image_token` and `_get_num_multimodal_tokens`; it is
untried.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REQUIRED = ("fastapi", "uvicorn", "openai", "pydantic")


def media(body: Any) -> Iterator[Any]:
    """Every image, video and sound that a request names."""
    if isinstance(body, list):
        for entry in body:
            yield from media(entry)
    elif isinstance(body, dict):
        for key, value in body.items():
            if key in ("image_url", "video_url", "audio_url"):
                yield value.get("url") if isinstance(value, dict) else value
            else:
                yield from media(value)


def refuse_what_cannot_be_read(app: Any) -> Any:
    """Makes the server answer 400, with a sentence, where a request names a file of this machine or an image is bad."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def refusal(message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    @app.middleware("http")
    async def media_by_value(request: Request, call_next: Any) -> Any:
        try:
            named = list(media(await request.json()))
        except ValueError:  # no JSON, which is the route's to judge
            named = []
        for source in named:
            if not str(source).startswith(("data:", "https://", "http://")):
                return refusal(f"{str(source)[:80]!r} is no URL and no data URL, which a request has to bring")
        return await call_next(request)

    @app.exception_handler(ValueError)
    async def told(_: Request, error: ValueError) -> JSONResponse:
        return refusal(str(error))

    return app


def list_only(app: Any, model: str) -> Any:
    """Makes `/v1/models` name the one model served, not what the Hub's cache on this machine holds."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/models"]
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "sdllava"}
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [entry]}, methods=["GET"])
    return app


@contextmanager
def guarded_server(model: str) -> Iterator[None]:
    """While a server of transformers is built here, it is one that refuses, and knows one model."""
    from transformers.cli.serving import server

    build = server.build_server
    server.build_server = lambda *args, **kwargs: list_only(refuse_what_cannot_be_read(build(*args, **kwargs)), model)
    try:
        yield
    finally:
        server.build_server = build


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    non_blocking: bool = False,
) -> Any:
    """Serve a model until interrupted: `POST /v1/chat/completions`, with images, streamed or not. `GET /v1/models` names
    it.

    The diffusion model is asked the last user turn behind each image, as everywhere. Images come as URLs or as data
    URLs (base64); a request that names a file of this machine is refused.

    Args:
        model (`str`): a folder or repository id; a request that names another model is refused.
        host (`str`): the address to listen on; the default is this machine alone.
        non_blocking (`bool`): return the running server, which `kill_server()` ends.

    Raises:
        ImportError: the extra `serve` is not installed.
        OSError, ValueError: the model cannot be read.
    """
    from importlib.util import find_spec

    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise ImportError(f'serving needs {", ".join(missing)}: pip install "sdllava[serve]"')
    from transformers import AutoConfig
    from transformers.cli.serve import Serve
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    from ..configuration import SDLlavaConfig
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..registration import register

    register()
    # the server looks up here, by name, whether a model takes images
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[SDLlavaConfig.model_type] = SDLlavaForConditionalGeneration.__name__
    found = AutoConfig.from_pretrained(model).model_type
    if found != SDLlavaConfig.model_type:
        raise ValueError(f"{model!r} is a {found!r}, which `transformers serve` serves; this command is for sdllava's")
    with guarded_server(model):
        return Serve(force_model=model, host=host, port=port, device=device, dtype=dtype, non_blocking=non_blocking)
