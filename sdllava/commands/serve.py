"""The command `serve`. Heavy imports happen inside the command."""

from typing import Annotated

import typer

from ..serving.limits import BATCH_SECONDS, MAX_BATCH, Limits
from .options import (
    AutoDType,
    HostOption,
    MaxImageBytes,
    MaxImagePixels,
    MaxNewTokens,
    MaxQuestionChars,
    PortOption,
    check_device,
    let_idle_threads_sleep,
    limit,
    model_path,
    split_names,
)
from .reporting import warn_if_untrained

DEFAULT = Limits()


def serve(
    model: Annotated[str, typer.Argument(help="Folder, repository id, or 'mini', the embedded miniature.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[AutoDType, typer.Option(help="auto: as the weights are stored.")] = AutoDType.auto,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SDLLAVA_API_KEY", help="Bearer token that requests need. Default: none is needed."),
    ] = None,
    allow_media_domains: Annotated[
        str, typer.Option(help="Domains whose image URLs are fetched, separated by commas. Default: none.")
    ] = "",
    max_batch: Annotated[
        int, typer.Option(min=1, help="Requests that are answered together, and their images. 1: one by one.")
    ] = MAX_BATCH,
    batch_seconds: Annotated[
        float, typer.Option(min=0, max=10, help="How long a request waits for others, where the model is free.")
    ] = BATCH_SECONDS,
    max_body_bytes: Annotated[int, limit("Bytes of a request.", 1)] = DEFAULT.max_body_bytes,
    max_images: Annotated[int, limit("Images of a request.", 0)] = DEFAULT.max_images,
    max_image_bytes: MaxImageBytes = DEFAULT.max_image_bytes,
    max_image_pixels: MaxImagePixels = DEFAULT.max_image_pixels,
    max_new_tokens: MaxNewTokens = DEFAULT.max_new_tokens,
    max_beams: Annotated[int, limit("Beams of a beam search.", 1)] = DEFAULT.max_beams,
    max_question_chars: MaxQuestionChars = DEFAULT.max_question_chars,
    max_queue: Annotated[int, limit("Requests at a time; others get HTTP 429.", 1)] = DEFAULT.max_queue,
    request_seconds: Annotated[float, limit("Time of a request.", 0.1, 86400)] = DEFAULT.request_seconds,
) -> None:
    """Serve an OpenAI-compatible endpoint: chat completions with images, streamed or not."""
    let_idle_threads_sleep()
    path = model_path(model)
    if device != "auto":
        check_device(device)
    from ..configuration import SDLlavaConfig
    from ..serving.server import build_server, served_names

    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_images=max_images,
        max_image_bytes=max_image_bytes,
        max_image_pixels=max_image_pixels,
        max_new_tokens=max_new_tokens,
        max_beams=max_beams,
        max_question_chars=max_question_chars,
        max_queue=max_queue,
        request_seconds=request_seconds,
    )
    names = served_names(model)
    domains = split_names(allow_media_domains)
    server = build_server(
        path, names, host, port, device, dtype.value, limits, domains, api_key or None, max_batch, batch_seconds
    )
    warn_if_untrained(SDLlavaConfig.from_pretrained(path))
    typer.echo(f"http://{host}:{port}/v1 serves the model {names[0]!r}", err=True)
    server.run()
