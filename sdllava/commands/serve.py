"""`sdllava serve`. Heavy imports happen inside, so that help is instant."""

from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Folder, repository id, or 'mini', the embedded miniature.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: as the weights are stored.")] = "auto",
) -> None:
    """Serve an OpenAI-compatible endpoint: chat completions with images, streamed or not."""
    from ..serving.server import serve
    from .options import model_path

    path = model_path(model)
    typer.echo(f"http://{host}:{port}/v1; requests name the model {path!r}", err=True)
    serve(path, host=host, port=port, device=device, dtype=dtype)
