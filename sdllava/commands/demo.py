"""The command `demo`. Heavy imports happen inside the command."""

import signal
import sys
from typing import Annotated

import typer

from .options import (
    DeviceOption,
    DType,
    HostOption,
    ModelOption,
    PortOption,
    check_device,
    let_idle_threads_sleep,
    model_path,
)
from .reporting import require_packages


def demo(
    model: ModelOption = "mini",
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    device: DeviceOption = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, bfloat16 elsewhere.")] = None,
) -> None:
    """Open a page that answers questions and draws attention maps and the effect of the question."""
    require_packages("The page", "demo", "gradio", "matplotlib")
    let_idle_threads_sleep()
    path = model_path(model)
    if device is not None:
        check_device(device)
    import sdllava

    from ..demo.engine import Engine
    from ..demo.page import launch

    sdllava.register()
    engine = Engine.from_pretrained(path, device, dtype and dtype.value)
    typer.echo(f"The page of {engine.name}: http://{host}:{port} (stop it with Ctrl-C)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # an ordinary exit removes the page's temporary files
    launch(engine, host, port)
