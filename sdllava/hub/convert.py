"""Repositories that publish their weights as pickles only, rewritten as safetensors.

Every pickle is read by transformers' own reader with `weights_only=True`, which builds tensors and containers and
nothing else, in a separate process. The process limits what a damaged or malicious file can do to the caller; it is
not a sandbox.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from ..atomic_files import atomic_path
from ..repositories import PICKLED_WEIGHTS, missing, split_revision

OTHER_FORMATS = ("*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.pkl", ".*")
"""Files of a repository that are not copied."""


def convert(source: str, folder: str | os.PathLike) -> list[str]:
    """Write a copy of a repository with safetensors in place of its pickles.

    Args:
        source: A repository id, `id@revision` or a folder: any layout of transformers or diffusers.
        folder: The new folder. Configurations, tokenizers and other text files are copied.

    Returns:
        `list[str]`: The safetensors files that were written, relative to `folder`.

    Raises:
        FileExistsError: `folder` exists.
        OSError: The source cannot be read.
        ValueError: The source has no pickles without safetensors, or a pickle is damaged or holds more than tensors.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} exists. Name a new folder.")
    root = _local(source)
    pickles = [path for path in _files(root) if _is_pickle(path) and not _has_safetensors(path.parent)]
    if not pickles:
        raise ValueError(f"{source!r} has no pickled weights without safetensors. Use it as it is.")
    with atomic_path(folder) as written:
        shutil.copytree(root, written, ignore=shutil.ignore_patterns(*OTHER_FORMATS))
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            for path in pickles:
                target = written / _new_name(path.relative_to(root))
                try:
                    pool.submit(write_safetensors, str(path), str(target)).result()
                except BrokenProcessPool as error:
                    raise ValueError(
                        f"The process that read {str(path)!r} ended: the file is damaged, or memory is too small."
                    ) from error
        for index in written.rglob("*.bin.index.json"):
            _rewrite_index(index)
    return sorted(str(_new_name(path.relative_to(root))) for path in pickles)


def write_safetensors(pickled: str, target: str) -> None:
    """Read one pickle with transformers' weights-only reader, and write its tensors as safetensors.

    Args:
        pickled: The file to read.
        target: The file to write.

    Raises:
        ValueError: The file is damaged, or holds anything else than tensors by name.
    """
    import torch
    from safetensors.torch import save_file
    from transformers.modeling_utils import load_state_dict

    try:
        read = load_state_dict(pickled)
    except Exception as error:  # a pickle fails in any way
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{pickled!r} is damaged, or holds more than tensors, which could run code: {reason}. Ask its author for "
            "safetensors."
        ) from None
    if not isinstance(read, dict) or not all(isinstance(value, torch.Tensor) for value in read.values()):
        raise ValueError(f"{pickled!r} does not hold tensors by name. Ask its author for safetensors.")
    tensors = {name: tensor.contiguous().clone() for name, tensor in read.items()}  # safetensors shares no memory
    save_file(tensors, target, metadata={"format": "pt"})


def _local(source: str) -> Path:
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    where = split_revision(source)
    ignored = [pattern for pattern in OTHER_FORMATS if pattern != "*.bin"]
    try:
        return Path(
            snapshot_download(
                where["pretrained_model_name_or_path"], revision=where.get("revision"), ignore_patterns=ignored
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise missing(source, "repository", error) from error


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _is_pickle(path: Path) -> bool:
    return path.suffix == ".bin" and PICKLED_WEIGHTS.fullmatch(path.name) is not None


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _new_name(path: Path) -> Path:
    """`pytorch_model-00001-of-00002.bin` becomes `model-00001-of-00002.safetensors`."""
    return path.with_name(path.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors")


def _rewrite_index(index: Path) -> None:
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {name: str(_new_name(Path(file))) for name, file in content["weight_map"].items()}
    name = index.name.removeprefix("pytorch_").replace(".bin.index.json", ".safetensors.index.json")
    index.with_name(name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    index.unlink()
