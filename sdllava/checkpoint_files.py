"""Checks the files of a checkpoint before anything is allocated, and reports what is damaged by its file.

Headers of safetensors give the names and shapes of all tensors without reading them. Sizes in the configuration that
the weights cannot have are reported before a model is built.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .repositories import find_file, split_revision

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

MAX_HEADER = 100_000_000
"""Largest header of a safetensors file in bytes, as in the safetensors library."""
LAYER_FIELDS = ("num_hidden_layers", "num_layers", "layers_per_block", "transformer_layers_per_block", "encoder_layers")
SIZE_FIELDS = ("hidden_size", "intermediate_size", "vocab_size", "block_out_channels", "cross_attention_dim", "d_model")
FIELD_ERRORS = (OSError, ValueError, StrictDataclassError)
"""What fields that a user gives raise."""
DIFFUSERS_FOLDERS = ("unet", "transformer", "vae")
TEXT_ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS_FOLDERS = (*DIFFUSERS_FOLDERS, *TEXT_ENCODER_FOLDERS)
DIFFUSION_FOLDERS = (*WEIGHTS_FOLDERS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
"""The folders of a published diffusion model that are read."""
JSON_OBJECTS = ("model_index.json", "tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class CheckpointError(ValueError, OSError):
    """A checkpoint is damaged, incomplete, or not what its configuration says. The message names file and fix."""

    @classmethod
    def of(cls, place: str | os.PathLike, reason: str) -> "CheckpointError":
        """The error of a file or folder, with the fix."""
        return cls(f"{os.fspath(place)!r} is damaged: {reason}. Download or save it again.")


@contextmanager
def damage_reported(source: str | os.PathLike, what: str) -> Iterator[None]:
    """Report what a library raises for a local folder as one `CheckpointError`. Errors about the Hub pass.

    Args:
        source: The folder, or a repository id.
        what: What the block reads, for the message, such as "the tokenizer".
    """
    try:
        yield
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError.of(source, f"{what} needs more memory than there is") from error
    except Exception as error:
        if isinstance(error, OSError) and not os.path.isdir(source):
            raise
        for path in sorted(Path(source).rglob("*.json")) if os.path.isdir(source) else ():
            read_object(path)
        raise _unreadable(source, what, error) from error


def _unreadable(source: str | os.PathLike, what: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    reason = f"{what} cannot be read ({type(error).__name__}: {lines[0][:300] if lines else 'no message'})"
    return CheckpointError.of(source, reason)


@contextmanager
def unexpected_reported(
    source: str | os.PathLike, what: str, documented: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Report what a library raises for damaged parts as one `CheckpointError`.

    Args:
        source: The folder, or a repository id.
        what: What the block reads, for the message, such as "the language model".
        documented: Exceptions that pass.
    """
    try:
        yield
    except documented:
        raise
    except Exception as error:
        raise _unreadable(source, what, error) from error


@contextmanager
def part_reported(source: str | os.PathLike, what: str, section: str | None = None) -> Iterator[None]:
    """Check the files of a published part, and report what a library raises for it as `unexpected_reported` does.

    Files that are not yet on this machine are not checked.

    Args:
        source: A repository id, `id@revision` or a folder, in the layout of transformers or diffusers.
        what: What the block reads, for the message.
        section: The section of the configuration that is used, where there are others. Default: all of it.

    Raises:
        CheckpointError: A file is damaged, or a configuration does not fit the weights.
    """
    where = split_revision(source)
    name, options = where["pretrained_model_name_or_path"], {"revision": where.get("revision")}
    if os.path.isdir(name):
        for folder in ("", *DIFFUSION_FOLDERS):
            for path in sorted(Path(name, folder).glob("*.json")):
                if path.name.endswith("config.json") or path.name in JSON_OBJECTS:
                    read_object(path)
    for folder in ("", *WEIGHTS_FOLDERS):
        check_files(name, {**options, "local_files_only": True}, folder, section)
    with unexpected_reported(name, what):
        yield


