"""Files and folders that appear whole or not at all: written under another name, flushed to the disk, then renamed."""

import errno
import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_OLD = "-replaced"  # the folder that is being replaced
_PLACE_MESSAGES = re.compile(rf"PytorchStreamWriter|os error ({'|'.join(map(str, _PLACE_ERRORS))})\b")


class NotWrittenError(OSError):
    """A file or folder cannot be written: full disk, read-only place, quota. The message names it and the fix."""


@contextmanager
def reported(path: str | os.PathLike) -> Iterator[None]:
    """Report that a file or folder cannot be written as one `OSError`, whichever library writes in the block.

    Args:
        path: What the block writes, for the message.

    Raises:
        NotWrittenError: The disk is full, the place is read-only or not allowed, or a file is larger than its limit.
    """
    try:
        yield
    except NotWrittenError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in _PLACE_ERRORS and not _PLACE_MESSAGES.search(str(error)):
            raise
        reason = os.strerror(code) if code else str(error).strip().splitlines()[0]
        message = (
            f"{os.fspath(path)!r} could not be written: {reason}. Make room or choose another place, then run the same "
            "command again."
        )
        raise NotWrittenError(message) from error


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a folder under a temporary name, and rename it when the block ends.

    An exception in the block removes what was written and leaves `path` as it was. What a killed process left is
    removed by the next call for the same path; a folder that it was about to replace is put back. Missing parent
    folders are created.

    Args:
        path: The file or folder to write. An existing one is replaced.

    Yields:
        `Path`: The temporary path, in the same folder and with the same suffix. The block creates it.

    Raises:
        NotWrittenError: The disk is full, for example. An earlier file stays as it was.
    """
    path = Path(path)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    _clean_up(path, host)
    written = path.with_name(f".{host}-{os.getpid()}-{path.name}")
    try:
        with reported(path):
            yield written
            move_into_place(written, path)
    finally:
        _remove(written)


def is_unfinished(path: Path) -> bool:
    """Whether a name is that under which `atomic_path` writes: of a running process, or left by a killed one."""
    return re.fullmatch(r"\..+-\d+-.+", path.name) is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises as `atomic_path`."""
    with atomic_path(path) as written:
        written.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON, atomically. Raises as `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: str | os.PathLike, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. Raises as `write_text`.

    `save_file` writes to another temporary file in the same folder, which would stay there after a kill.

    Args:
        path: The file.
        tensors: Contiguous tensors by name.
        metadata: Written to the header.
    """
    from safetensors.torch import save  # imports torch

    with atomic_path(path) as written:
        written.write_bytes(save(tensors, metadata))


def move_into_place(written: Path, place: Path) -> None:
    """Flush a file or folder to the disk, then rename it. An existing `place` is replaced, never merged."""
    for path in [written, *written.rglob("*")] if written.is_dir() else [written]:
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    old = written.with_name(f"{written.name}{_OLD}")
    if place.is_dir():
        os.replace(place, old)
    os.replace(written, place)
    _flush_names(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(path: Path, host: str) -> None:
    """Put back the folder that a killed process was about to replace, and remove what it wrote."""
    for suffix in (_OLD, ""):
        for left in path.parent.glob(f".{host}-*-{glob.escape(path.name + suffix)}"):
            process = left.name.removeprefix(f".{host}-").removesuffix(f"-{path.name}{suffix}")
            is_ours = process == str(os.getpid())  # of an earlier process with this number, as in a container
            if not process.isdigit() or (psutil.pid_exists(int(process)) and not is_ours):
                continue
            if suffix == _OLD and not path.exists():
                os.replace(left, path)
            _remove(left)


def _flush_names(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system and the file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
