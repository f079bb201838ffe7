"""`python -m research.miniature`: train the miniature from scratch, and run its study."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train the miniature from scratch, and run its study.")


class ScaleName(StrEnum):
    smoke = "smoke"
    mini = "mini"
    gpu = "gpu"


class StudyScaleName(StrEnum):
    smoke = "smoke"
    mini = "mini"


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and finished parts; an earlier run goes on there.")],
    scale: Annotated[ScaleName, typer.Option(help="How large and how long.")] = ScaleName.mini,
    part: Annotated[
        list[str] | None, typer.Option(help="Train these parts alone, in this order, and no stage.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides first weights, scenes and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the parts, each checked before the next builds on it, then both stages. Stop and run it again at will."""
    from .pretrain import CheckFailedError, pretrain
    from .scales import PARTS
    from .ship import write_checkpoint
    from .stages import STAGES, train_stage

    try:
        checks = pretrain(scale.value, out, tuple(part or PARTS), seed, device)
        for stage in () if part else STAGES:
            train_stage(stage, scale.value, out, seed, device)
    except (CheckFailedError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for name, metrics in checks.items():
        typer.echo(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in metrics.items()))
    if not part:
        typer.echo(f"the model is in {write_checkpoint(out)}")


@app.command()
def study(
    source: Annotated[Path, typer.Option("--from", help="What `mini train` left; numbers are kept in its study/.")],
    out: Annotated[Path, typer.Option(help="Folder of the page miniature.md and its pictures.")] = Path("docs"),
    part: Annotated[list[str] | None, typer.Option(help="a to f; several times, or none for all.")] = None,
    scale: Annotated[StudyScaleName, typer.Option(help="How much is read and trained.")] = StudyScaleName.mini,
) -> None:
    """Measure the papers' tables in small, part by part, and write the page. Stop and run it again at will."""
    from sdllava.commands.evaluate import one_sentence

    from .study.run import run_study

    with one_sentence():
        typer.echo(f"wrote {run_study(source, out, scale.value, tuple(part or ()))}")


if __name__ == "__main__":
    app()