def check_files(
    source: str | os.PathLike, options: dict[str, Any], folder: str = "", section: str | None = None
) -> tuple[dict[str, Any], Shapes] | None:
    """Check the configuration and the headers of the weights of a checkpoint.

    Args:
        source: A repository id or a folder.
        options: Of `from_pretrained`, such as `token` and `revision`.
        folder: The folder of the files in the repository. Default: its root.
        section: The section of the configuration that is checked, where there is one. Default: all of it.

    Returns:
        The configuration and the shapes of all tensors, or None where there are no safetensors or no configuration,
        which the loader reports.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the configuration does not fit the weights.
    """
    path = find_file(source, os.path.join(folder, "config.json"), options)
    files = list(_weight_files(source, options, folder))
    if path is None or not files:
        return None
    config = read_object(path)
    shapes: Shapes = {}
    for file in files:
        shapes |= read_shapes(file)
    if "quantization_config" not in config and not config.get("left_out"):  # whose weights have other shapes, or miss
        _check_sizes(path, config.get(section or "", config), shapes)
    return config, shapes


def compare_shapes(source: str | os.PathLike, built: Shapes, stored: Shapes) -> None:
    """Compare the tensors of a model with those of a checkpoint, by those names that both have.

    Raises:
        CheckpointError: A shape differs.
    """
    for name in sorted(built.keys() & stored.keys()):
        if built[name] != stored[name]:
            raise CheckpointError.of(
                source,
                f"its configuration gives {name!r} the shape {list(built[name])}, and the weights have "
                f"{list(stored[name])}",
            )


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It does not.
    """
    return _parse(path, Path(path).read_bytes())


def read_shapes(path: str | os.PathLike) -> Shapes:
    """The shapes of the tensors of a safetensors file, from its header, which must describe the file exactly.

    Raises:
        CheckpointError: The file is truncated, or its header is damaged.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError.of(path, f"its header has {length} bytes, and the file has {size}")
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    shapes: Shapes = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        shape = tuple(entry["shape"])
        begin, after = entry["data_offsets"]
        expected = math.prod(shape) * DTYPE_BYTES.get(entry["dtype"], 0) or after - begin
        if begin != end or after - begin != expected:
            raise CheckpointError.of(path, f"tensor {name!r} does not lie where its header says")
        shapes[name], end = shape, after
    if end != size - 8 - length:
        raise CheckpointError.of(path, f"its tensors have {end} bytes, and the file has {size - 8 - length} for them")
    return shapes


def _offsets(path: str | os.PathLike, name: str, entry: Any) -> list[int]:
    """The first byte of a tensor, and the one after it. Checks the types of its entry in the header."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    valid = isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and numbers(entry.get("shape"))
    if not valid or not numbers(entry.get("data_offsets")) or len(entry["data_offsets"]) != 2:
        raise CheckpointError.of(path, f"the entry of tensor {name!r} in its header is not valid")
    return entry["data_offsets"]


def _parse(path: str | os.PathLike, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of(path, f"it is not JSON ({str(error)[:100]})") from error
    if not isinstance(found, dict):
        raise CheckpointError.of(path, f"it holds a {type(found).__name__}, not a JSON object")
    return found


def _weight_files(source: str | os.PathLike, options: dict[str, Any], folder: str) -> Iterator[str]:
    """The safetensors of a checkpoint, one file or the shards of its index."""
    stem = "diffusion_pytorch_model" if folder in DIFFUSERS_FOLDERS else "model"
    name = os.path.join(folder, f"{stem}.safetensors")
    if (single := find_file(source, name, options)) is not None:
        yield single
        return
    index = find_file(source, f"{name}.index.json", options)
    if index is None:
        return
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError.of(index, "its weight_map does not name a file for each tensor")
    for name in sorted(set(shards.values())):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise CheckpointError.of(index, f"it names {name!r}, which is not a safetensors file next to it")
        if (shard := find_file(source, os.path.join(folder, name), options)) is None:
            raise CheckpointError.of(index, f"it names {name!r}, which is missing")
        yield shard


def _check_sizes(path: str, config: dict[str, Any], shapes: Shapes) -> None:
    """Compare the numbers of layers with the number of tensors, and sizes with the largest dimension."""
    largest = max((dimension for shape in shapes.values() for dimension in shape), default=0)
    limits = {**dict.fromkeys(LAYER_FIELDS, len(shapes)), **dict.fromkeys(SIZE_FIELDS, largest)}

    def check(name: str, value: Any) -> None:
        if value is not None and not (isinstance(value, int) and 0 <= value <= limits[name]):
            raise CheckpointError.of(
                path,
                f"{name} is {value!r}, and the weights have {len(shapes)} tensors, a largest dimension of {largest}",
            )

    _walk(config, lambda name, value: check(name, value) if name in limits else None)


def _walk(value: Any, visit: Callable[[str, Any], None], name: str = "") -> None:
    """Call `visit` with every number below `value` and the name of the field that holds it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(inner, visit, key)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, visit, name)
    else:
        visit(name, value)
