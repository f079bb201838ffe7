"""Options that several commands share, and the checks of their values. Imports nothing heavy."""

import math
import os
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[str, typer.Option(help="Folder, repository id, 'mini', the embedded miniature, or 'smol'.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the fastest one present.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on. By default, only this machine can connect.")]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


def limit(text: str, low: float, high: float | None = None) -> Any:
    """An option of the panel of limits, in low..high."""
    return typer.Option(help=text, rich_help_panel="Limits", min=low, max=high)


MaxImageBytes = Annotated[int, limit("Bytes of an image.", 1)]
MaxImagePixels = Annotated[int, limit("Pixels of an image.", 1)]
MaxNewTokens = Annotated[int, limit("Tokens of an answer.", 1)]
MaxQuestionChars = Annotated[int, limit("Characters of text.", 1)]


class DType(StrEnum):
    """Types of weights and features."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class AutoDType(StrEnum):
    """Types of weights, or the one that they are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def let_idle_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call before torch is imported.

    By default they spin, which slows down a server that shares its cores with its own other threads and with clients.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def model_path(model: str) -> str:
    """The folder or repository id that `--model` names.

    Raises:
        ValueError: It is neither.
    """
    from ..miniature.shipped import shipped_model

    if shipped := shipped_model(model):
        return shipped
    check_source(model, "a model")
    return model


def check_source(source: str, what: str) -> None:
    """Check that a source is a folder or looks like a repository id. Nothing is read.

    Args:
        source: A folder, a repository id, or id@revision.
        what: What it should hold, with its article, for the message.

    Raises:
        ValueError: It is neither.
    """
    from ..names import REPOSITORY

    if os.path.isfile(source) or not (os.path.isdir(source) or REPOSITORY.fullmatch(source)):
        raise ValueError(f"{source!r} is neither a folder nor a repository id. Name {what} by one of them.")


def default_device() -> str:
    """CUDA if there is one, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """The device that `--device` names.

    Raises:
        ValueError: torch does not know the device, or this machine does not have it.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device!r} is not a device. Use cpu, cuda, cuda:1 or mps, for example.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device!r} is not available. Use cpu, or install a torch with CUDA.")
    return device


def check_outputs(outputs: Iterable[Path], option: str, suffixes: Sequence[str]) -> None:
    """Check files that a command will write, before it computes what goes into them.

    Args:
        outputs: The files.
        option: The option that names them, for the messages.
        suffixes: The allowed suffixes, in lower case.

    Raises:
        ValueError: A file has another suffix.
        FileNotFoundError: Its folder does not exist.
    """
    for path in outputs:
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{option} {path.name!r} has an unknown suffix. Use one of {', '.join(suffixes)}.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{option} names the folder {str(path.parent)!r}, which does not exist. Create it.")


def split_names(text: str) -> list[str]:
    """The entries of a comma-separated list, without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_numbers(text: str | None, option: str) -> list[float] | None:
    """Finite numbers from a comma-separated list, or None for None.

    Raises:
        ValueError: An entry is not a finite number, or there is none.
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in split_names(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{option} takes numbers separated by commas, such as 0,1.5,4, not {text!r}.")
    check_finite(numbers, option)
    return numbers


def parse_integers(text: str | None, option: str) -> list[int] | None:
    """Whole numbers from a comma-separated list, or None for None.

    Raises:
        ValueError: An entry is not a whole number, or there is none.
    """
    numbers = parse_numbers(text, option)
    if numbers is None:
        return None
    if fractions := [number for number in numbers if number % 1]:
        raise ValueError(f"{option} takes whole numbers, not {fractions[0]}.")
    return [int(number) for number in numbers]


def check_finite(numbers: Iterable[float], option: str) -> None:
    """Check numbers of the command line, where Python also reads "nan" and "inf".

    Raises:
        ValueError: One of them is not finite.
    """
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{option} takes finite numbers, not {number!r}.")
