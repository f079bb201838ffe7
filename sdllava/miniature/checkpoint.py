"""The embedded miniature: where it is, and how its parts are put together."""

from pathlib import Path

SHAPE = {
    "taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"],
    "image_size": 64,
    "grid_size": 8,
    "spatial_merge_size": 2,
    "fusion_num_attention_heads": 6,
}
"""How the miniature's parts are put together: 8x8 features, joined 2x2 to 16 image tokens."""


def mini_path() -> Path:
    """Folder of the embedded miniature: model, processor and card, as `from_pretrained` takes them."""
    return Path(__file__).parent / "sdllava-mini"
