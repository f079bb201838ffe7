"""`sdllava mini`: the rendered scenes that the embedded miniature was trained on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The rendered scenes that the embedded miniature was trained on.")


class Task(StrEnum):
    questions = "questions"
    captions = "captions"
    pairs = "pairs"


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="A Parquet file to write.")],
    split: Annotated[str, typer.Option(help="train, validation, test or composition.")] = "train",
    task: Annotated[Task, typer.Option(help="What is asked.")] = Task.questions,
    count: Annotated[int, typer.Option(help="Rows; for pairs, pairs of rows.")] = 1000,
    turns: Annotated[int, typer.Option(help="The most questions on one scene.")] = 1,
    seed: Annotated[int, typer.Option(help="Another seed gives other scenes of the split.")] = 0,
    examples: Annotated[Path | None, typer.Option(help="Also write an HTML page of minimal pairs to look at.")] = None,
) -> None:
    """Write rendered scenes with questions, captions or minimal pairs, in TRL's format."""
    import os

    from ..scenes.dataset import scene_dataset, write_examples

    try:
        dataset = scene_dataset(split, count, seed, task.value, turns)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    aside = out.with_name(f"{out.name}.part")
    dataset.to_parquet(aside)
    os.replace(aside, out)
    if examples:
        write_examples(examples, seed)


@app.command()
def scene(
    out: Annotated[Path, typer.Argument(help="A PNG to write.")],
    split: Annotated[str, typer.Option(help="train, validation, test or composition.")] = "test",
    seed: Annotated[int, typer.Option(help="Another seed gives another scene of the split.")] = 0,
    scale: Annotated[int, typer.Option(help="Enlarge each pixel that many times.")] = 4,
) -> None:
    """Write one scene as a picture, and print its caption and some questions with their answers."""
    import random

    from ..scenes.language import ask, caption
    from ..scenes.render import render
    from ..scenes.world import sample_scene

    sampled = sample_scene(split, seed)
    picture = render(sampled)
    picture.resize((picture.width * scale, picture.height * scale), resample=0).save(out)
    typer.echo(f"wrote {out}: {caption(sampled)}")
    rng = random.Random(seed)
    for question in {q.text: q for q in (ask(sampled, rng) for _ in range(4)) if q}.values():
        typer.echo(f"  {question.text} {question.answer}")
