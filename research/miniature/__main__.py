"""`python -m research.miniature`: train the miniature from scratch, and run its study."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train the miniature from scratch, and run its study.")


class ScaleName(StrEnum):
    """The scales of the training."""

    smoke = "smoke"
    mini = "mini"
    gpu = "gpu"


class StudyScaleName(StrEnum):
    """The scales of the study."""

    smoke = "smoke"
    mini = "mini"


@contextmanager
def _without_traceback() -> Iterator[None]:
    """End the command with the error's message and exit status 1."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and finished parts. Resumes an earlier run.")],
    scale: Annotated[ScaleName, typer.Option(help="Sizes and budgets.")] = ScaleName.mini,
    part: Annotated[
        list[str] | None, typer.Option(help="Only train these parts, in this order, and not the stages.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Selects initial weights, scenes and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    until: Annotated[
        int | None, typer.Option(min=1, help="Stop the named parts at this step and write them as they are.")
    ] = None,
) -> None:
    """Train the parts, each checked before the next one builds on it, then both stages. It can be stopped any time."""
    with _without_traceback():
        from .pretrain import pretrain
        from .scales import PARTS
        from .ship import write_checkpoint
        from .stages import STAGES, train_stage

        if until and not part:
            raise ValueError("--until stops a part before its budget ends. Name it with --part.")
        checks = pretrain(scale.value, out, tuple(part or PARTS), seed, device, until)
        for stage in () if part else STAGES:
            train_stage(stage, scale.value, out, seed, device)
        for name, metrics in checks.items():
            typer.echo(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in metrics.items()))
        if not part:
            typer.echo(f"Wrote the model to {write_checkpoint(out)}")


@app.command()
def unpack(out: Annotated[Path, typer.Option(help="Folder of the parts.")]) -> None:
    """Write the parts of the released checkpoint, to train the judge and the diffusion transformer on them."""
    with _without_traceback():
        from .unpack import unpack as write_parts

        typer.echo(f"Wrote the parts to {write_parts(out)}")


@app.command()
def smol(
    out: Annotated[Path, typer.Option(help="Folder of the base, the data and the run. Resumes an earlier run.")],
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of stage 2, of three conversations.")] = 1900,
    ship: Annotated[Path | None, typer.Option(help="Also write the adapter in half precision to this folder.")] = None,
) -> None:
    """Compose, initialise and fine-tune sdllava-smol, the miniature's encoders with SmolLM2."""
    with _without_traceback():
        from .smol import train_smol, write_adapter

        adapter = train_smol(out, max_steps=max_steps)
        if ship is not None:
            write_adapter(adapter, out / "base", ship)
        typer.echo(f"Wrote the adapter to {ship or adapter}")


@app.command()
def smol_only_clip(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint. A finished one is kept.")],
) -> None:
    """Write sdllava-smol with only CLIP: the baseline, whose projector is trained as smol's."""
    with _without_traceback():
        from .smol import write_only_clip

        typer.echo(f"Wrote the baseline to {write_only_clip(out)}")


@app.command()
def asking(
    out: Annotated[Path, typer.Option(help="Folder of features, runs and asking.json. Resumes an earlier call.")],
    variant: Annotated[list[str] | None, typer.Option(help="Only these rows of the table. Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs per variant.")] = 3,
    images: Annotated[int, typer.Option(min=1, help="Training images.")] = 10_000,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of stage 2, of 32 images each.")] = 500,
    test: Annotated[int, typer.Option(min=1, help="Test images, one question each.")] = 2_000,
    page: Annotated[Path | None, typer.Option(help="Folder of asking.md, asking.json and figures/.")] = None,
) -> None:
    """Train variants of the miniature with and without the question, and write what the question gains."""
    with _without_traceback():
        from .asking import VARIANTS, AskingBudget, measure
        from .asking_page import table, write_page

        names = variant or list(VARIANTS)
        if unknown := next((name for name in names if name not in VARIANTS), None):
            raise ValueError(f"Unknown variant {unknown!r}. Use one of {', '.join(map(repr, VARIANTS))}.")
        rows = measure(out, names, seeds, AskingBudget(images, test, max(steps * 3 // 10, 1), steps))
        typer.echo(table(rows))
        if page:
            write_page(page, rows, VARIANTS)


@app.command()
def third_party(
    out: Annotated[Path, typer.Option(help="Folder of data and runs. Resumes an earlier call.")],
    benchmark: Annotated[str, typer.Option(help="easy_vqa, shapes or nlvr.")],
    base: Annotated[list[str], typer.Option(help="Checkpoint to fine-tune: mini, smol or a folder. Repeatable.")],
    data: Annotated[Path | None, typer.Option(help="Folder of SHAPES or NLVR.")] = None,
) -> None:
    """Fine-tune checkpoints on the training set of a benchmark that others wrote, and score them on it."""
    with _without_traceback():
        from sdllava.miniature.shipped import shipped_model

        from .third_party import TASKS, train_and_score

        if benchmark not in TASKS:
            raise ValueError(f"Unknown benchmark {benchmark!r}. Use one of {', '.join(map(repr, TASKS))}.")
        for name in base:
            found = train_and_score(out, benchmark, shipped_model(name) or name, data)
            typer.echo(f"{name}: {found['scores']}, blind {found['blind']['scores']}")


@app.command()
def shapes_replies(
    answers: Annotated[Path, typer.Option(help="Folder `answers` of a run of third-party on SHAPES.")],
    data: Annotated[Path, typer.Option(help="Folder of SHAPES.")],
) -> None:
    """Where the replies of a model that was fine-tuned on SHAPES go wrong, by question of the test split."""
    with _without_traceback():
        from .shapes_replies import analyse, table

        typer.echo(table(analyse(answers, data)))


@app.command()
def study(
    source: Annotated[
        Path, typer.Option("--from", help="Folder of a finished training. Results are saved in its study/.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of study.md, mmdit.md and figures/.", show_default="research/miniature")
    ] = Path(__file__).parent,
    part: Annotated[list[str] | None, typer.Option(help="a to k, repeatable. Default: a to f.")] = None,
    scale: Annotated[StudyScaleName, typer.Option(help="Budgets of the measurements.")] = StudyScaleName.mini,
) -> None:
    """Measure the papers' tables on the miniature, part by part, and write the page. It can be stopped any time."""
    with _without_traceback():
        from .study.run import run_study

        for page in run_study(source, out, scale.value, tuple(part or ())):
            typer.echo(f"Wrote {page}")


if __name__ == "__main__":
    app()
