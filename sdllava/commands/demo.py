"""The command `demo`. Heavy imports happen inside the command."""

import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer

from ..serving.limits import PAGE_LIMITS
from .options import (
    DeviceOption,
    DType,
    HostOption,
    MaxImageBytes,
    MaxImagePixels,
    MaxNewTokens,
    MaxQuestionChars,
    ModelOption,
    PortOption,
    check_device,
    let_idle_threads_sleep,
    limit,
    model_path,
)
from .reporting import require_packages


def demo(
    model: ModelOption = "mini",
    compare: Annotated[
        list[str] | None, typer.Option(help="Another checkpoint, to compare its answers and maps. Repeatable.")
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    device: DeviceOption = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, bfloat16 elsewhere.")] = None,
    max_image_bytes: MaxImageBytes = PAGE_LIMITS.max_image_bytes,
    max_image_pixels: MaxImagePixels = PAGE_LIMITS.max_image_pixels,
    max_new_tokens: MaxNewTokens = PAGE_LIMITS.max_new_tokens,
    max_question_chars: MaxQuestionChars = PAGE_LIMITS.max_question_chars,
    max_queue: Annotated[int, limit("Visitors' actions that wait at a time.", 1)] = PAGE_LIMITS.max_queue,
    request_seconds: Annotated[float, limit("Time of an answer, without waiting.", 0.1, 86400)] = (
        PAGE_LIMITS.request_seconds
    ),
) -> None:
    """Open a page that answers questions and draws attention maps and the effect of the question."""
    require_packages("The page", "demo", "gradio", "matplotlib")
    let_idle_threads_sleep()
    models = [model, *(compare or [])]
    paths = [model_path(name) for name in models]
    if device is not None:
        check_device(device)
    import sdllava

    from ..demo.engine import Engine
    from ..demo.page import launch

    sdllava.register()
    limits = replace(
        PAGE_LIMITS,
        max_image_bytes=max_image_bytes,
        max_image_pixels=max_image_pixels,
        max_new_tokens=max_new_tokens,
        max_question_chars=max_question_chars,
        max_queue=max_queue,
        request_seconds=request_seconds,
    )
    engines = [
        Engine.from_pretrained(path, device, dtype and dtype.value, limits, scenes_only=name in ("mini", "smol"))
        for name, path in zip(models, paths, strict=True)
    ]
    if len({engine.name for engine in engines}) < len(engines):  # folders of the same name
        for engine, name in zip(engines, models, strict=True):
            engine.name = name
    typer.echo(
        f"The page of {' and '.join(engine.name for engine in engines)}: http://{host}:{port} (stop it with Ctrl-C)"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # an ordinary exit removes the page's temporary files
    launch(*engines, host=host, port=port)
