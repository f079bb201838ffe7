"""The commands of `sdllava mini`. Heavy imports happen inside the commands."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import check_outputs

app = typer.Typer(no_args_is_help=True, help="Write the rendered scenes that the embedded miniature was trained on.")

SplitOption = Annotated[str, typer.Option(help="train, validation, test, composition or varied.")]


class Task(StrEnum):
    """What the rows of a scene dataset hold."""

    questions = "questions"
    captions = "captions"
    descriptions = "descriptions"
    pairs = "pairs"


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="A Parquet file to write.")],
    split: SplitOption = "train",
    task: Annotated[
        Task, typer.Option(help="Questions, captions, descriptions of objects, or minimal pairs.")
    ] = Task.questions,
    count: Annotated[int, typer.Option(min=1, help="Number of rows; for pairs, of pairs of rows.")] = 1000,
    turns: Annotated[int, typer.Option(min=1, help="Maximum number of questions per scene.")] = 1,
    seed: Annotated[int, typer.Option(help="Each seed gives other scenes of the split.")] = 0,
    examples: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with examples of minimal pairs.")
    ] = None,
) -> None:
    """Write rendered scenes with questions, captions or minimal pairs, in TRL's format."""
    check_outputs([out], "The argument", (".parquet",))
    check_outputs([examples] if examples else [], "--examples", (".html", ".htm"))
    from ..atomic_files import atomic_path
    from ..scenes.dataset import scene_dataset, write_examples

    dataset = scene_dataset(split, count, seed, task.value, turns)
    with atomic_path(out) as written:
        dataset.to_parquet(written)
    if examples:
        write_examples(examples, seed)


@app.command()
def scene(
    out: Annotated[Path, typer.Argument(help="A PNG file to write.")],
    split: SplitOption = "test",
    seed: Annotated[int, typer.Option(help="Each seed gives another scene of the split.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge each pixel by this factor.")] = 4,
) -> None:
    """Write one scene as an image, and print its caption and some questions with their answers."""
    check_outputs([out], "The argument", (".png",))
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
