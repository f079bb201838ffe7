"""The embedded miniature: where its checkpoint is."""

from pathlib import Path


def mini_path() -> Path:
    """Folder of the embedded miniature: model, processor and card, as `from_pretrained` takes them."""
    return Path(__file__).parent / "sdllava-mini"
