"""What every command reports: errors as one message without a traceback, and progress bars. Imports nothing heavy."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""What a user can correct. Anything else is a defect and keeps its traceback."""


QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TQDM_DELAY": "2"}
"""Environment variables of transformers, diffusers and tqdm."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print an expected error on standard error, without a traceback, and end the command with exit status 1.

    Raises:
        typer.Exit: One of `EXPECTED_ERRORS` was raised in the block.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer handles these
        raise
    except EXPECTED_ERRORS as error:
        typer.secho(f"sdllava: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def quieten_libraries() -> None:
    """Hide the warnings of libraries, and progress bars of less than two seconds. Runs before they are imported.

    `TRANSFORMERS_VERBOSITY`, `DIFFUSERS_VERBOSITY`, `TQDM_DELAY` and `PYTHONWARNINGS` keep what the user sets. Errors
    and the package's own warnings are printed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class CommandGroup(TyperGroup):
    """A group whose commands report expected errors without a traceback. Python callers still get the exceptions."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the command line names."""
        with clear_errors():
            return super().invoke(ctx)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error while the block runs.

    Yields:
        `Callable[[int, int], None]`: Call it with how many are done and how many there are.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


UNTRAINED = (
    "This model was assembled and not trained: its projector is new, so its answers do not describe the image. Train "
    "it with `sdllava train`."
)


PHOTOGRAPH = "the miniature only supports rendered scenes, and this image looks like a photograph."


def warn_if_untrained(config: Any) -> None:
    """Print a warning on standard error where a model has never been trained.

    Args:
        config: The model's. Models of other packages have no such record.
    """
    if getattr(config, "is_trained", None) is False:
        typer.secho(f"Warning: {UNTRAINED}", fg="yellow", err=True)


def require_packages(purpose: str, extra: str, *packages: str) -> None:
    """Check that the packages of an optional extra are installed, without importing them.

    Args:
        purpose: What needs them, capitalised, for example "Training".
        extra: The extra of this package that installs them.
        packages: Their import names.

    Raises:
        ImportError: Some are missing. The message names them and how to install them.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{purpose} needs {", ".join(missing)}. Run: pip install "sdllava[{extra}]"')
