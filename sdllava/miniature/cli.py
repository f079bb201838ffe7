"""`sdllava mini`: train the miniature from nothing, and write the scenes that it is trained on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The miniature: the whole system in small, trained from nothing.")


class ScaleName(StrEnum):
    smoke = "smoke"
    mini = "mini"
    gpu = "gpu"


class StudyScaleName(StrEnum):
    smoke = "smoke"
    mini = "mini"


class Task(StrEnum):
    questions = "questions"
    captions = "captions"
    pairs = "pairs"


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
    from sdllava.miniature.pretrain import CheckFailedError, pretrain
    from sdllava.miniature.scales import PARTS
    from sdllava.miniature.ship import write_checkpoint
    from sdllava.miniature.stages import STAGES, train_stage

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

    from sdllava.data.scenes import scene_dataset, write_examples

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

    from sdllava.data.scenes import ask, caption, render, sample_scene

    sampled = sample_scene(split, seed)
    picture = render(sampled)
    picture.resize((picture.width * scale, picture.height * scale), resample=0).save(out)
    typer.echo(f"wrote {out}: {caption(sampled)}")
    rng = random.Random(seed)
    for question in {q.text: q for q in (ask(sampled, rng) for _ in range(4)) if q}.values():
        typer.echo(f"  {question.text} {question.answer}")


@app.command()
def study(
    source: Annotated[Path, typer.Option("--from", help="What `mini train` left; numbers are kept in its study/.")],
    out: Annotated[Path, typer.Option(help="Folder of the page miniature.md and its pictures.")] = Path("docs"),
    part: Annotated[list[str] | None, typer.Option(help="a to f; several times, or none for all.")] = None,
    scale: Annotated[StudyScaleName, typer.Option(help="How much is read and trained.")] = StudyScaleName.mini,
) -> None:
    """Measure the papers' tables in small, part by part, and write the page. Stop and run it again at will."""
    from sdllava.evaluation.cli import one_sentence
    from sdllava.miniature.study.run import run_study

    with one_sentence():
        typer.echo(f"wrote {run_study(source, out, scale.value, tuple(part or ()))}")
