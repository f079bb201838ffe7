"""An OpenAI-compatible endpoint through transformers' own server (`transformers serve`).

The stock command cannot serve this package's models, because it never imports the package. The models also have what
vLLM's Transformers backend requires: one row per image in every processor output, `get_image_features` with
`pooler_output`, `language_model`, `get_encoder("image")`, `image_token` and `_get_num_multimodal_tokens`. That backend
is untested.
"""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI, Response
    from transformers.cli.serve import Serve

REQUIRED = ("fastapi", "uvicorn", "openai", "pydantic")


def media(body: Any) -> Iterator[Any]:
    """Yield the source of every image, video and sound in a request.

    Args:
        body: The request as JSON values.
    """
    if isinstance(body, list):
        for entry in body:
            yield from media(entry)
    elif isinstance(body, dict):
        for key, value in body.items():
            if key in ("image_url", "video_url", "audio_url"):
                yield value.get("url") if isinstance(value, dict) else value
            else:
                yield from media(value)


def reject_unreadable(app: "FastAPI") -> "FastAPI":
    """Make a server return HTTP 400 with a message for a path of the server's machine and for an invalid image.

    Args:
        app: The server, which is changed in place.

    Returns:
        `FastAPI`: The same server.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def bad_request(message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    @app.middleware("http")
    async def check_media(request: Request, call_next: Any) -> "Response":
        try:
            sources = list(media(await request.json()))
        except ValueError:  # not JSON: the route reports it
            sources = []
        for source in sources:
            if not str(source).startswith(("data:", "https://", "http://")):
                return bad_request(f"{str(source)[:80]!r} is neither a URL nor a data URL. Send the image as one.")
        return await call_next(request)

    @app.exception_handler(ValueError)
    async def report(_: Request, error: ValueError) -> JSONResponse:
        return bad_request(str(error))

    return app


def list_only(app: "FastAPI", model: str) -> "FastAPI":
    """Make `/v1/models` list only the served model, not the contents of the Hub's cache on this machine.

    Args:
        app: The server, which is changed in place.
        model: The served model, as requests name it.

    Returns:
        `FastAPI`: The same server.
    """
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/models"]
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "sdllava"}
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [entry]}, methods=["GET"])
    return app


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    non_blocking: bool = False,
) -> "Serve":
    """Serve a model until interrupted: `POST /v1/chat/completions` with images, streamed or not, and `GET /v1/models`.

    The prompt of the diffusion model is the last user turn after each image. Images are URLs or data URLs (base64). A
    request with a path of this machine returns HTTP 400.

    Args:
        model: A folder or repository id. A request for another model returns HTTP 400.
        host: The address to listen on. By default, only this machine can connect.
        port: The port, in 1..65535.
        device: "cpu", "cuda", "cuda:1" or "auto".
        dtype: "float32", "bfloat16", "float16", or "auto" for the type that the weights are stored in.
        non_blocking: Return the running server. Its `kill_server()` ends it.

    Returns:
        `Serve`: transformers' server.

    Raises:
        ImportError: The extra `serve` is not installed.
        OSError: The model cannot be read.
        ValueError: The model is not a model of this package.
    """
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise ImportError(f'Serving needs {", ".join(missing)}. Run: pip install "sdllava[serve]"')
    from transformers import AutoConfig
    from transformers.cli.serve import Serve
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    from ..configuration import SDLlavaConfig
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..registration import register

    register()
    # the server looks up the names of model types that take images here
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[SDLlavaConfig.model_type] = SDLlavaForConditionalGeneration.__name__
    found = AutoConfig.from_pretrained(model).model_type
    if found != SDLlavaConfig.model_type:
        raise ValueError(
            f"{model!r} is a model of type {found!r}. This command serves models of type {SDLlavaConfig.model_type!r}. "
            "Use `transformers serve` for others."
        )

    class Server(Serve):
        """transformers' server with [`reject_unreadable`] and [`list_only`]."""

        def start_server(self) -> None:
            """Change the application that `Serve` built, then start it. `Serve` calls this if `non_blocking`."""
            list_only(reject_unreadable(self.server.config.app), model)
            if non_blocking:
                super().start_server()
            else:
                self.server.run()

    return Server(force_model=model, host=host, port=port, device=device, dtype=dtype, non_blocking=True)
