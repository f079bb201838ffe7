"""The embedded miniature: where it is, and how its diffusion model is read."""

from pathlib import Path

TOWER = {"taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"], "image_size": 64, "grid_size": 8}
"""Where and how finely the miniature's diffusion model is read."""


def mini_path() -> Path:
    """Folder of the embedded miniature: model, processor and card, as `from_pretrained` takes them."""
    return Path(__file__).parent / "sdllava-mini"
