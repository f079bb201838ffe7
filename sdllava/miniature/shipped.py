"""The models that the package ships, by name."""

from . import mini_path
from .smol import smol_path


def shipped_model(name: str) -> str | None:
    """The folder of the model that the package ships under a name, or None for any other name.

    Args:
        name: "mini", the embedded miniature, or "smol", the miniature with SmolLM2. The first call for "smol" on a
            machine assembles its weights and writes them to the cache folder.

    Raises:
        ImportError: "smol" needs packages that are not installed.
        ValueError: The installed language model is another version than the adapter was trained for.
    """
    if name == "smol":
        return str(smol_path())
    return str(mini_path()) if name == "mini" else None
