"""An OpenAI-compatible server for one model of this package.

The models also have what vLLM's Transformers backend requires: one row per image in every processor output,
`get_image_features` with `pooler_output`, `language_model`, `get_encoder("image")`, `image_token` and
`_get_num_multimodal_tokens`. That backend is untested.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .limits import BATCH_SECONDS, MAX_BATCH, Limits

if TYPE_CHECKING:
    import uvicorn

REQUIRED = ("starlette", "uvicorn")
SHUTDOWN_SECONDS = 10
"""Time that a stopped server gives clients to read their answers, in addition to the time per request."""


def served_names(model: str) -> list[str]:
    """The names of a model in requests; the first is the one that is listed.

    A repository id and 'mini' are names. The name of a folder is its last part, so that clients do not see its path.

    Args:
        model: As typed.
    """
    if not os.path.isdir(model):
        return [model]
    name = os.path.basename(os.path.abspath(model)) or "model"
    return list(dict.fromkeys([name, model]))


def build_server(
    model: str,
    names: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    limits: Limits | None = None,
    media_domains: Sequence[str] = (),
    api_key: str | None = None,
    max_batch: int = MAX_BATCH,
    batch_seconds: float = BATCH_SECONDS,
) -> "uvicorn.Server":
    """Load a model and make its server, which does not run yet.

    The prompt of the diffusion model is the last user turn after each image. Images are data URLs (base64), or URLs of
    `media_domains`. The server stops on SIGTERM and SIGINT, after the running requests.

    Args:
        model: A folder or repository id.
        names: Its names in requests, from [`served_names`].
        host: The address to listen on. By default, only this machine can connect.
        port: The port, in 1..65535.
        device: "cpu", "cuda", "cuda:1" or "auto".
        dtype: "float32", "bfloat16", "float16", or "auto" for the type that the weights are stored in.
        limits: What one request may cost.
        media_domains: Domains whose image URLs are fetched. Addresses that are not public are never fetched.
        api_key: The bearer token that requests need; None lets every client in.
        max_batch: Requests that are answered together, and their images; 1 answers one by one.
        batch_seconds: How long a request waits for others, where the model is free.

    Raises:
        ImportError: The extra `serve` is not installed.
        OSError: The model cannot be read.
        ValueError: The model is not a model of this package.
    """
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise ImportError(f'Serving needs {", ".join(missing)}. Run: pip install "sdllava[serve]"')
    import torch
    import uvicorn
    from transformers import AutoConfig

    from ..configuration import SDLlavaConfig
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..processors import SDLlavaProcessor
    from ..registration import register
    from .answering import ModelWorker
    from .app import ChatApp

    register()
    found = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if found != SDLlavaConfig.model_type:
        raise ValueError(
            f"{names[0]!r} is a model of type {found!r}. This command serves models of type "
            f"{SDLlavaConfig.model_type!r}. Use `transformers serve` for others."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = SDLlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device)
    worker = ModelWorker(loaded, SDLlavaProcessor.from_pretrained(model), max_batch, batch_seconds)
    limits = limits or Limits()
    app = ChatApp(worker, names, limits, media_domains, api_key).starlette()
    grace = int(limits.request_seconds) + SHUTDOWN_SECONDS
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=grace)
    return uvicorn.Server(config)
