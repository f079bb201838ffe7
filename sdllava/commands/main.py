"""The `sdllava` command. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import os
import sys

import typer

from .ask import ask
from .compose import compose, taps
from .demo import demo
from .evaluate import evaluate, match
from .inspect import app as inspect_app
from .mini import app as mini_app
from .push import push
from .serve import serve
from .train import TRAIN_CONTEXT, cache, merge, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stable Diffusion as a question-conditioned visual encoder for LLaVA-style vision-language models.",
)
app.command()(ask)
app.command()(compose)
app.command()(taps)
app.command(context_settings=TRAIN_CONTEXT)(train)
app.command()(merge)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(cache)
app.command()(evaluate)
app.command()(match)
app.add_typer(inspect_app, name="inspect")
app.command()(push)
app.command()(serve)
app.command()(demo)
app.add_typer(mini_app, name="mini")


def main() -> None:
    """Run the command; an expected error is one sentence on standard error and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.secho(f"sdllava: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
