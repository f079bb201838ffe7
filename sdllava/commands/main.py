"""The `sdllava` command. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import os
from typing import Annotated

import typer

from ..version import __version__
from .ask import ask
from .compose import compose, taps
from .convert import convert
from .data import app as data_app
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .inspect import app as inspect_app
from .match import match
from .mini import app as mini_app
from .push import push
from .recipes import recipes
from .reporting import CommandGroup, quieten_libraries
from .serve import serve
from .train import TRAIN_CONTEXT, cache, merge, train

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stable Diffusion as a question-conditioned vision encoder for LLaVA-style vision-language models.",
)
app.command()(ask)
app.command()(compose)
app.command()(taps)
app.command()(convert)
app.command(context_settings=TRAIN_CONTEXT)(train)
app.command()(merge)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(cache)
app.command()(evaluate)
app.command()(match)
app.add_typer(inspect_app, name="inspect")
app.command()(push)
app.command()(serve)
app.command()(demo)
app.add_typer(data_app, name="data")
app.add_typer(mini_app, name="mini")
app.command()(recipes)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Handle the options that come before the name of a command."""


def main() -> None:
    """Run the command that the command line names."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # otherwise MKL's last bits depend on the alignment of memory
    quieten_libraries()
    app()


if __name__ == "__main__":
    main()
