"""`sdllava demo`. Nothing heavy is imported before the command runs."""

import signal
import sys
from typing import Annotated

import typer


def demo(
    model: Annotated[str, typer.Option(help="Folder, repository id, or 'mini', the embedded miniature.")] = "mini",
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: CUDA where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. Default: by the device.")] = None,
) -> None:
    """A page to ask, and to see where each word looks and what the question moves."""
    from importlib.util import find_spec

    if missing := [name for name in ("gradio", "matplotlib") if find_spec(name) is None]:
        raise ImportError(f'the page needs {", ".join(missing)}: pip install "sdllava[demo]"')
    import sdllava

    sdllava.register()
    from ..demo.engine import Engine
    from ..demo.page import launch
    from .options import check_device, model_path

    engine = Engine.from_pretrained(model_path(model), device and check_device(device), dtype)
    typer.echo(f"The page of {engine.name}: http://{host}:{port} (stop it with Ctrl-C)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what belongs to the page is tidied up
    launch(engine, host, port)
