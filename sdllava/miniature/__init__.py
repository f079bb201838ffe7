"""The embedded miniature: the path of its checkpoint."""

from pathlib import Path


def mini_path() -> Path:
    """The folder of the embedded miniature (model, processor and card), for `from_pretrained`."""
    return Path(__file__).parent / "sdllava-mini"
