"""The command `serve`. Heavy imports happen inside the command."""

from typing import Annotated

import typer

from .options import AutoDType, HostOption, PortOption, check_device, model_path


def serve(
    model: Annotated[str, typer.Argument(help="Folder, repository id, or 'mini', the embedded miniature.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[AutoDType, typer.Option(help="auto: as the weights are stored.")] = AutoDType.auto,
) -> None:
    """Serve an OpenAI-compatible endpoint: chat completions with images, streamed or not."""
    path = model_path(model)
    if device != "auto":
        check_device(device)
    from ..serving.server import serve

    typer.echo(f"http://{host}:{port}/v1 serves the model {path!r}", err=True)
    serve(path, host=host, port=port, device=device, dtype=dtype.value)
